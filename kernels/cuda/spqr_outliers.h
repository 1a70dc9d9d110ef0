// The sparse part of cuda_spqr_linear.
//
// 16 threads share a row, strided, so that neighbours read neighbours; their sums are added by shuffles, in one order. Three loads depend on
// each other: offsets of rows, columns and values, activations. The first is issued before the ring is filled, and nothing waits for it until
// then; of the others a thread has several outliers on the way at once, so that a row of 64 takes no more latencies than one of 16.
// Values are converted when all are there: a branch for their dtype at each load would wait for each.
#pragma once

#include "spqr_parts.h"

namespace hfq {
namespace {

constexpr int kOutlierShare = 16;  // threads of a row

// Where a row's outliers are, as it is stored.
struct RawSpan {
  int32_t begin, end;
};

// The outliers of 16 rows, one for each 16 threads, times up to kTokens tokens, into sums [16][kTokens]. To be called by 256 threads.
template <class T, int kTokens>
__device__ __forceinline__ void multiply_outliers(const SpqrLinearParams& p, RawSpan raw_span, int64_t first_token, uint32_t tokens, float* sums) {
  constexpr uint32_t kAtOnce = kTokens == 1 ? 4 : 2;
  const SpqrWeight& w = p.weight;
  const uint32_t part = threadIdx.x % kOutlierShare, row = threadIdx.x / kOutlierShare, in_features = static_cast<uint32_t>(w.in_features);
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + first_token * w.in_features;
  const Span span = inside(w, kept(raw_span.begin), kept(raw_span.end));
  float sum[kTokens] = {};
  for (uint32_t first = span.begin + part; first < span.end; first += kAtOnce * kOutlierShare) {
    uint32_t column[kAtOnce], raw[kAtOnce];
    float value[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t at = first + i * kOutlierShare < span.end ? first + i * kOutlierShare : span.end - 1;
      column[i] = outlier_column(w, at);
      raw[i] = w.stat_dtype == kFloat32 ? load(static_cast<const uint32_t*>(w.values) + at) : load(static_cast<const uint16_t*>(w.values) + at);
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (first + i * kOutlierShare >= span.end) column[i] = in_features;
      const uint16_t half = static_cast<uint16_t>(raw[i]);
      value[i] = w.stat_dtype == kFloat32 ? as_float(raw[i]) : w.stat_dtype == kFloat16 ? to_float(Float16{}, half) : to_float(BFloat16{}, half);
    }
    uint16_t numbers[kAtOnce][kTokens];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const bool exists = column[i] < in_features;
      if (!exists) value[i] = 0.0f;
#pragma unroll
      for (uint32_t m = 0; m < kTokens; ++m) numbers[i][m] = exists && m < tokens ? load_written(x + m * w.in_features + column[i]) : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (uint32_t m = 0; m < kTokens; ++m) sum[m] = multiply_add(value[i], to_float(T{}, numbers[i][m]), sum[m]);
  }
#pragma unroll
  for (uint32_t m = 0; m < kTokens; ++m) {
    if (m >= tokens) break;
#pragma unroll
    for (int lanes = kOutlierShare / 2; lanes > 0; lanes /= 2) sum[m] += as_float(shuffle_xor(as_bits(sum[m]), lanes));
    if (part == m) sums[row * kTokens + m] = sum[m];
  }
}

}  // namespace
}  // namespace hfq
