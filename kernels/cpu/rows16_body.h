// The CPU kernels, written once over 16 lanes. Included inside the anonymous namespace of each instruction set's file, after that file
// has defined the primitives, so every copy has internal linkage (see rows16.h for why).
//
// Primitives: types F (16 floats), I (16 int32), Line (64 bytes), Table (16 entries), SmallSum; functions
//   f_zero f_set1 f_load f_store f_mul f_fma f_from_i i_set1           lanes
//   f_load_as f_store_as                                               16 contiguous values of a DType
//   pack_codes<interleave>                                             32 int32 to bytes; columns 0 2 4 6 1 3 5 7 of each 8 if interleaved
//   line_load low_nibbles high_nibbles table_load table_lookup         codes as bytes
//   nibble_value<i> table_value<i> byte_value<i>                       code i of every word as float
//   f_from_bytes transpose_words lookup_words                          dequantization
//   small_begin small_dot small_end                                    int8 dot products of codes 0..15, at most kActBlock columns
//   byte_dot                                                           int8 dot products of codes 0..255
//   kMaxTokens                                                         tokens per pass that fit the register file
//   kRowBlocks                                                         row blocks that one pass of int8_linear takes side by side

// ---- reading and writing scales, activations and outputs ----

inline float load_scalar(const void* p, int64_t i, DType dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  if (dtype == kBFloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    __builtin_memcpy(&f, &wide, 4);
    return f;
  }
  return half_to_float(bits);
}

inline int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A block of columns [begin, begin + count) of one token as fp32, zeros beyond.
inline void load_columns(float* out, const void* x, int64_t begin, int64_t count, DType dtype) {
  if (count >= kActBlock) {
    f_store(out, f_load_as(x, begin, dtype));
    f_store(out + 16, f_load_as(x, begin + 16, dtype));
    return;
  }
  for (int64_t k = 0; k < kActBlock; ++k) out[k] = k < count ? load_scalar(x, begin + k, dtype) : 0.0f;
}

// 16 outputs of one token: rows beyond N and bias are handled here, once per row block.
inline void store_outputs(const LinearParams& p, int64_t block, int64_t token, F value) {
  const int64_t row = block * kRows, rows = smaller(kRows, p.shape.out_features - row);
  const int64_t at = token * p.shape.out_features + row;
  if (rows == kRows) {
    if (p.bias) value = f_add(value, f_load_as(p.bias, row, p.bias_dtype));
    f_store_as(p.y, at, p.y_dtype, value);
    return;
  }
  alignas(64) float lanes[16];
  alignas(64) uint8_t bytes[64];
  f_store(lanes, value);
  if (p.bias)
    for (int64_t r = 0; r < rows; ++r) lanes[r] += load_scalar(p.bias, row + r, p.bias_dtype);
  f_store_as(bytes, 0, p.y_dtype, f_load(lanes));
  const int64_t size = element_size(p.y_dtype);
  __builtin_memcpy(static_cast<uint8_t*>(p.y) + at * size, bytes, static_cast<size_t>(rows * size));
}

// ---- activations ----

// The largest magnitude of a block as bit pattern: these order like the values and keep NaN largest.
inline uint32_t largest_bits(const float* x) {
  uint32_t largest = 0;
  for (int k = 0; k < kActBlock; ++k) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + k, 4);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Codes nearest to x * inverse within -127..127, halves to even; returns their sum.
inline int32_t round_block(const float* x, float inverse, int32_t* codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round-to-nearest-even in the low mantissa bits
  int32_t total = 0;
  for (int k = 0; k < kActBlock; ++k) {
    // The clamp comes before the sum, where it also keeps the two from becoming one operation that rounds once.
    float value = x[k] * inverse;
    value = value > 127.0f ? 127.0f : value;
    value = value < -127.0f ? -127.0f : value;
    const float shifted = value + kRound;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    int32_t code = bits - 0x4b400000;
    code = code > 127 ? 127 : code;  // only NaN reaches these clamps; they keep vpmaddubsw within 16 bits
    code = code < -127 ? -127 : code;
    codes[k] = code;
    total += code;
  }
  return total;
}

// Below this the reciprocal of a scale overflows: what is that small counts as zero.
constexpr float kLeastMagnitude = 1e-35f;

// One block of at most 32 columns to int8, symmetric: x ~ codes * scale. Returns the scale; NaN and infinity make it NaN or infinity,
// so they reach the output.
inline float quantize_block(const float* x, int32_t* codes, int32_t* sum) {
  const uint32_t largest = largest_bits(x);
  float amax;
  __builtin_memcpy(&amax, &largest, 4);
  // Not-a-number compares false and gets codes 0, scale NaN.
  *sum = round_block(x, amax > kLeastMagnitude ? 127.0f / amax : 0.0f, codes);
  return amax > kLeastMagnitude || amax != amax ? amax * (1.0f / 127.0f) : 0.0f;
}

