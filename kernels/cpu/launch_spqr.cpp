#include "isa.h"
#include "launch.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kPrepareUnits = 512;  // units of 32 activations per thread

// The sums that a group's zero point is multiplied with, from activations that prepare has brought into units.
void sum_groups(const SpqrLinearParams& p) {
  const SpqrWeight& w = p.weight;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t begin = g * w.group_size, end = begin + w.group_size < w.in_features ? begin + w.group_size : w.in_features;
    for (int64_t t = 0; t < p.tokens; ++t) {
      float sums[kQuad] = {};
      // Whole quads: groups start on them, and beyond K there are zeros.
      for (int64_t k = begin; k < end; k += kQuad) {
        const float* x = p.values + (k / kUnit * p.tokens + t) * kUnit + k % kUnit;
        for (int64_t i = 0; i < kQuad; ++i) sums[i] += x[i];
      }
      p.group_sums[g * p.tokens + t] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
}

void sweep(const Kernels& isa, const SpqrLinearParams& all, int64_t begin, int64_t tokens) {
  static thread_local Scratch scratch;
  const SpqrWeight& w = all.weight;
  const int64_t units = ceil_div(w.in_features, kUnit), size = element_size(all.x_dtype);
  const int64_t value_bytes = tokens * units * kUnit * 4, sum_bytes = round_up(tokens * w.groups * 4, 64);
  char* base = scratch.reserve(static_cast<size_t>(value_bytes + sum_bytes));
  const Passes passes{tokens, ceil_div(tokens, isa.spqr_max_tokens)};
  const auto pass = [&](int64_t i) {
    SpqrLinearParams p = all;
    p.tokens = static_cast<int32_t>(passes.size(i));
    p.x = static_cast<const char*>(all.x) + (begin + passes.first(i)) * w.in_features * size;
    p.y = static_cast<char*>(all.y) + (begin + passes.first(i)) * w.out_features * size;
    p.values = reinterpret_cast<float*>(base) + passes.first(i) * units * kUnit;
    p.group_sums = reinterpret_cast<float*>(base + value_bytes) + passes.first(i) * w.groups;
    return p;
  };
  parallel_for(units, at_least_one(kPrepareUnits / tokens), [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < passes.count; ++i) isa.spqr_prepare(pass(i), first, last);
  });
  for (int64_t i = 0; i < passes.count; ++i) sum_groups(pass(i));

  const int64_t block_bytes = (w.words + w.stat_words) * kLineBytes;
  const int64_t step = at_least_one(kCachedBytes / block_bytes);
  const int64_t blocks = ceil_div(w.out_features, kRows);
  parallel_for(blocks, blocks_per_piece(blocks, block_bytes, tokens), [&](int64_t first, int64_t last) {
    for (int64_t from = first; from < last;) {
      const int64_t to = passes.count == 1 || from + step > last ? last : from + step;
      for (int64_t i = 0; i < passes.count; ++i) isa.spqr_linear(pass(i), from, to);
      from = to;
    }
  });
}

}  // namespace

void launch_spqr_linear(const SpqrLinearParams& params, int64_t tokens) {
  const Kernels& isa = kernels();
  for (int64_t token = 0; token < tokens; token += kMaxTokensPerSweep) {
    const int64_t left = tokens - token;
    sweep(isa, params, token, left < kMaxTokensPerSweep ? left : kMaxTokensPerSweep);
  }
}

void launch_spqr_dequantize(const SpqrDequantizeParams& params) {
  const Kernels& isa = kernels();
  const SpqrWeight& w = params.weight;
  advise_huge_pages(params.y, w.out_features * w.in_features * element_size(params.y_dtype));
  parallel_for(ceil_div(w.out_features, kRows), at_least_one(kGrainBytes / (w.words * kLineBytes)),
               [&](int64_t first, int64_t last) { isa.spqr_dequantize(params, first, last); });
}

}  // namespace hfq
