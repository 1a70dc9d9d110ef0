// The CPU kernels for groups with one scale, but for products of integers (int8_body.h). Included after rows16_parts.h, inside the same anonymous
// namespace.

// ---- activations ----

// Magnitudes as bit patterns order like the values and keep NaN largest.
inline I larger_magnitudes(I largest, const float* x) { return i_max(largest, i_max(i_magnitude(f_load(x)), i_magnitude(f_load(x + 16)))); }

inline float largest_magnitude(I bits) {
  alignas(64) int32_t lanes[16];
  i_store(lanes, bits);
  int32_t largest = 0;
  for (int j = 0; j < 16; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, 4);
  return magnitude;
}

// Codes nearest to x * inverse within -127..127, halves to even (of NaN, any of these); adds them to `sums`.
inline I round_span(I sums, const float* x, F inverse, int32_t* codes) {
  const I low = i_round_code(f_mul(f_load(x), inverse)), high = i_round_code(f_mul(f_load(x + 16), inverse));
  i_store(codes, low);
  i_store(codes + 16, high);
  return i_add(sums, i_add(low, high));
}

inline int32_t sum_of(I sums) {
  alignas(64) int32_t lanes[16];
  i_store(lanes, sums);
  int32_t sum = 0;
  for (int j = 0; j < 16; ++j) sum += lanes[j];
  return sum;
}

// Below this the reciprocal of a scale overflows: what is that small counts as zero.
constexpr float kLeastMagnitude = 1e-35f;

// Columns of one token to int8, symmetric, with one scale: x ~ codes * scale. NaN and infinity make the scale NaN or infinity, so they
// reach the output.
template <int BITS>
void prepare_int8(const PrepareParams& p, int64_t first, int64_t last) {
  const Shape& s = p.shape;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * s.group_size, end = smaller(begin + s.group_size, s.in_features);
      float group_sum = 0.0f;
      int64_t block = g * s.blocks_per_group, span = g * s.spans_per_group;
      for (int64_t k = begin; k < end; k += kActBlock, ++block) {
        const int64_t count = smaller(kActBlock, end - k);
        alignas(64) float values[kActBlock];
        I largest = i_set1(0);
        for (int64_t at = 0; at < count; at += kSpan) {
          load_columns(values + at, p.x, t * s.in_features + k + at, smaller(kSpan, count - at), p.x_dtype);
          largest = larger_magnitudes(largest, values + at);
        }
        const float amax = largest_magnitude(largest);
        const F inverse = f_set1(amax > kLeastMagnitude ? 127.0f / amax : 0.0f);  // not-a-number compares false
        I sums = i_set1(0);
        for (int64_t at = 0; at < count; at += kSpan, ++span) {
          alignas(64) int32_t codes[kSpan];
          sums = round_span(sums, values + at, inverse, codes);
          pack_codes<BITS>(codes_at(p.out, span, t), codes);
        }
        const int32_t sum = sum_of(sums);
        const float scale = amax > kLeastMagnitude || amax != amax ? amax * (1.0f / 127.0f) : 0.0f;
        p.out.block_scales[block * p.out.stride + t] = scale;
        p.out.block_init[block * p.out.stride + t] = -p.code_offset * sum;
        group_sum += scale * static_cast<float>(sum);
      }
      // A last group that is shorter: tiles have zeros there, and multiply them.
      for (; block < (g + 1) * s.blocks_per_group; ++block) p.out.block_scales[block * p.out.stride + t] = 0.0f;
      p.out.group_sums[g * p.out.stride + t] = group_sum;
    }
  }
}

// Columns of a span as e4m3_even and e4m3_odd give them.
inline void order_for_e4m3(float* span) {
  for (int64_t k = 0; k < kSpan; k += 4) {
    const float second = span[k + 1];
    span[k + 1] = span[k + 2];
    span[k + 2] = second;
  }
}

void prepare_exact(const PrepareParams& p, int64_t first, int64_t last) {
  const Shape& s = p.shape;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * s.group_size, end = smaller(begin + s.group_size, s.in_features);
      F sums = f_zero();
      float* out = p.out.values + (g * s.spans_per_group * p.out.stride + t) * kSpan;
      for (int64_t k = begin; k < end; k += kSpan, out += p.out.stride * kSpan) {
        load_columns(out, p.x, t * s.in_features + k, smaller(kSpan, end - k), p.x_dtype);
        sums = f_add(sums, f_add(f_load(out), f_load(out + 16)));
        if (p.e4m3_codes) order_for_e4m3(out);
      }
      alignas(64) float lanes[16];
      f_store(lanes, sums);
      for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      p.out.group_sums[g * p.out.stride + t] = lanes[0];
    }
  }
}