template <int COLUMNS>  // columns per word: 8 or 4
void prepare_int8(const PrepareParams& p, int64_t first, int64_t last) {
  const Shape& s = p.shape;
  const int64_t m = p.tokens;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * s.group_size, end = smaller(begin + s.group_size, s.in_features);
      float group_sum = 0.0f;
      int64_t block = g * s.blocks_per_group;
      for (int64_t k = begin; k < end; k += kActBlock, ++block) {
        alignas(64) float values[kActBlock];
        alignas(64) int32_t codes[kActBlock];
        alignas(64) int8_t bytes[kActBlock];
        int32_t sum;
        load_columns(values, p.x, t * s.in_features + k, smaller(kActBlock, end - k), p.x_dtype);
        const float scale = quantize_block(values, codes, &sum);
        pack_codes<COLUMNS == 8>(bytes, codes);
        p.out.block_scales[block * m + t] = scale;
        p.out.block_init[block * m + t] = -p.code_offset * sum;
        group_sum += scale * static_cast<float>(sum);
        const int64_t words = smaller((end - k + COLUMNS - 1) / COLUMNS, kActBlock / COLUMNS);
        int8_t* out = p.out.codes + ((k / COLUMNS) * m + t) * COLUMNS;
        for (int64_t w = 0; w < words; ++w) __builtin_memcpy(out + w * m * COLUMNS, bytes + w * COLUMNS, COLUMNS);
      }
      p.out.group_sums[g * m + t] = group_sum;
    }
  }
}

template <int COLUMNS>
void prepare_exact(const PrepareParams& p, int64_t first, int64_t last) {
  const Shape& s = p.shape;
  const int64_t m = p.tokens;
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * s.group_size, end = smaller(begin + s.group_size, s.in_features);
      F sums = f_zero();
      for (int64_t k = begin; k < end; k += kActBlock) {
        alignas(64) float values[kActBlock];
        load_columns(values, p.x, t * s.in_features + k, smaller(kActBlock, end - k), p.x_dtype);
        sums = f_add(sums, f_add(f_load(values), f_load(values + 16)));
        const int64_t words = smaller((end - k + COLUMNS - 1) / COLUMNS, kActBlock / COLUMNS);
        float* out = p.out.values + ((k / COLUMNS) * m + t) * COLUMNS;
        for (int64_t w = 0; w < words; ++w) __builtin_memcpy(out + w * m * COLUMNS, values + w * COLUMNS, 4 * COLUMNS);
      }
      alignas(64) float lanes[16];
      f_store(lanes, sums);
      for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      p.out.group_sums[g * m + t] = lanes[0];
    }
  }
}

void prepare(const PrepareParams& p, int64_t first, int64_t last) {
  if (p.int8_activations)
    p.shape.bits == 4 ? prepare_int8<8>(p, first, last) : prepare_int8<4>(p, first, last);
  else
    p.shape.bits == 4 ? prepare_exact<8>(p, first, last) : prepare_exact<4>(p, first, last);
}

// ---- products ----

template <int i>
struct Column {
  static constexpr int value = i;
};

// body(Column<0>), ..., body(Column<n-1>): shifts and lane numbers must be constants.
template <int n, int i = 0, class Body>
inline __attribute__((always_inline)) void each_column(const Body& body) {
  body(Column<i>{});
  if constexpr (i + 1 < n) each_column<n, i + 1>(body);
}

enum Codes { kNibbles, kTable, kBytes };  // 4-bit integers, 4-bit codebook, 8-bit integers

// Weights come from memory, once. Asking for each line 4 KiB ahead, into the L2 cache, keeps more reads in flight than the hardware
// prefetcher does: measured (2 cores, int4 M=1) 14.2 GB/s without, 18.7 with 2 KiB into L1, 21.8 so; the read bandwidth was 23.
inline Line fetch(const uint8_t* line) {
  __builtin_prefetch(line + 4096, 0, 2);
  return line_load(line);
}

