#include "launch.h"

#include <cmath>

#include "isa.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kMaxInt8Tokens = 256;        // tokens per sweep where activations are bytes
constexpr int64_t kPrepareGrain = 16 * 1024;   // activations per thread

// Offsets of the activation buffers, each sized for `tokens` tokens and aligned to a cache line.
struct ScratchLayout {
  int64_t per_token_values, per_token_blocks, groups;
  int64_t values = 0, codes = 0, block_scales = 0, block_init = 0, group_sums = 0, bytes = 0;

  ScratchLayout(const Shape& s, int64_t tokens, bool int8_activations)
      : per_token_values(s.words * (32 / s.bits)), per_token_blocks(s.groups * s.blocks_per_group), groups(s.groups) {
    const auto take = [this](int64_t size) {
      const int64_t at = bytes;
      bytes += round_up(size, 64);
      return at;
    };
    if (int8_activations) {
      codes = take(tokens * per_token_values);
      block_scales = take(tokens * per_token_blocks * 4);
      block_init = take(tokens * per_token_blocks * 4);
    } else {
      values = take(tokens * per_token_values * 4);
    }
    group_sums = take(tokens * groups * 4);
  }

  // The buffers of the pass that begins with token `first`: passes follow each other in every buffer.
  Activations pass(char* base, int64_t first) const {
    Activations a;
    a.values = reinterpret_cast<float*>(base + values) + first * per_token_values;
    a.codes = reinterpret_cast<int8_t*>(base + codes) + first * per_token_values;
    a.block_scales = reinterpret_cast<float*>(base + block_scales) + first * per_token_blocks;
    a.block_init = reinterpret_cast<int32_t*>(base + block_init) + first * per_token_blocks;
    a.group_sums = reinterpret_cast<float*>(base + group_sums) + first * groups;
    return a;
  }
};

int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// The codebook in int8 mode: codebook[i] ~ factor * (bytes[i] - 128). Not-a-number and infinity end up in the factor.
float quantize_codebook(const float* codebook, uint8_t* bytes) {
  float largest = 0.0f;
  for (int i = 0; i < 16; ++i) largest = !(std::fabs(codebook[i]) <= largest) ? std::fabs(codebook[i]) : largest;
  const bool usable = largest > 0.0f && std::isfinite(largest);
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(128 + (usable ? std::lrint(codebook[i] * 127.0f / largest) : 0));
  return largest / 127.0f;
}

void sweep(const Kernels& isa, const LinearCall& call, LinearParams params, int64_t begin, int64_t tokens) {
  static thread_local Scratch scratch;
  const Shape& s = call.shape;
  const ScratchLayout layout(s, tokens, call.int8_activations);
  char* base = scratch.reserve(static_cast<size_t>(layout.bytes));
  const Passes passes{tokens, ceil_div(tokens, isa.max_tokens)};
  const int64_t size = element_size(call.x_dtype);
  const auto activations_of = [&](int64_t pass) { return static_cast<const char*>(call.x) + (begin + passes.first(pass)) * s.in_features * size; };

  const auto prepare = [&](int64_t first_group, int64_t last_group) {
    for (int64_t i = 0; i < passes.count; ++i) {
      PrepareParams p;
      p.shape = s;
      p.x = activations_of(i);
      p.x_dtype = call.x_dtype;
      p.tokens = passes.size(i);
      p.int8_activations = call.int8_activations;
      p.code_offset = call.codebook || s.bits == 8 ? 128 : 8;
      if (call.zeros) p.code_offset = 0;
      p.out = layout.pass(base, passes.first(i));
      isa.prepare(p, first_group, last_group);
    }
  };
  const auto quantize = [&](int64_t first_pass, int64_t last_pass) {
    for (int64_t i = first_pass; i < last_pass; ++i) {
      QuantizeParams p;
      p.shape = s;
      p.x = activations_of(i);
      p.x_dtype = call.x_dtype;
      p.tokens = passes.size(i);
      p.input_scale = call.input_scale;
      p.out = layout.pass(base, passes.first(i));
      isa.quantize(p);
    }
  };
  if (call.whole_rows)
    parallel_for(passes.count, at_least_one(kPrepareGrain / (isa.max_tokens * s.in_features)), quantize);
  else
    parallel_for(s.groups, at_least_one(kPrepareGrain / (tokens * s.group_size)), prepare);

  const auto product = call.whole_rows ? isa.int8_linear : isa.linear;
  const int64_t block_bytes = s.words * kLineBytes;
  const int64_t step = at_least_one(kCachedBytes / block_bytes);
  const auto multiply = [&](int64_t first_block, int64_t last_block) {
    for (int64_t from = first_block; from < last_block;) {
      const int64_t to = passes.count == 1 || from + step > last_block ? last_block : from + step;
      for (int64_t i = 0; i < passes.count; ++i) {
        LinearParams p = params;
        p.tokens = static_cast<int32_t>(passes.size(i));
        p.x = layout.pass(base, passes.first(i));
        p.y = static_cast<char*>(call.y) + (begin + passes.first(i)) * s.out_features * size;
        product(p, from, to);
      }
      from = to;
    }
  };
  parallel_for(ceil_div(s.out_features, kRows), at_least_one(kGrainBytes / (block_bytes * tokens)), multiply);
}

}  // namespace

void launch_linear(const LinearCall& call) {
  const Kernels& isa = kernels();
  alignas(16) uint8_t codebook_u8[16] = {};
  LinearParams params = {};
  params.shape = call.shape;
  params.qweight = call.qweight;
  params.scales = call.scales;
  params.zeros = call.zeros;
  params.codebook = call.codebook;
  params.codebook_u8 = codebook_u8;
  params.output_factor = call.codebook && call.int8_activations ? quantize_codebook(call.codebook, codebook_u8) : 1.0f;
  params.bias = call.bias;
  params.scale_dtype = call.scale_dtype;
  params.bias_dtype = call.bias_dtype;
  params.y_dtype = call.x_dtype;
  params.int8_activations = call.int8_activations;
  const int64_t most = call.whole_rows ? kMaxInt8Tokens : kMaxTokensPerSweep;
  for (int64_t token = 0; token < call.tokens; token += most) {
    const int64_t left = call.tokens - token;
    sweep(isa, call, params, token, left < most ? left : most);
  }
}

void launch_dequantize(const DequantizeParams& params) {
  const Kernels& isa = kernels();
  const int64_t blocks = ceil_div(params.shape.out_features, kRows);
  advise_huge_pages(params.y, params.shape.out_features * params.shape.in_features * element_size(params.y_dtype));
  const auto body = [&](int64_t first, int64_t last) { isa.dequantize(params, first, last); };
  parallel_for(blocks, at_least_one(kGrainBytes / (params.shape.words * kLineBytes)), body);
}

}  // namespace hfq