void prepare(const PrepareParams& p, int64_t first, int64_t last) {
  if (!p.int8_activations) return prepare_exact(p, first, last);
  switch (p.shape.bits) {
    case 2: return prepare_int8<2>(p, first, last);
    case 3: return prepare_int8<3>(p, first, last);
    case 4: return prepare_int8<4>(p, first, last);
    case 8: return prepare_int8<8>(p, first, last);
  }
}

// ---- activations with one scale for the whole row: of W8A8 (int8_body.h) and in E4M3 (e4m3_body.h) ----

// Writes the scale of one token, whose largest code is `most`, and gives what its activations are to be multiplied by. NaN or infinity
// anywhere in it makes the scale NaN, and with it all outputs. (To the bit like hfq/core/activations.py.)
inline float scale_token(const QuantizeParams& p, int64_t token, float most) {
  const int64_t at = token * p.shape.in_features;
  alignas(64) float values[kSpan];
  I largest = i_set1(0);
  for (int64_t k = 0; k < p.shape.in_features; k += kSpan) {
    load_columns(values, p.x, at + k, smaller(kSpan, p.shape.in_features - k), p.x_dtype);
    largest = larger_magnitudes(largest, values);
  }
  const float amax = largest_magnitude(largest);
  const bool finite = amax < __builtin_inff();
  float scale, inverse;
  if (p.input_scale) {
    scale = *p.input_scale;
    const bool usable = scale > kLeastMagnitude && scale < __builtin_inff();
    inverse = usable ? 1.0f / scale : 0.0f;
    if (!usable) scale = __builtin_nanf("");
  } else {
    const bool some = amax > kLeastMagnitude;
    scale = some ? amax / most : 0.0f;
    inverse = some && finite ? most / amax : 0.0f;
  }
  p.out.block_scales[token] = finite ? scale : __builtin_nanf("");
  return inverse;
}

// One token: its codes, its scale, -128 * the sum of its codes.
inline void quantize_token(const QuantizeParams& p, int64_t token) {
  const Shape& s = p.shape;
  const F inverse = f_set1(scale_token(p, token, 127.0f));
  alignas(64) float values[kSpan];
  I sums = i_set1(0);
  for (int64_t k = 0; k < s.in_features; k += kSpan) {
    alignas(64) int32_t codes[kSpan];
    load_columns(values, p.x, token * s.in_features + k, smaller(kSpan, s.in_features - k), p.x_dtype);
    sums = round_span(sums, values, inverse, codes);
    pack_codes<8>(codes_at(p.out, k / kSpan, token), codes);
  }
  p.out.block_init[token] = -128 * sum_of(sums);
}

void quantize(const QuantizeParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) quantize_token(p, token);
}

// ---- products in fp32 ----

// 32 columns times M tokens.
template <int M, Codes CODES, int PARTS>
inline void add_span(F (&sum)[PARTS][M], const uint8_t* line, const float* x, FloatTable table) {
  Line lines[lines_of(CODES)];
  each_column<kSpan>([&](auto column) {
    constexpr int i = decltype(column)::value;
    fetch_as_needed<CODES, i, kSpan>(lines, line);
    const F value = column_value<CODES, i>(lines, table);
    for (int m = 0; m < M; ++m) sum[i % PARTS][m] = f_fma(value, f_set1(x[m * kSpan + i]), sum[i % PARTS][m]);
  });
}