inline uint32_t load_word(const int8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

template <int M, Codes CODES>
void linear_int8(const LinearParams& p, int64_t first, int64_t last) {
  constexpr int kColumns = CODES == kBytes ? 4 : 8;
  const Shape& s = p.shape;
  const Table table = table_load(p.codebook_u8);
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* line = p.qweight + b * s.words * kLineBytes;
    const int8_t* x = p.x.codes;
    F total[M];
    for (int m = 0; m < M; ++m) total[m] = f_zero();
    for (int64_t g = 0; g < s.groups; ++g) {
      F sum[M];
      for (int m = 0; m < M; ++m) sum[m] = f_zero();
      if (p.zeros) {
        const F zero = f_load_as(p.zeros, (b * s.groups + g) * kRows, p.scale_dtype);
        for (int m = 0; m < M; ++m) sum[m] = f_mul(zero, f_set1(-p.x.group_sums[g * M + m]));
      }
      int64_t words = smaller(s.group_size / kColumns + (s.group_size % kColumns != 0), s.words - g * (s.group_size / kColumns));
      for (int64_t block = g * s.blocks_per_group; words > 0; ++block, words -= kActBlock / kColumns) {
        const int64_t count = smaller(words, kActBlock / kColumns);
        const int32_t* init = p.x.block_init + block * M;
        I dot[M];
        if constexpr (CODES == kNibbles) {
          SmallSum small[M];
          for (int m = 0; m < M; ++m) small[m] = small_begin(init[m]);
          for (int64_t w = 0; w < count; ++w, line += kLineBytes, x += M * 8) {
            const Line codes = fetch(line);
            const Line even = low_nibbles(codes), odd = high_nibbles(codes);
            for (int m = 0; m < M; ++m) {
              small[m] = small_dot(small[m], even, load_word(x + 8 * m));
              small[m] = small_dot(small[m], odd, load_word(x + 8 * m + 4));
            }
          }
          for (int m = 0; m < M; ++m) dot[m] = small_end(small[m], init[m]);
        } else {
          for (int m = 0; m < M; ++m) dot[m] = i_set1(init[m]);
          for (int64_t w = 0; w < count; ++w, line += kLineBytes, x += M * kColumns) {
            const Line codes = fetch(line);
            if constexpr (CODES == kTable) {
              const Line even = table_lookup(table, low_nibbles(codes)), odd = table_lookup(table, high_nibbles(codes));
              for (int m = 0; m < M; ++m) {
                dot[m] = byte_dot(dot[m], even, load_word(x + 8 * m));
                dot[m] = byte_dot(dot[m], odd, load_word(x + 8 * m + 4));
              }
            } else {
              for (int m = 0; m < M; ++m) dot[m] = byte_dot(dot[m], codes, load_word(x + 4 * m));
            }
          }
        }
        const float* scales = p.x.block_scales + block * M;
        for (int m = 0; m < M; ++m) sum[m] = f_fma(f_from_i(dot[m]), f_set1(scales[m]), sum[m]);
      }
      const F scale = f_load_as(p.scales, (b * s.groups + g) * kRows, p.scale_dtype);
      for (int m = 0; m < M; ++m) total[m] = f_fma(sum[m], scale, total[m]);
    }
    for (int m = 0; m < M; ++m) store_outputs(p, b, m, f_mul(total[m], f_set1(p.output_factor)));
  }
}

template <int M, Codes CODES>
void linear_exact(const LinearParams& p, int64_t first, int64_t last) {
  constexpr int kColumns = CODES == kBytes ? 4 : 8;
  // A chain of dependent multiply-adds runs at one per 4 cycles: few tokens take several partial sums.
  constexpr int kParts = M >= 4 ? 1 : (M == 1 ? 4 : 2);
  const Shape& s = p.shape;
  const FloatTable table = float_table_load(p.codebook);
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* line = p.qweight + b * s.words * kLineBytes;
    const float* x = p.x.values;
    F total[M];
    for (int m = 0; m < M; ++m) total[m] = f_zero();
    for (int64_t g = 0; g < s.groups; ++g) {
      F sum[kParts][M];
      for (int i = 0; i < kParts; ++i)
        for (int m = 0; m < M; ++m) sum[i][m] = f_zero();
      if constexpr (CODES != kTable) {
        const F zero = p.zeros ? f_load_as(p.zeros, (b * s.groups + g) * kRows, p.scale_dtype) : f_set1(CODES == kBytes ? 128.0f : 8.0f);
        for (int m = 0; m < M; ++m) sum[0][m] = f_mul(zero, f_set1(-p.x.group_sums[g * M + m]));
      }
      const int64_t words = smaller(s.group_size / kColumns + (s.group_size % kColumns != 0), s.words - g * (s.group_size / kColumns));
      for (int64_t w = 0; w < words; ++w, line += kLineBytes, x += M * kColumns) {
        const Line codes = fetch(line);
        each_column<kColumns>([&](auto column) {
          constexpr int i = decltype(column)::value;
          F value;
          if constexpr (CODES == kBytes)
            value = byte_value<i>(codes);
          else if constexpr (CODES == kTable)
            value = table_value<i>(codes, table);
          else
            value = nibble_value<i>(codes, table);
          for (int m = 0; m < M; ++m) sum[i % kParts][m] = f_fma(value, f_set1(x[m * kColumns + i]), sum[i % kParts][m]);
        });
      }
      const F scale = f_load_as(p.scales, (b * s.groups + g) * kRows, p.scale_dtype);
      for (int m = 0; m < M; ++m) {
        F group = sum[0][m];
        for (int i = 1; i < kParts; ++i) group = f_add(group, sum[i][m]);
        total[m] = f_fma(group, scale, total[m]);
      }
    }
    for (int m = 0; m < M; ++m) store_outputs(p, b, m, total[m]);
  }
}

