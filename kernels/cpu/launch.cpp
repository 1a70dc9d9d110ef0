#include "launch.h"

#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../torch-ext/torch_shim.h"
#include "isa.h"

namespace hfq {
namespace {

constexpr int64_t kMaxTokensPerSweep = 64;     // bounds the scratch memory; every sweep reads the weights once
constexpr int64_t kMaxInt8Tokens = 256;        // the same where activations are bytes
constexpr int64_t kGrainBytes = 64 * 1024;     // less weight data per thread than this (3 us of reading) is not worth waking one
constexpr int64_t kCachedBytes = 256 * 1024;   // weights that stay in the L2 cache between two passes over them
constexpr int64_t kPrepareGrain = 16 * 1024;   // activations per thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t at_least_one(int64_t a) { return a < 1 ? 1 : a; }

// Memory of the calling thread, kept between calls: one decode step makes hundreds of calls of a few microseconds.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  if (torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body)) != 0) throw std::runtime_error("hfq: torch_parallel_for failed");
}

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

// Passes of nearly equal size: 9 tokens at most 8 at a time are 5 + 4, not 8 + 1.
struct Passes {
  int64_t tokens, count;
  int64_t first(int64_t pass) const { return tokens * pass / count; }
  int64_t size(int64_t pass) const { return first(pass + 1) - first(pass); }
};

// A new output of many MiB is fresh memory: the first write to each 4 KiB page is a fault, which takes longer than filling the page with
// dequantized weights (measured: 33 MB in 17 ms, with huge pages 9). Huge pages fault 512 times less often.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
}

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
