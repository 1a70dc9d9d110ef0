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
//   A word is little endian: code k of a row is bits [bits*k, bits*(k+1)) of its words, as in the stored layout. Only 3-bit codes, some of
//   which lie across two bytes there, are rearranged: each 32 columns have two words with the lower two bits of 16 codes each, and one
//   with the upper bits, that of column 16*h + 4*b + j in bit 8*b + 4*h + j.
//
// A span is 32 columns of a group (fewer at its end): `bits` words. Dot products of integers take four codes of each row at a time, one in
// each byte of a lane; the codes of activations stand in the order in which shifts and masks get those out of the words:
//
//   8 bits: 0 1 2 3 ...     4 bits: 0 2 4 6 1 3 5 7, 8 10 ...     2 and 3 bits: 0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15, 16 20 ...
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace hfq {

// Also bounds the 16-bit sums of vpmaddubsw: 8 steps of 2 * 15 * 127 = 30480 < 32768.
constexpr int64_t kSpan = 32;
constexpr int64_t kActBlock = 128;   // columns that share one activation scale in int8 mode; blocks start afresh in every weight group
constexpr int64_t kStepBytes = 64;   // activation codes of two spans of one token
constexpr int64_t kTileTokens = 16;  // tokens per tile of the matrix units
constexpr int64_t kTilePairs = 4;    // pairs of row blocks that share the activations of a chunk of columns
constexpr int64_t kRows = 16;        // rows per block
constexpr int64_t kLineBytes = 64;   // one word of each of the 16 rows

// E4M3 (hfq/core/float8.py). A code whose sign, exponent and mantissa are moved to their places in a float16 reads as 1/256 of its value,
// subnormals too: exponents are counted from 15 there, and from 7 here. NaN reads as a number, and is looked for apart.
constexpr int16_t kE4m3Half = -0x4080;   // these places: 0xbf80
constexpr float kE4m3Unit = 256.0f;
constexpr float kE4m3Most = 448.0f;
// Of |v| from 2^e on (at least 2^-6, the least normal number) E4M3 has multiples of 2^(e - 3): the unit in the last place of 1.5 * 2^(e + 20),
// so that adding that and subtracting it rounds v, ties to even.
constexpr float kE4m3Normal = 0.015625f;
constexpr float kE4m3Shift = 1572864.0f;  // 1.5 * 2^20

// Some tokens of activations, side by side; S = G * spans_per_group spans.
struct Activations {
  int64_t stride;       // m: tokens that there is room for
  float* values;        // [S, m, 32]            exact mode: x as fp32, zero beyond the group; for E4M3 codes in the order 0 2 1 3, 4 6 5 7, ...
  int8_t* codes;        // [S / 2, m, 2, 32]     int8 mode, likewise
  uint16_t* wide;       // [S, 16, 32]           tiles: bfloat16 as they are, blocks of 16 tokens one after the other
  float* block_scales;  // [G * blocks_per_group, m]; of activations rounded to E4M3 [1, m], null where they are as they came
  int32_t* block_init;  // [G * blocks_per_group, m]  -code_offset * sum(codes): folds the constant zero point into the accumulator
  float* group_sums;    // [G, m]                sum of the (dequantized) activations: folds the zero point of each row
};

struct Shape {
  int64_t in_features;       // K
  int64_t out_features;      // N
  int64_t words;             // W
  int64_t group_size;
  int64_t groups;            // G
  int64_t spans_per_group;   // ceil(group_size / kSpan)
  int64_t blocks_per_group;  // ceil(group_size / kActBlock)
  int32_t bits;              // 2, 3, 4 or 8
};

struct PrepareParams {
  Shape shape;
  const void* x;  // [tokens, K]
  DType x_dtype;
  int64_t tokens;
  bool int8_activations;
  bool e4m3_codes;      // of the weight
  int32_t code_offset;  // subtracted from every code in int8 mode: 2^(bits-1), 128 for a codebook, 0 where each row has its own zero point
  Activations out;
};

struct LinearParams {
  Shape shape;
  const uint8_t* qweight;      // [N16, W, 16, 4]
  const void* scales;          // [N16, G, 16]
  const void* zeros;           // [N16, G, 16] or null
  const float* codebook;       // [16], or null; with 8 bits anything but null: codes are E4M3, groups are rows
  const uint8_t* codebook_u8;  // [16] codebook * 127 / max|codebook| + 128; int8 mode only
  float output_factor;         // max|codebook| / 127 in int8 mode with a codebook, else 1
  const void* bias;            // [N] or null
  DType scale_dtype;           // of scales and zeros
  DType bias_dtype;
  DType y_dtype;
  int32_t tokens;              // 1 .. max_tokens
  Activations x;
  void* y;                     // [tokens, N]
};

// Activations that are quantized over the whole row, to int8 (int8_body.h) or to E4M3 (e4m3_body.h).
struct QuantizeParams {
  Shape shape;               // 8 bits, one group
  const void* x;             // [tokens, K]
  DType x_dtype;
  int64_t tokens;            // m
  const float* input_scale;  // [1] for all tokens; null: one for each token, from its largest magnitude
  Activations out;           // int8: codes, block_scales [m], block_init [m]; E4M3: block_scales and one of the following, the others null:
                             // values, wide (up to kTileTokens), rows
  float* rows;               // [tokens, K] what the codes stand for
};

struct DequantizeParams {
  Shape shape;
  const uint8_t* qweight;  // [N16, W, 16, 4]
  const void* scales;      // [N16, G, 16]
  const void* zeros;       // [N16, G, 16] or null
  const float* codebook;   // as in LinearParams
  DType scale_dtype;
  DType y_dtype;
  void* y;                 // [N, K]
};

struct SpqrLinearParams;  // spqr.h
struct SpqrDequantizeParams;
struct RoundParams;  // rounding.h
struct SearchParams;
struct MomentParams;  // moments.h
struct NormParams;    // decode.h
struct RotateParams;
struct GateParams;
struct AttendParams;

// What one instruction set offers. prepare() covers groups [first, last), spqr_prepare() units, quantize() and quantize_e4m3() all tokens,
// round_columns() tiles of kTileRows rows, search_grid() groups of row blocks, rms_norm() rows, rotate() tokens, gate() chunks of rows, attend()
// key-value heads, the others row blocks.
struct Kernels {
  const char* name;
  int32_t max_tokens;
  int32_t spqr_max_tokens;
  void (*prepare)(const PrepareParams& params, int64_t first, int64_t last);
  void (*linear)(const LinearParams& params, int64_t first, int64_t last);  // activations in fp32
  void (*linear_int8)(const LinearParams& params, int64_t first, int64_t last);  // activations with scales for kActBlock columns
  void (*dequantize)(const DequantizeParams& params, int64_t first, int64_t last);
  void (*quantize)(const QuantizeParams& params);
  void (*quantize_e4m3)(const QuantizeParams& params);
  void (*int8_linear)(const LinearParams& params, int64_t first, int64_t last);  // with one for the whole row
  void (*spqr_prepare)(const SpqrLinearParams& params, int64_t first, int64_t last);
  void (*spqr_linear)(const SpqrLinearParams& params, int64_t first, int64_t last);
  void (*spqr_dequantize)(const SpqrDequantizeParams& params, int64_t first, int64_t last);
  void (*round_columns)(const RoundParams& params, float* scratch, int64_t first, int64_t last);
  void (*search_grid)(const SearchParams& params, float* scratch, int64_t first, int64_t last);
  void (*rms_norm)(const NormParams& params, int64_t first, int64_t last);
  void (*rotate)(const RotateParams& params, int64_t first, int64_t last);
  void (*gate)(const GateParams& params, int64_t first, int64_t last);
  void (*attend)(const AttendParams& params, float* scratch, int64_t first, int64_t last);
  // Null without matrix units. Many tokens with int8 activations in blocks of kTileTokens (stride), each as `Activations` has them and one after
  // the other; groups end with whole steps. Row blocks go in pairs; `scratch` holds
  // 16 KiB of weights and 4 KiB of sums for each 32 tokens.
  void (*tiles_linear)(const LinearParams& params, uint8_t* scratch, int64_t first_pair, int64_t last_pair) = nullptr;
  // Likewise with `x.wide`; groups end with whole spans. Row blocks go by kTilePairs pairs, which all
  // have sums in `scratch`.
  void (*tiles_bfloat16)(const LinearParams& params, uint8_t* scratch, int64_t first_task, int64_t last_task) = nullptr;
  // Likewise. Strips are packed, then tasks (kBand) multiplied.
  void (*pack_moment)(const MomentParams& params, int64_t first, int64_t last) = nullptr;
  void (*multiply_moment)(const MomentParams& params, int64_t first, int64_t last) = nullptr;
};

// Dot products of bytes: all else is that of the instruction set without them.
void avx2_vnni_linear_int8(const LinearParams& params, int64_t first, int64_t last);
void avx2_vnni_int8_linear(const LinearParams& params, int64_t first, int64_t last);
void avx512_vnni_linear_int8(const LinearParams& params, int64_t first, int64_t last);
void avx512_vnni_int8_linear(const LinearParams& params, int64_t first, int64_t last);

// The matrix units come with everything that AVX-512 VNNI needs.
void amx_tiles_linear(const LinearParams& params, uint8_t* scratch, int64_t first_pair, int64_t last_pair);
void amx_tiles_bfloat16(const LinearParams& params, uint8_t* scratch, int64_t first_task, int64_t last_task);
void amx_pack_moment(const MomentParams& params, int64_t first, int64_t last);
void amx_multiply_moment(const MomentParams& params, int64_t first, int64_t last);

extern const Kernels kGenericKernels;
extern const Kernels kNeonKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace hfq
