// What kernels on layout rows16 share, written once over 16 lanes. Included inside the anonymous namespace of each instruction set's file,
// after that file has defined the primitives, so every copy has internal linkage (see rows16.h for why).
//
// Primitives: types F (16 floats), I (16 int32), Line (64 bytes), Table (16 entries), SmallSum, Part, Lanes; functions
//   f_zero f_set1 f_load f_store f_mul f_fma f_from_i i_set1 i_add     lanes
//   i_max i_store i_magnitude i_round_code                             activations: |x| as ordered bits; to -127..127, halves to even
//   f_load_as f_store_as                                               16 contiguous values of a DType
//   pack_codes<bits>                                                   32 int32 to bytes, in the order of a span (rows16.h)
//   line_load low_nibbles high_nibbles table_load table_lookup         codes as bytes
//   line_zero line_or line_and line_right<n> line_left<n>              words of 16 rows
//   field_value<shift, bits> table_value<i> byte_value<i>              some bits of every word as float
//   f_from_bytes transpose_words lookup_words                          dequantization
//   part_zero part_load part_larger l_nan_where_full                   a Part, one register of bytes; bytes max(a, codes | 128); NaN in 32-bit lanes
//                                                                      with a byte of 255, else 0
//   e4m3_even e4m3_odd l_join l_pair                                   1/256 of codes 0 and 2, or 1 and 3, of each row of a part, side by side: two
//                                                                      Lanes (a register of floats); sums of neighbours; p[0] p[1] p[0] ...
//   l_zero l_add l_fma l_store                                         Lanes
//   f_from_e4m3 f_to_e4m3                                              1/256 of 16 codes, or NaN; nearest E4M3, saturating, of NaN any number
//   small_begin small_dot small_end                                    int8 dot products of codes 0..15, at most kSpan columns
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

// A span of columns [begin, begin + count) of one token as fp32, zeros beyond.
inline void load_columns(float* out, const void* x, int64_t begin, int64_t count, DType dtype) {
  if (count >= kSpan) {
    f_store(out, f_load_as(x, begin, dtype));
    f_store(out + 16, f_load_as(x, begin + 16, dtype));
    return;
  }
  for (int64_t k = 0; k < kSpan; ++k) out[k] = k < count ? load_scalar(x, begin + k, dtype) : 0.0f;
}

// The first `count` of 16 values to y[at], y[at + 1], ...
inline void store_first(void* y, int64_t at, DType dtype, F values, int64_t count) {
  if (count >= 16) return f_store_as(y, at, dtype, values);
  alignas(64) uint8_t bytes[64];
  f_store_as(bytes, 0, dtype, values);
  const int64_t size = element_size(dtype);
  __builtin_memcpy(static_cast<uint8_t*>(y) + at * size, bytes, static_cast<size_t>(count * size));
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
  f_store(lanes, value);
  if (p.bias)
    for (int64_t r = 0; r < rows; ++r) lanes[r] += load_scalar(p.bias, row + r, p.bias_dtype);
  store_first(p.y, at, p.y_dtype, f_load(lanes), rows);
}

inline bool has_e4m3_codes(const LinearParams& p) { return p.codebook && p.shape.bits == 8; }

// Outputs of one token from sums of products with 1/256 of E4M3 codes.
inline void store_e4m3(const LinearParams& p, int64_t block, int64_t token, F sum) {
  F factor = f_load_as(p.scales, block * kRows, p.scale_dtype);
  if (p.x.block_scales) factor = f_mul(f_set1(p.x.block_scales[token]), factor);
  store_outputs(p, block, token, f_mul(sum, f_mul(factor, f_set1(kE4m3Unit))));
}

// ---- codes ----

// A number that is known when the code is compiled.
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

// 2-bit integers; 3-bit integers as planes of two bits and of one; 4-bit integers; a 4-bit codebook; 8-bit integers.
enum Codes { kPairs, kPlanes, kNibbles, kTable, kBytes };

// Words, and so lines, of a span.
constexpr int lines_of(Codes codes) { return codes == kPairs ? 2 : codes == kPlanes ? 3 : codes == kBytes ? 8 : 4; }

// Words of a row that hold so many columns.
template <Codes CODES>
inline int64_t words_of(int64_t columns) {
  if (CODES == kPlanes) return (columns + kSpan - 1) / kSpan * 3;  // whole spans
  constexpr int64_t kColumns = kSpan / lines_of(CODES);
  return (columns + kColumns - 1) / kColumns;
}

// Weights come from memory, once. Asking for each line 4 KiB ahead, into the L2 cache, keeps more reads in flight than the hardware
// prefetcher does: measured (2 cores, int4 M=1) 14.2 GB/s without, 18.7 with 2 KiB into L1, 21.8 so; the read bandwidth was 23.
inline Line fetch(const uint8_t* line) {
  __builtin_prefetch(line + 4096, 0, 2);
  return line_load(line);
}

