#include "launch.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kMaxInt8Tokens = 256;        // tokens per sweep where activations are bytes
constexpr int64_t kPrepareGrain = 32 * 1024;   // activations per thread
constexpr int64_t kMaxTokensAtOnce = 1024;     // of several products: bounds the scratch memory
constexpr int64_t kLeastTileTokens = 16;       // from here on matrix units beat vectors
constexpr int64_t kMaxWideTokens = 512;        // whose sums of 128 rows stay in the L2 cache
constexpr int64_t kCachedActivations = 1 << 20;  // bytes of activations that stay in the L2 cache while weights pass by

// Offsets of the activation buffers, each sized for `tokens` tokens and aligned to a cache line.
struct ScratchLayout {
  int64_t per_token_values, per_token_blocks, groups;
  int64_t values = 0, codes = 0, block_scales = 0, block_init = 0, group_sums = 0, bytes = 0;
  bool scaled;

  ScratchLayout(const Shape& s, int64_t tokens, bool int8_activations, bool whole_rows)
      : per_token_values(round_up(s.groups * s.spans_per_group, 2) * kSpan), per_token_blocks(s.groups * s.blocks_per_group), groups(s.groups),
        scaled(int8_activations || whole_rows) {
    const auto take = [this](int64_t size) {
      const int64_t at = bytes;
      bytes += round_up(size, 64);
      return at;
    };
    if (int8_activations) {
      codes = take(tokens * per_token_values);
      block_init = take(tokens * per_token_blocks * 4);
    } else {
      values = take(tokens * per_token_values * 4);
    }
    if (scaled) block_scales = take(tokens * per_token_blocks * 4);
    group_sums = take(tokens * groups * 4);
  }

  // The buffers of the pass that begins with token `first` and has room for `stride`: passes follow each other in every buffer.
  Activations pass(char* base, int64_t first, int64_t stride) const {
    Activations a = {};
    a.stride = stride;
    a.values = reinterpret_cast<float*>(base + values) + first * per_token_values;
    a.codes = reinterpret_cast<int8_t*>(base + codes) + first * per_token_values;
    if (scaled) a.block_scales = reinterpret_cast<float*>(base + block_scales) + first * per_token_blocks;
    a.block_init = reinterpret_cast<int32_t*>(base + block_init) + first * per_token_blocks;
    a.group_sums = reinterpret_cast<float*>(base + group_sums) + first * groups;
    return a;
  }
};

// The codebook in int8 mode: codebook[i] ~ factor * (bytes[i] - 128). Not-a-number and infinity end up in the factor.
float quantize_codebook(const float* codebook, uint8_t* bytes) {
  float largest = 0.0f;
  for (int i = 0; i < 16; ++i) largest = !(std::fabs(codebook[i]) <= largest) ? std::fabs(codebook[i]) : largest;
  const bool usable = largest > 0.0f && std::isfinite(largest);
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(128 + (usable ? std::lrint(codebook[i] * 127.0f / largest) : 0));
  return largest / 127.0f;
}

// Of weights, as has_e4m3_codes() in rows16_parts.h.
bool is_e4m3(const LinearCall& call) { return call.codebook && call.shape.bits == 8; }

// Activations of the tokens [first, first + tokens) of a call into `out`: groups [first_group, last_group), or whole rows.
void prepare(const Kernels& isa, const LinearCall& call, const Shape& shape, int64_t first, int64_t tokens, Activations out, int64_t first_group,
             int64_t last_group) {
  const void* x = static_cast<const char*>(call.x) + first * shape.in_features * element_size(call.x_dtype);
  if (call.whole_rows) {
    QuantizeParams p = {};
    p.shape = shape;
    p.x = x;
    p.x_dtype = call.x_dtype;
    p.tokens = tokens;
    p.input_scale = call.input_scale;
    p.out = out;
    return (is_e4m3(call) ? isa.quantize_e4m3 : isa.quantize)(p);
  }
  PrepareParams p;
  p.shape = shape;
  p.x = x;
  p.x_dtype = call.x_dtype;
  p.tokens = tokens;
  p.int8_activations = call.int8_activations;
  p.e4m3_codes = is_e4m3(call);
  p.code_offset = call.zeros ? 0 : call.codebook ? 128 : 1 << (shape.bits - 1);
  p.out = out;
  isa.prepare(p, first_group, last_group);
}

