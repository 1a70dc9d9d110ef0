// Launchers: split the work over tokens, row blocks and threads. Arguments are validated by the caller (torch_binding.cpp).
#pragma once

#include "decode.h"
#include "moments.h"
#include "rounding.h"
#include "rows16.h"
#include "spqr.h"

namespace hfq {

inline int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

struct LinearCall {
  Shape shape;
  int64_t tokens;          // M
  const void* x;           // [M, K]
  const uint8_t* qweight;  // [N16, W, 16, 4]
  const void* scales;      // [N16, G, 16]
  const void* zeros;       // [N16, G, 16] or null
  const float* codebook;   // as in LinearParams
  const void* bias;        // [N] or null
  void* y;                 // [M, N]
  DType x_dtype;           // of x and y
  DType scale_dtype;
  DType bias_dtype;
  bool int8_activations;
  bool whole_rows;           // activations are quantized over the whole row: to int8 (int8_body.h), or, of E4M3 weights, to E4M3 (e4m3_body.h)
  const float* input_scale;  // [1] or null; whole_rows only
};

struct RoundTokensCall {
  Shape shape;               // one group
  int64_t tokens;            // M
  const void* x;             // [M, K]
  DType x_dtype;
  const float* input_scale;  // [1] or null
  float* values;             // [M, K]
  float* scales;             // [M]
};

struct LookupCall {
  DequantizeParams table;  // y: [T, K]
  const int64_t* index;    // [T], each a row of the table
  int64_t tokens;          // T
};

// One token's keys and values into memory with room for `room` of them.
struct AppendCall {
  int64_t batch, heads, room, at;
  int64_t bytes;       // of a head
  int64_t v_stride;    // bytes between the tokens of v
  const void* k;       // [B, H, D]
  const void* v;       // [B, H, D]
  void* keys;          // [B, H, C, D]
  void* values;        // [B, H, C, D]
};

struct PlanesCall {
  int64_t rows, row_bytes;  // of `in`; rows of `out` are filled up to whole units of 12 bytes, and so are those of `in` when joining
  const uint8_t* in;
  uint8_t* out;
  bool join;  // planes to the stored layout
};

// Products with weights of one kind, in one parallel loop: bits, groups, columns, codebook, dtypes and treatment of activations are the same in
// all calls.
void launch_linears(const LinearCall* calls, int64_t count);
void launch_round_tokens(const RoundTokensCall& call);  // to E4M3
void launch_dequantize(const DequantizeParams& params);
void launch_lookup(const LookupCall& call);
void launch_planes(const PlanesCall& call);
// params.values and .group_sums are set here; params.tokens likewise, a few of `tokens` at a time.
void launch_spqr_linear(const SpqrLinearParams& params, int64_t tokens);
void launch_spqr_dequantize(const SpqrDequantizeParams& params);
void launch_round_columns(const RoundParams& params);
void launch_search_grid(const SearchParams& params);
// params.strips, .blocks, .left and .right are set here; kernels().multiply_moment must not be null.
void launch_add_moment(MomentParams params);
void launch_rms_norm(const NormParams& params);
void launch_rotate(const RotateParams& params);
void launch_gate(const GateParams& params);
void launch_append(const AppendCall& call);
void launch_attend(const AttendParams& params);

}  // namespace hfq