// The lines of a span of which the first `count` exist.
template <Codes CODES>
inline void load_span(Line* lines, const uint8_t* from, int64_t count) {
  constexpr int kLines = lines_of(CODES);
  if (count >= kLines)
    for (int i = 0; i < kLines; ++i) lines[i] = fetch(from + i * kLineBytes);
  else
    for (int i = 0; i < kLines; ++i) lines[i] = i < count ? line_load(from + i * kLineBytes) : line_zero();
}

// The lines of a span as they are needed: for step i of `steps`, in each of which as many codes are used up. Loading all of them first would
// fill the registers of AVX2.
template <Codes CODES, int i, int steps>
inline void fetch_as_needed(Line* lines, const uint8_t* from) {
  constexpr int kDense = CODES == kPlanes ? 2 : lines_of(CODES), kSteps = steps / kDense;
  if constexpr (CODES == kPlanes && i == 0) lines[2] = fetch(from + 2 * kLineBytes);
  if constexpr (i % kSteps == 0) lines[i / kSteps] = fetch(from + i / kSteps * kLineBytes);
}

// A span of which the first `count` lines exist, filled up with zeros where that is not all: so that products know whole spans only.
template <Codes CODES>
inline const uint8_t* whole_span(uint8_t* buffer, const uint8_t* from, int64_t count) {
  constexpr int64_t kLines = lines_of(CODES);
  if (count >= kLines) return from;
  __builtin_memset(buffer, 0, static_cast<size_t>(kLines * kLineBytes));
  __builtin_memcpy(buffer, from, static_cast<size_t>(count * kLineBytes));
  return buffer;
}

// body(Column<M>) for M = tokens, 1 to kMaxTokens.
template <int M = 1, class Body>
inline void by_tokens(int64_t tokens, const Body& body) {
  if (tokens == M) return body(Column<M>{});
  if constexpr (M < kMaxTokens) by_tokens<M + 1>(tokens, body);
}

template <Codes CODES>
struct CodesOf {
  static constexpr Codes value = CODES;
};

// body(Column<M>, CodesOf<...>) for the tokens of a call and the codes of its weight.
template <class Body>
inline void by_tokens_and_codes(const LinearParams& p, const Body& body) {
  by_tokens(p.tokens, [&](auto m) {
    switch (p.shape.bits) {
      case 2: return body(m, CodesOf<kPairs>{});
      case 3: return body(m, CodesOf<kPlanes>{});
      case 4: return p.codebook ? body(m, CodesOf<kTable>{}) : body(m, CodesOf<kNibbles>{});
      case 8: return body(m, CodesOf<kBytes>{});
    }
  });
}

template <int n>
inline Line line_shift(Line v) {  // to the right, or by -n to the left
  if constexpr (n > 0) return line_right<n>(v);
  else if constexpr (n < 0) return line_left<-n>(v);
  else return v;
}

// Codes of the four columns of quad q, one in each byte.
template <Codes CODES, int q>
inline Line quad(const Line* lines, Table table) {
  if constexpr (CODES == kBytes) {
    return lines[q];
  } else if constexpr (CODES == kNibbles) {
    return q % 2 ? high_nibbles(lines[q / 2]) : low_nibbles(lines[q / 2]);
  } else if constexpr (CODES == kTable) {
    return table_lookup(table, q % 2 ? high_nibbles(lines[q / 2]) : low_nibbles(lines[q / 2]));
  } else {
    const Line low = line_and(line_shift<2 * (q % 4)>(lines[q / 4]), 0x03030303u);
    if constexpr (CODES == kPairs) return low;
    else return line_or(low, line_and(line_shift<q - 2>(lines[2]), 0x04040404u));
  }
}

// Code of column i of a span, or what the codebook has for it.
template <Codes CODES, int i>
inline F column_value(const Line* lines, FloatTable table) {
  if constexpr (CODES == kBytes) return byte_value<i % 4>(lines[i / 4]);
  else if constexpr (CODES == kNibbles) return field_value<4 * (i % 8), 4>(lines[i / 8]);
  else if constexpr (CODES == kTable) return table_value<i % 8>(lines[i / 8], table);
  else if constexpr (CODES == kPairs) return field_value<2 * (i % 16), 2>(lines[i / 16]);
  else {
    // Column 16 h + 4 b + j: its upper bit is bit 4 h + j of byte b.
    constexpr int h = i / 16, b = i % 16 / 4, j = i % 4;
    return f_fma(field_value<8 * b + 4 * h + j, 1>(lines[2]), f_set1(4.0f), field_value<2 * (i % 16), 2>(lines[h]));
  }
}

// ---- activations ----

// The codes of one span of one token.
inline int8_t* codes_at(const Activations& x, int64_t span, int64_t token) {
  return x.codes + (span / 2 * x.stride + token) * kStepBytes + span % 2 * kSpan;
}

inline uint32_t load_word(const int8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