LinearParams weight_of(const LinearCall& call, const uint8_t* codebook_u8, float output_factor) {
  LinearParams p = {};
  p.shape = call.shape;
  p.qweight = call.qweight;
  p.scales = call.scales;
  p.zeros = call.zeros;
  p.codebook = call.codebook;
  p.codebook_u8 = codebook_u8;
  p.output_factor = output_factor;
  p.bias = call.bias;
  p.scale_dtype = call.scale_dtype;
  p.bias_dtype = call.bias_dtype;
  p.y_dtype = call.x_dtype;
  return p;
}

// A call of at most kMaxTokensPerSweep tokens, a few of which are kept in registers at a time while packed weights are read.
struct Sweep {
  const LinearCall* call;
  LinearParams params;
  Passes passes;
  int64_t first_token;  // in the scratch memory
  int64_t first_block;  // row blocks of all sweeps before
  int64_t blocks;
};

// Sweeps side by side: their activations in one parallel loop, all their row blocks in another.
void run(const Kernels& isa, std::vector<Sweep>& sweeps, int64_t tokens) {
  static thread_local Scratch scratch;
  const LinearCall& first = *sweeps.front().call;
  const Shape& s = first.shape;
  const ScratchLayout layout(s, tokens, first.int8_activations, first.whole_rows);
  char* base = scratch.reserve(static_cast<size_t>(layout.bytes));
  const auto activations_of = [&](const Sweep& sweep, int64_t pass) {
    return layout.pass(base, sweep.first_token + sweep.passes.first(pass), sweep.passes.size(pass));
  };

  const int64_t units = first.whole_rows ? 1 : s.groups;
  for (const Sweep& sweep : sweeps) {
    parallel_for(sweep.passes.count * units, at_least_one(kPrepareGrain * units / (sweep.passes.size(0) * s.in_features)), [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to;) {
        const int64_t pass = at / units, unit = at % units, last = units - unit < to - at ? units : unit + to - at;
        prepare(isa, *sweep.call, s, sweep.passes.first(pass), sweep.passes.size(pass), activations_of(sweep, pass), unit, last);
        at += last - unit;
      }
    });
  }

  const int64_t block_bytes = s.words * kLineBytes, step = at_least_one(kCachedBytes / block_bytes);
  const auto multiply = [&](const Sweep& sweep, int64_t first_block, int64_t last_block) {
    const auto product = !sweep.call->int8_activations ? isa.linear : sweep.call->whole_rows ? isa.int8_linear : isa.linear_int8;
    for (int64_t from = first_block; from < last_block;) {
      const int64_t to = sweep.passes.count == 1 || from + step > last_block ? last_block : from + step;
      for (int64_t i = 0; i < sweep.passes.count; ++i) {
        LinearParams p = sweep.params;
        p.tokens = static_cast<int32_t>(sweep.passes.size(i));
        p.x = activations_of(sweep, i);
        p.y = static_cast<char*>(sweep.call->y) + sweep.passes.first(i) * p.shape.out_features * element_size(sweep.call->x_dtype);
        product(p, from, to);
      }
      from = to;
    }
  };
  const int64_t all_blocks = sweeps.back().first_block + sweeps.back().blocks;
  const int64_t grain = blocks_per_piece(all_blocks, block_bytes, ceil_div(tokens, static_cast<int64_t>(sweeps.size())));
  parallel_for(all_blocks, grain, [&](int64_t from, int64_t to) {
    for (const Sweep& sweep : sweeps) {
      const int64_t begin = from > sweep.first_block ? from - sweep.first_block : 0;
      const int64_t end = to - sweep.first_block < sweep.blocks ? to - sweep.first_block : sweep.blocks;
      if (begin < end) multiply(sweep, begin, end);
    }
  });
}

// Scratch memory of a thread: tiles of a chunk of weights, and sums of all tokens and `pairs` pairs of row blocks.
int64_t tile_bytes(int64_t tokens, int64_t pairs) { return (16 << 10) + ceil_div(tokens, 2 * kTileTokens) * pairs * (4 << 10); }

// Many tokens: weights are unpacked to bytes, two row blocks at a time, and meet all tokens on matrix units.
void sweep_tiles(const Kernels& isa, const LinearCall& call, LinearParams params) {
  Shape& s = params.shape;
  s.spans_per_group = round_up(s.spans_per_group, 2);
  const int64_t tokens = call.tokens;
  const int64_t blocks = ceil_div(tokens, kTileTokens);
  const ScratchLayout layout(s, blocks * kTileTokens, true, call.whole_rows);
  static thread_local Scratch scratch;
  char* base = scratch.reserve(static_cast<size_t>(layout.bytes));
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t token = i * kTileTokens, left = tokens - token;
      prepare(isa, call, s, token, left < kTileTokens ? left : kTileTokens, layout.pass(base, token, kTileTokens), 0, s.groups);
    }
  });
  params.tokens = static_cast<int32_t>(tokens);
  params.x = layout.pass(base, 0, kTileTokens);
  params.y = call.y;
  parallel_for(ceil_div(s.out_features, 2 * kRows), 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch tiles;
    isa.tiles_linear(params, reinterpret_cast<uint8_t*>(tiles.reserve(static_cast<size_t>(tile_bytes(tokens, 1)))), first, last);
  });
}

