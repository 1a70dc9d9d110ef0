// What the kernels of format "spqr" share: the checks of outliers, and codes of scales as they are loaded.
#pragma once

#include "fragments.h"
#include "spqr.h"

namespace hfq {

// Bytes of one group: of the codes of a tile, and of the lines.
__host__ __device__ __forceinline__ uint32_t group_code_bytes(const SpqrWeight& w) { return w.wide_codes ? 32 : 16; }
__host__ __device__ __forceinline__ uint32_t line_bytes(const SpqrWeight& w) { return w.stat_dtype == kFloat32 ? 16 : 8; }

// Two numbers of a word.
__device__ __forceinline__ float2 unpacked(BFloat16, uint32_t pair) { return make_float2(as_float(pair << 16), as_float(pair & 0xffff0000u)); }
__device__ __forceinline__ float2 unpacked(Float16, uint32_t pair) {
  return make_float2(to_float(Float16{}, static_cast<uint16_t>(pair)), to_float(Float16{}, static_cast<uint16_t>(pair >> 16)));
}

struct Span {
  uint32_t begin, end;
};

// Of a stack of weights, of which `w` is the first.
__device__ __forceinline__ SpqrWeight of_expert(SpqrWeight w, const Routing& r, int64_t stat_bytes, int64_t expert) {
  const int64_t outlier = expert * w.outliers;
  w.qweight += expert * r.qweight_bytes;
  w.stat_codes += expert * r.scale_bytes;
  w.stats = static_cast<const uint8_t*>(w.stats) + expert * stat_bytes;
  w.offsets += expert * (w.out_features + 1);
  w.columns = static_cast<const uint8_t*>(w.columns) + outlier * (w.wide_columns ? 4 : 2);
  w.values = static_cast<const uint8_t*>(w.values) + outlier * (w.stat_dtype == kFloat32 ? 4 : 2);
  return w;
}

// Checkpoints are checked when they are loaded; a wrong index must not become a wild read even so.
__device__ __forceinline__ Span inside(const SpqrWeight& w, int32_t begin, int32_t end) {
  const int32_t last = static_cast<int32_t>(w.outliers);
  return {static_cast<uint32_t>(begin < 0 ? 0 : begin), static_cast<uint32_t>(end < 0 ? 0 : end < last ? end : last)};
}
__device__ __forceinline__ Span outliers_of(const SpqrWeight& w, int64_t row) { return inside(w, load(w.offsets + row), load(w.offsets + row + 1)); }

// Compared as unsigned, what lies left of column 0 is beyond all.
__device__ __forceinline__ uint32_t outlier_column(const SpqrWeight& w, uint32_t i) {
  if (w.wide_columns) return static_cast<uint32_t>(load(static_cast<const int32_t*>(w.columns) + i));
  return static_cast<uint32_t>(static_cast<int32_t>(load(static_cast<const int16_t*>(w.columns) + i)));
}

// The codes of rows g and g + 8 in one group: 4 bytes if they are wide, else 2.
__device__ __forceinline__ uint32_t load_stat_codes(const uint8_t* pair, bool wide) {
  return wide ? load(reinterpret_cast<const uint32_t*>(pair)) : load(reinterpret_cast<const uint16_t*>(pair));
}

}  // namespace hfq
