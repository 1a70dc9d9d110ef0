// Arguments of the CPU kernels: plain data and raw pointers only.
//
// Each instruction set is compiled in its own file with its own flags. Anything inline that two such files share is merged by the
// linker into one copy, possibly the AVX-512 one, which then crashes older machines. This header therefore holds no functions.
//
// Names: M tokens, N out_features, K in_features, G groups of `group_size` columns, W 32-bit words per row.
//
// Layout "rows16": 16 rows form a block; one 64-byte line holds word w of these 16 rows, so lane = row and no kernel ever sums
// across lanes.
//
//   qweight uint8 [ceil(N/16), W, 16, 4]     line (b, w):  | row 16b: 4 bytes | row 16b+1: 4 bytes | ... | row 16b+15: 4 bytes |
//   scales  float [ceil(N/16), G, 16]        zeros likewise; scales of padded rows are 0
//
//   A word is little endian: 4-bit code k of a row is bits [4*(k%8), 4*(k%8)+4) of word k/8; 8-bit code k is byte k%4 of word k/4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hfq {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUnsupported = -1 };

// Columns that share one activation scale in int8 mode; blocks start afresh in every weight group. 32 also bounds the 16-bit sums of
// vpmaddubsw: 8 steps of 2 * 15 * 127 = 30480 < 32768.
constexpr int64_t kActBlock = 32;
constexpr int64_t kRows = 16;        // rows per block
constexpr int64_t kLineBytes = 64;   // one word of each of the 16 rows

// Up to `max_tokens` tokens of activations, interleaved so that the inner loop walks one pointer.
struct Activations {
  float* values;        // [W, m, 32/bits]       exact mode: x as fp32, zero beyond K
  int8_t* codes;        // [W, m, 32/bits]       int8 mode; 4-bit words: columns 0 2 4 6, then 1 3 5 7
  float* block_scales;  // [G * blocks_per_group, m]
  int32_t* block_init;  // [G * blocks_per_group, m]  -code_offset * sum(codes): folds the constant zero point into the accumulator
  float* group_sums;    // [G, m]                sum of the (dequantized) activations: folds the zero point of each row
};

struct Shape {
  int64_t in_features;       // K
  int64_t out_features;      // N
  int64_t words;             // W
  int64_t group_size;
  int64_t groups;            // G
  int64_t blocks_per_group;  // ceil(group_size / kActBlock)
  int32_t bits;              // 4 or 8
};

struct PrepareParams {
  Shape shape;
  const void* x;  // [tokens, K]
  DType x_dtype;
  int64_t tokens;
  bool int8_activations;
  int32_t code_offset;  // subtracted from every code in int8 mode: 8, 128, or 0 where each row has its own zero point
  Activations out;
};

struct LinearParams {
  Shape shape;
  const uint8_t* qweight;      // [N16, W, 16, 4]
  const void* scales;          // [N16, G, 16]
  const void* zeros;           // [N16, G, 16] or null
  const float* codebook;       // [16] or null; 4 bits only
  const uint8_t* codebook_u8;  // [16] codebook * 127 / max|codebook| + 128; int8 mode only
  float output_factor;         // max|codebook| / 127 in int8 mode with a codebook, else 1
  const void* bias;            // [N] or null
  DType scale_dtype;           // of scales and zeros
  DType bias_dtype;
  DType y_dtype;
  bool int8_activations;
  int32_t tokens;              // 1 .. max_tokens
  Activations x;
  void* y;                     // [tokens, N]
};

// Activations that are quantized over the whole row (int8_body.h): up to `max_tokens` of them.
struct QuantizeParams {
  Shape shape;               // 8 bits, one group
  const void* x;             // [tokens, K]
  DType x_dtype;
  int64_t tokens;            // m
  const float* input_scale;  // [1] for all tokens; null: one for each token, from its largest magnitude
  Activations out;           // codes [W, m, 4], block_scales [m], block_init [m]
};

struct DequantizeParams {
  Shape shape;
  const uint8_t* qweight;  // [N16, W, 16, 4]
  const void* scales;      // [N16, G, 16]
  const void* zeros;       // [N16, G, 16] or null
  const float* codebook;   // [16] or null
  DType scale_dtype;
  DType y_dtype;
  void* y;                 // [N, K]
};

struct SpqrLinearParams;  // spqr.h
struct SpqrDequantizeParams;
struct RoundParams;  // rounding.h
struct SearchParams;
struct MomentParams;  // moments.h

// What one instruction set offers. prepare() covers groups [first, last), spqr_prepare() units, quantize() all tokens, round_columns()
// tiles of kTileRows rows, search_grid() groups of row blocks, the others row blocks.
struct Kernels {
  const char* name;
  int32_t max_tokens;
  int32_t spqr_max_tokens;
  void (*prepare)(const PrepareParams& params, int64_t first, int64_t last);
  void (*linear)(const LinearParams& params, int64_t first, int64_t last);
  void (*dequantize)(const DequantizeParams& params, int64_t first, int64_t last);
  void (*quantize)(const QuantizeParams& params);
  void (*int8_linear)(const LinearParams& params, int64_t first, int64_t last);
  void (*spqr_prepare)(const SpqrLinearParams& params, int64_t first, int64_t last);
  void (*spqr_linear)(const SpqrLinearParams& params, int64_t first, int64_t last);
  void (*spqr_dequantize)(const SpqrDequantizeParams& params, int64_t first, int64_t last);
  void (*round_columns)(const RoundParams& params, float* scratch, int64_t first, int64_t last);
  void (*search_grid)(const SearchParams& params, float* scratch, int64_t first, int64_t last);
  // Null without matrix units. Strips are packed, then tasks (kBand) multiplied.
  void (*pack_moment)(const MomentParams& params, int64_t first, int64_t last) = nullptr;
  void (*multiply_moment)(const MomentParams& params, int64_t first, int64_t last) = nullptr;
};

// The matrix units come with everything that kAvx512VnniKernels needs.
void amx_pack_moment(const MomentParams& params, int64_t first, int64_t last);
void amx_multiply_moment(const MomentParams& params, int64_t first, int64_t last);

extern const Kernels kGenericKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx2VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;

}  // namespace hfq