template <int M, Codes CODES>
void exact_product(const LinearParams& p, int64_t first, int64_t last) {
  constexpr int64_t kLines = lines_of(CODES);
  // A chain of dependent multiply-adds runs at one per 4 cycles: few tokens take several partial sums.
  constexpr int kParts = M >= 4 ? 1 : (M == 1 ? 4 : 2);
  const Shape& s = p.shape;
  const FloatTable table = float_table_load(p.codebook);
  alignas(64) uint8_t buffer[kLines * kLineBytes];
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* line = p.qweight + b * s.words * kLineBytes;
    F total[M];
    for (int m = 0; m < M; ++m) total[m] = f_zero();
    for (int64_t g = 0; g < s.groups; ++g) {
      F sum[kParts][M];
      for (int i = 0; i < kParts; ++i)
        for (int m = 0; m < M; ++m) sum[i][m] = f_zero();
      if constexpr (CODES != kTable) {
        const F zero = p.zeros ? f_load_as(p.zeros, (b * s.groups + g) * kRows, p.scale_dtype) : f_set1(static_cast<float>(1 << (s.bits - 1)));
        for (int m = 0; m < M; ++m) sum[0][m] = f_mul(zero, f_set1(-p.x.group_sums[g * M + m]));
      }
      int64_t words = words_of<CODES>(smaller(s.group_size, s.in_features - g * s.group_size));
      const float* x = p.x.values + g * s.spans_per_group * M * kSpan;
      for (; words > 0; words -= kLines, line += kLines * kLineBytes, x += M * kSpan) {
        add_span<M, CODES, kParts>(sum, whole_span<CODES>(buffer, line, words), x, table);
      }
      line += words * kLineBytes;  // back over what the last span lacked
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

void e4m3_linear(const LinearParams& p, int64_t first, int64_t last);  // e4m3_body.h

void linear(const LinearParams& p, int64_t first, int64_t last) {
  if (has_e4m3_codes(p)) return e4m3_linear(p, first, last);
  by_tokens_and_codes(p, [&](auto tokens, auto codes) { exact_product<decltype(tokens)::value, decltype(codes)::value>(p, first, last); });
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
  for (int64_t k = 0; k < columns; k += 16)
    store_first(y, k, dtype, f_mul(f_add(f_from_bytes(codes + k), f_set1(-zero)), f_set1(scale)), columns - k);
}

inline void dequantize_e4m3(uint8_t* y, const uint32_t* words, int64_t columns, float scale, DType dtype) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(words);
  const F factor = f_set1(scale * kE4m3Unit);
  for (int64_t k = 0; k < columns; k += 16) store_first(y, k, dtype, f_mul(f_from_e4m3(codes + k), factor), columns - k);
}

// 4 and 8 bits: words are brought into rows first, then unpacked along a row.
void dequantize_words(const DequantizeParams& p, int64_t first, int64_t last) {
  const Shape& s = p.shape;
  const int64_t columns = 32 / s.bits, size = element_size(p.y_dtype);
  const bool e4m3 = p.codebook && s.bits == 8;
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
          } else if (e4m3) {
            dequantize_e4m3(y, words_of + r * kChunk, here, scales[r], p.y_dtype);
          } else {
            dequantize_bytes(y, words_of + r * kChunk, here, scales[r], zeros[r], p.y_dtype);
          }
        }
      }
    }
  }
}

// 2 and 3 bits: unpacked to float as for a product, then brought into rows.
template <Codes CODES>
void dequantize_spans(const DequantizeParams& p, int64_t first, int64_t last) {
  constexpr int64_t kLines = lines_of(CODES);
  const Shape& s = p.shape;
  for (int64_t b = first; b < last; ++b) {
    const int64_t rows = smaller(kRows, s.out_features - b * kRows);
    const uint8_t* line = p.qweight + b * s.words * kLineBytes;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t at = (b * s.groups + g) * kRows, end = smaller((g + 1) * s.group_size, s.in_features);
      const F scale = f_load_as(p.scales, at, p.scale_dtype);
      const F zero = p.zeros ? f_mul(f_load_as(p.zeros, at, p.scale_dtype), f_set1(-1.0f)) : f_set1(-static_cast<float>(1 << (s.bits - 1)));
      int64_t words = words_of<CODES>(end - g * s.group_size);
      for (int64_t k = g * s.group_size; words > 0; k += kSpan, words -= kLines, line += kLines * kLineBytes) {
        Line lines[kLines];
        load_span<CODES>(lines, line, words);
        alignas(64) float lanes[kSpan * 16];  // [32 columns, 16 rows]
        each_column<kSpan>([&](auto column) {
          constexpr int i = decltype(column)::value;
          f_store(lanes + 16 * i, f_mul(f_add(column_value<CODES, i>(lines, FloatTable{}), zero), scale));
        });
        for (int64_t half = 0; half < kSpan && k + half < end; half += 16) {
          alignas(64) uint32_t values[16 * 16];  // [16 rows, 16 columns]
          transpose_words(values, reinterpret_cast<const uint8_t*>(lanes + 16 * half), 16);
          for (int64_t r = 0; r < rows; ++r) {
            alignas(64) float row[16];
            __builtin_memcpy(row, values + 16 * r, 64);
            store_first(p.y, (b * kRows + r) * s.in_features + k + half, p.y_dtype, f_load(row), end - k - half);
          }
        }
      }
      line += words * kLineBytes;  // back over what the last span lacked
    }
  }
}

void dequantize(const DequantizeParams& p, int64_t first, int64_t last) {
  switch (p.shape.bits) {
    case 2: return dequantize_spans<kPairs>(p, first, last);
    case 3: return dequantize_spans<kPlanes>(p, first, last);
    default: return dequantize_words(p, first, last);
  }
}