template <int M>
void linear_tokens(const LinearParams& p, int64_t first, int64_t last) {
  if constexpr (M > kMaxTokens) {
    return;
  } else if (p.int8_activations) {
    if (p.shape.bits == 8) return linear_int8<M, kBytes>(p, first, last);
    return p.codebook ? linear_int8<M, kTable>(p, first, last) : linear_int8<M, kNibbles>(p, first, last);
  } else {
    if (p.shape.bits == 8) return linear_exact<M, kBytes>(p, first, last);
    return p.codebook ? linear_exact<M, kTable>(p, first, last) : linear_exact<M, kNibbles>(p, first, last);
  }
}

void linear(const LinearParams& p, int64_t first, int64_t last) {
  switch (p.tokens) {
    case 1: return linear_tokens<1>(p, first, last);
    case 2: return linear_tokens<2>(p, first, last);
    case 3: return linear_tokens<3>(p, first, last);
    case 4: return linear_tokens<4>(p, first, last);
    case 5: return linear_tokens<5>(p, first, last);
    case 6: return linear_tokens<6>(p, first, last);
    case 7: return linear_tokens<7>(p, first, last);
    case 8: return linear_tokens<8>(p, first, last);
  }
}

// ---- dequantization ----

constexpr int64_t kChunk = 16;  // words of a row unpacked at a time

// Values of 4-bit codes are looked up among the 16 possible values of this row and group, already rounded to the output type.
inline void dequantize_nibbles(uint8_t* y, const uint32_t* words, int64_t columns, F values, DType dtype) {
  const int64_t whole = columns / 8, size = element_size(dtype);
  lookup_words(y, words, whole, values, dtype);
  if (columns % 8 == 0) return;
  alignas(64) uint8_t last[128];
  lookup_words(last, words + whole, 1, values, dtype);
  __builtin_memcpy(y + whole * 8 * size, last, static_cast<size_t>((columns % 8) * size));
}

inline void dequantize_bytes(uint8_t* y, const uint32_t* words, int64_t columns, float scale, float zero, DType dtype) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(words);
  const int64_t size = element_size(dtype);
  for (int64_t k = 0; k < columns; k += 16) {
    const F values = f_mul(f_add(f_from_bytes(codes + k), f_set1(-zero)), f_set1(scale));
    if (columns - k >= 16) {
      f_store_as(y, k, dtype, values);
    } else {
      alignas(64) uint8_t out[64];
      f_store_as(out, 0, dtype, values);
      __builtin_memcpy(y + k * size, out, static_cast<size_t>((columns - k) * size));
    }
  }
}

void dequantize(const DequantizeParams& p, int64_t first, int64_t last) {
  const Shape& s = p.shape;
  const int64_t columns = 32 / s.bits, size = element_size(p.y_dtype);
  alignas(64) float scales[16], zeros[16], codes[16];
  for (int j = 0; j < 16; ++j) codes[j] = p.codebook ? p.codebook[j] : static_cast<float>(j);
  for (int64_t b = first; b < last; ++b) {
    const int64_t rows = smaller(kRows, s.out_features - b * kRows);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t at = (b * s.groups + g) * kRows;
      f_store(scales, f_load_as(p.scales, at, p.scale_dtype));
      f_store(zeros, p.zeros ? f_load_as(p.zeros, at, p.scale_dtype) : f_set1(p.codebook ? 0.0f : s.bits == 4 ? 8.0f : 128.0f));
      const int64_t end = smaller((g + 1) * s.group_size, s.in_features);
      for (int64_t k = g * s.group_size; k < end; k += kChunk * columns) {
        const int64_t here = smaller(kChunk * columns, end - k), words = (here + columns - 1) / columns;
        alignas(64) uint32_t words_of[16 * kChunk];  // [16, kChunk]
        transpose_words(words_of, p.qweight + (b * s.words + k / columns) * kLineBytes, words);
        for (int64_t r = 0; r < rows; ++r) {
          uint8_t* y = static_cast<uint8_t*>(p.y) + ((b * kRows + r) * s.in_features + k) * size;
          if (s.bits == 4) {
            const F values = f_mul(f_add(f_load(codes), f_set1(-zeros[r])), f_set1(scales[r]));
            dequantize_nibbles(y, words_of + r * kChunk, here, values, p.y_dtype);
          } else {
            dequantize_bytes(y, words_of + r * kChunk, here, scales[r], zeros[r], p.y_dtype);
          }
        }
      }
    }
  }
}
