// Arguments of what stands between the products of a decode step: norms, rotary embeddings, attention of one token, gates. Plain data only
// (see cpu/rows16.h for why); meaning and reference in hfq/kernels/decode.py.
#pragma once

#include "dtype.h"

namespace hfq {

struct NormParams {
  int64_t rows, columns;
  DType dtype;
  const void* x;       // [rows, columns]
  const void* weight;  // [columns]
  void* y;             // [rows, columns]
  float eps;
  float offset;      // added to the weight
  bool round_first;  // x / rms(x) is rounded to dtype before the weight comes in
};

struct RotateParams {
  int64_t tokens, heads, size;  // M, H, D
  DType dtype;
  const void* x;     // [M, H, D], tokens x_stride apart
  int64_t x_stride;
  const void* cos;   // [M, D], or [1, D] for all tokens
  const void* sin;   // likewise
  bool shared;       // the latter
  void* y;           // [M, H, D]
};

struct GateParams {
  int64_t rows, columns;
  DType dtype;
  const void* gate;  // [rows, columns], rows gate_stride apart
  const void* up;
  int64_t gate_stride, up_stride;
  void* y;         // [rows, columns]
  bool tanh_gelu;  // else silu
};

struct AttendParams {
  int64_t batch, heads, kv_heads, size;  // B, H, H', D
  int64_t length, room;                  // T of C
  DType dtype;
  const void* q;         // [B, H, D]
  const void* k;         // [B, H', C, D]
  const void* v;         // [B, H', C, D]
  const void* mask;      // null, or [B or 1, H or 1, T]
  int64_t mask_batch, mask_heads;  // strides of the mask: T, a multiple of it, or 0
  bool mask_is_bool;     // true: read; else of `dtype` and added to the scores
  float scale;
  void* y;  // [B, H, D]
};

}  // namespace hfq