// Tokens [first, last) as they are: blocks of 16 of them, a span of 32 columns after the other.
void copy_wide(uint16_t* wide, const LinearCall& call, int64_t first, int64_t last) {
  const int64_t columns = call.shape.in_features, spans = ceil_div(columns, kSpan);
  for (int64_t token = first; token < last; ++token) {
    const uint16_t* x = static_cast<const uint16_t*>(call.x) + token * columns;
    for (int64_t span = 0; span < spans; ++span) {
      uint16_t* out = wide + ((token / kTileTokens * spans + span) * kTileTokens + token % kTileTokens) * kSpan;
      const int64_t left = columns - span * kSpan;
      if (left < kSpan) std::memset(out, 0, kSpan * 2);  // these meet weights of zero
      std::memcpy(out, x + span * kSpan, static_cast<size_t>(left < kSpan ? left : kSpan) * 2);
    }
  }
}

// The same with activations in bfloat16: as they are, or rounded to E4M3.
void sweep_bfloat16(const Kernels& isa, const LinearCall& call, LinearParams params) {
  const Shape& s = call.shape;
  const int64_t blocks = ceil_div(call.tokens, kTileTokens), block = ceil_div(s.in_features, kSpan) * kTileTokens * kSpan;  // of 16 tokens
  static thread_local Scratch scratch;
  char* base = scratch.reserve(static_cast<size_t>(blocks * (block * 2 + kTileTokens * 4)));
  params.x = {};
  params.x.wide = reinterpret_cast<uint16_t*>(base);
  if (call.whole_rows) {
    params.x.block_scales = reinterpret_cast<float*>(base + blocks * block * 2);
    parallel_for(blocks, at_least_one(kPrepareGrain / (kTileTokens * s.in_features)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t token = i * kTileTokens, left = call.tokens - token;
        Activations out = {};
        out.wide = params.x.wide + i * block;
        out.block_scales = params.x.block_scales + token;
        prepare(isa, call, s, token, left < kTileTokens ? left : kTileTokens, out, 0, s.groups);
      }
    });
  } else {
    parallel_for(call.tokens, at_least_one(kPrepareGrain / s.in_features),
                 [&](int64_t first, int64_t last) { copy_wide(params.x.wide, call, first, last); });
  }
  params.tokens = static_cast<int32_t>(call.tokens);
  params.y = call.y;
  parallel_for(ceil_div(s.out_features, 2 * kRows * kTilePairs), 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch tiles;
    isa.tiles_bfloat16(params, reinterpret_cast<uint8_t*>(tiles.reserve(static_cast<size_t>(tile_bytes(call.tokens, kTilePairs)))), first, last);
  });
}

// Many tokens, and groups that end with a tile of so many columns.
bool fills_tiles(const LinearCall& call, int64_t columns) {
  return call.tokens >= kLeastTileTokens && (call.shape.groups == 1 || call.shape.group_size % columns == 0);
}

}  // namespace

void launch_linears(const LinearCall* calls, int64_t count) {
  const Kernels& isa = kernels();
  if (!count) return;
  // One codebook for all.
  alignas(16) uint8_t codebook_u8[16] = {};
  const float factor = calls->codebook && calls->int8_activations ? quantize_codebook(calls->codebook, codebook_u8) : 1.0f;

  static thread_local std::vector<LinearCall> parts;
  parts.clear();
  for (const LinearCall* call = calls; call < calls + count; ++call) {
    advise_huge_pages(call->y, call->tokens * call->shape.out_features * element_size(call->x_dtype));
    const bool in_bfloat16 = !call->int8_activations && (call->whole_rows || call->x_dtype == kBFloat16);
    const bool wide = isa.tiles_bfloat16 && in_bfloat16 && fills_tiles(*call, kSpan);
    const bool tiles = wide || (isa.tiles_linear && call->int8_activations && fills_tiles(*call, kStepBytes));
    const int64_t most = wide ? kMaxWideTokens : tiles ? round_up(at_least_one(kCachedActivations / call->shape.in_features), 2 * kTileTokens)
                               : call->whole_rows && call->int8_activations ? kMaxInt8Tokens : kMaxTokensPerSweep;
    const int64_t size = element_size(call->x_dtype);
    for (int64_t token = 0; token < call->tokens; token += most) {
      LinearCall part = *call;
      part.tokens = call->tokens - token < most ? call->tokens - token : most;
      part.x = static_cast<const char*>(call->x) + token * call->shape.in_features * size;
      part.y = static_cast<char*>(call->y) + token * call->shape.out_features * size;
      if (tiles)
        (wide ? sweep_bfloat16 : sweep_tiles)(isa, part, weight_of(part, codebook_u8, factor));
      else
        parts.push_back(part);
    }
  }

  static thread_local std::vector<Sweep> sweeps;
  sweeps.clear();
  int64_t tokens = 0, blocks = 0;
  for (const LinearCall& part : parts) {
    if (tokens > kMaxTokensAtOnce) {
      run(isa, sweeps, tokens);
      sweeps.clear();
      tokens = blocks = 0;
    }
    const int64_t own = ceil_div(part.shape.out_features, kRows);
    sweeps.push_back({&part, weight_of(part, codebook_u8, factor), {part.tokens, ceil_div(part.tokens, isa.max_tokens)}, tokens, blocks, own});
    tokens += part.tokens;
    blocks += own;
  }
  if (!sweeps.empty()) run(isa, sweeps, tokens);
}

void launch_round_tokens(const RoundTokensCall& call) {
  const Kernels& isa = kernels();
  const int64_t columns = call.shape.in_features;
  parallel_for(call.tokens, at_least_one(kPrepareGrain / columns), [&](int64_t first, int64_t last) {
    QuantizeParams p = {};
    p.shape = call.shape;
    p.x = static_cast<const char*>(call.x) + first * columns * element_size(call.x_dtype);
    p.x_dtype = call.x_dtype;
    p.tokens = last - first;
    p.input_scale = call.input_scale;
    p.out.block_scales = call.scales + first;
    p.rows = call.values + first * columns;
    isa.quantize_e4m3(p);
  });
}

void launch_dequantize(const DequantizeParams& params) {
  const Kernels& isa = kernels();
  const int64_t blocks = ceil_div(params.shape.out_features, kRows);
  advise_huge_pages(params.y, params.shape.out_features * params.shape.in_features * element_size(params.y_dtype));
  const auto body = [&](int64_t first, int64_t last) { isa.dequantize(params, first, last); };
  parallel_for(blocks, at_least_one(kGrainBytes / (params.shape.words * kLineBytes)), body);
}

// Rows that were looked up make row blocks of their own, which are then dequantized like any.
void launch_lookup(const LookupCall& call) {
  const Kernels& isa = kernels();
  const DequantizeParams& table = call.table;
  const Shape& s = table.shape;
  const int64_t size = element_size(table.scale_dtype);
  const int64_t code_bytes = s.words * kLineBytes, scale_bytes = round_up(s.groups * kRows * size, kLineBytes);
  // Lane `row % 16` of the `lines` lines of a row block to one lane of as many other lines.
  const auto copy_lane = [](char* out, int64_t lane, const void* from, int64_t row, int64_t lines, int64_t bytes) {
    const char* in = static_cast<const char*>(from) + (row / kRows * lines * kRows + row % kRows) * bytes;
    for (int64_t i = 0; i < lines; ++i) std::memcpy(out + (i * kRows + lane) * bytes, in + i * kRows * bytes, static_cast<size_t>(bytes));
  };
  parallel_for(ceil_div(call.tokens, kRows), 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    char* codes = scratch.reserve(static_cast<size_t>(code_bytes + 2 * scale_bytes));
    char *scales = codes + code_bytes, *zeros = scales + scale_bytes;
    std::memset(codes, 0, static_cast<size_t>(code_bytes + 2 * scale_bytes));
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kRows, count = call.tokens - begin < kRows ? call.tokens - begin : kRows;
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t row = call.index[begin + lane];
        copy_lane(codes, lane, table.qweight, row, s.words, 4);
        copy_lane(scales, lane, table.scales, row, s.groups, size);
        if (table.zeros) copy_lane(zeros, lane, table.zeros, row, s.groups, size);
      }
      DequantizeParams p = table;
      p.shape.out_features = count;
      p.qweight = reinterpret_cast<const uint8_t*>(codes);
      p.scales = scales;
      p.zeros = table.zeros ? zeros : nullptr;
      p.y = static_cast<char*>(table.y) + begin * s.in_features * element_size(table.y_dtype);
      isa.dequantize(p, 0, 1);
    }
  });
}

}  // namespace hfq
