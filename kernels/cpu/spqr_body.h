// Kernels of format "spqr", written once over 16 lanes; lane = row. Included after rows16_body.h, inside the same anonymous namespace.
//
// Primitives beside those of rows16_body.h:
//   line_zero line_or line_and          words of 16 rows
//   line_right<n> line_left<n>          shifts by a constant
//   line_right line_left                shifts by a number
//   f_from_line                         words as integers to float
//   kSpqrTokens                         tokens per pass: kernels are unrolled over 32 columns for every number of bits, slow to compile

// ---- one block of 16 rows ----

// Code i of a unit whose words are lines[0] .. lines[BITS - 1]. Codes of 3 bits may lie across two words.
template <int BITS, int i>
inline F unit_value(const Line* lines) {
  constexpr int word = i * BITS / 32, shift = i * BITS % 32;
  Line code = shift ? line_right<shift>(lines[word]) : lines[word];
  if constexpr (shift + BITS > 32) code = line_or(code, line_left<32 - shift>(lines[word + 1]));
  return f_from_line(shift + BITS == 32 ? code : line_and(code, (1u << BITS) - 1));
}

template <int BITS>
inline void load_unit(Line* lines, const uint8_t* block, int64_t unit, int64_t words) {
  for (int j = 0; j < BITS; ++j) {
    const int64_t word = unit * BITS + j;
    lines[j] = word < words ? fetch(block + word * kLineBytes) : line_zero();
  }
}

struct RowGrid {
  F scale, zero;
};

// Scales and zero points of group g, from their codes.
inline RowGrid decode_stats(const SpqrWeight& w, int64_t block, int64_t g) {
  const int64_t bit = 2 * w.stat_bits * g;
  const int shift = static_cast<int>(bit % 32);
  const uint8_t* line = w.stat_codes + (block * w.stat_words + bit / 32) * kLineBytes;
  Line codes = line_right(line_load(line), shift);
  if (shift + 2 * w.stat_bits > 32) codes = line_or(codes, line_left(line_load(line + kLineBytes), 32 - shift));
  const uint32_t mask = (1u << w.stat_bits) - 1;
  const int64_t at = (block * kRows / w.rows_per_stat * w.groups + g) * 4;
  const F step = f_set1(load_scalar(w.stats, at, w.stat_dtype)), offset = f_set1(load_scalar(w.stats, at + 1, w.stat_dtype));
  const F zero_step = f_set1(load_scalar(w.stats, at + 2, w.stat_dtype)), zero_offset = f_set1(load_scalar(w.stats, at + 3, w.stat_dtype));
  return {f_fma(f_from_line(line_and(codes, mask)), step, offset),
          f_fma(f_from_line(line_and(line_right(codes, w.stat_bits), mask)), zero_step, zero_offset)};
}

// ---- outliers ----

struct Span {
  int64_t begin, end;
};

// Checkpoints are checked when they are loaded; a wrong index must not leave the buffers even so.
inline Span outliers_of(const SpqrWeight& w, int64_t row) {
  const int64_t begin = w.offsets[row] < 0 ? 0 : w.offsets[row];
  return {begin, smaller(w.offsets[row + 1], w.outliers)};
}

inline int64_t outlier_column(const SpqrWeight& w, int64_t i) {
  return w.wide_columns ? static_cast<const int32_t*>(w.columns)[i] : static_cast<const int16_t*>(w.columns)[i];
}

template <int M>
inline void add_outliers(const SpqrLinearParams& p, int64_t block, F* total) {
  const SpqrWeight& w = p.weight;
  const int64_t rows = smaller(kRows, w.out_features - block * kRows);
  alignas(64) float sums[M][16] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const Span span = outliers_of(w, block * kRows + r);
    float sum[M] = {};
    for (int64_t i = span.begin; i < span.end; ++i) {
      const int64_t k = outlier_column(w, i);
      if (static_cast<uint64_t>(k) >= static_cast<uint64_t>(w.in_features)) continue;
      const float value = load_scalar(w.values, i, w.stat_dtype);
      const float* x = p.values + (k / kUnit * M) * kUnit + k % kUnit;
      for (int m = 0; m < M; ++m) sum[m] += value * x[m * kUnit];
    }
    for (int m = 0; m < M; ++m) sums[m][r] = sum[m];
  }
  for (int m = 0; m < M; ++m) total[m] = f_add(total[m], f_load(sums[m]));
}

// ---- products ----

// Units [first, last) of x to fp32.
void spqr_prepare(const SpqrLinearParams& p, int64_t first, int64_t last) {
  const int64_t columns = p.weight.in_features;
  for (int64_t u = first; u < last; ++u)
    for (int64_t t = 0; t < p.tokens; ++t)
      load_columns(p.values + (u * p.tokens + t) * kUnit, p.x, t * columns + u * kUnit, smaller(kUnit, columns - u * kUnit), p.x_dtype);
}

template <int BITS, int M>
void spqr_linear_tokens(const SpqrLinearParams& p, int64_t first, int64_t last) {
  // A chain of dependent multiply-adds runs at one per 4 cycles: few tokens take several partial sums.
  constexpr int kParts = M >= 4 ? 1 : (M == 1 ? 4 : 2);
  const SpqrWeight& w = p.weight;
  const int64_t units = (w.in_features + kUnit - 1) / kUnit, quads = (w.group_size + kQuad - 1) / kQuad;
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* block = w.qweight + b * w.words * kLineBytes;
    F total[M], sum[kParts][M];
    for (int m = 0; m < M; ++m) total[m] = f_zero();
    for (int i = 0; i < kParts; ++i)
      for (int m = 0; m < M; ++m) sum[i][m] = f_zero();
    int64_t group = 0, left = quads;
    const auto close_group = [&] {
      const RowGrid grid = decode_stats(w, b, group);
      for (int m = 0; m < M; ++m) {
        F dot = f_fma(grid.zero, f_set1(-p.group_sums[group * M + m]), sum[0][m]);
        for (int i = 1; i < kParts; ++i) dot = f_add(dot, sum[i][m]);
        total[m] = f_fma(dot, grid.scale, total[m]);
        for (int i = 0; i < kParts; ++i) sum[i][m] = f_zero();
      }
      ++group;
      left = quads;
    };
    for (int64_t u = 0; u < units; ++u) {
      Line lines[BITS];
      load_unit<BITS>(lines, block, u, w.words);
      const float* x = p.values + u * M * kUnit;
      each_column<kUnit>([&](auto column) {
        constexpr int i = decltype(column)::value;
        const F value = unit_value<BITS, i>(lines);
        for (int m = 0; m < M; ++m) sum[i % kParts][m] = f_fma(value, f_set1(x[m * kUnit + i]), sum[i % kParts][m]);
        if constexpr (i % kQuad == kQuad - 1)
          if (--left == 0 && group < w.groups) close_group();
      });
    }
    if (group < w.groups) close_group();  // a short last group, in which codes beyond K met zeros
    if (w.outliers) add_outliers<M>(p, b, total);
    LinearParams out = {};
    out.shape.out_features = w.out_features;
    out.bias = p.bias;
    out.bias_dtype = p.bias_dtype;
    out.y_dtype = p.x_dtype;
    out.y = p.y;
    for (int m = 0; m < M; ++m) store_outputs(out, b, m, total[m]);
  }
}

template <int M>
void spqr_linear_bits(const SpqrLinearParams& p, int64_t first, int64_t last) {
  if constexpr (M <= kSpqrTokens) {
    switch (p.weight.bits) {
      case 2: return spqr_linear_tokens<2, M>(p, first, last);
      case 3: return spqr_linear_tokens<3, M>(p, first, last);
      case 4: return spqr_linear_tokens<4, M>(p, first, last);
    }
  }
}

void spqr_linear(const SpqrLinearParams& p, int64_t first, int64_t last) {
  switch (p.tokens) {
    case 1: return spqr_linear_bits<1>(p, first, last);
    case 2: return spqr_linear_bits<2>(p, first, last);
    case 3: return spqr_linear_bits<3>(p, first, last);
    case 4: return spqr_linear_bits<4>(p, first, last);
  }
}

// ---- dequantization ----

// 16 columns from k on of one row: outliers added in fp32, so that the result is rounded once. `next` follows the row's outliers.
inline void finish_columns(const SpqrDequantizeParams& p, int64_t row, int64_t k, float* values, Span& next) {
  const SpqrWeight& w = p.weight;
  for (; next.begin < next.end; ++next.begin) {
    const int64_t column = outlier_column(w, next.begin);
    if (column >= k + 16) break;
    if (column >= k) values[column - k] += load_scalar(w.values, next.begin, w.stat_dtype);
  }
  store_first(p.y, row * w.in_features + k, p.y_dtype, f_load(values), w.in_features - k);
}

template <int BITS>
void spqr_dequantize_bits(const SpqrDequantizeParams& p, int64_t first, int64_t last) {
  const SpqrWeight& w = p.weight;
  const int64_t units = (w.in_features + kUnit - 1) / kUnit, quads = (w.group_size + kQuad - 1) / kQuad;
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* block = w.qweight + b * w.words * kLineBytes;
    const int64_t rows = smaller(kRows, w.out_features - b * kRows);
    Span next[16];
    for (int64_t r = 0; r < rows; ++r) next[r] = outliers_of(w, b * kRows + r);
    int64_t group = 0, left = quads;
    RowGrid grid = decode_stats(w, b, 0);
    for (int64_t u = 0; u < units; ++u) {
      Line lines[BITS];
      load_unit<BITS>(lines, block, u, w.words);
      alignas(64) float lanes[kUnit * 16];    // [32 columns, 16 rows]
      alignas(64) uint32_t values[2][16 * 16];  // of each half, [16 rows, 16 columns]
      each_column<kUnit>([&](auto column) {
        constexpr int i = decltype(column)::value;
        // Subtract, multiply, add: the steps of the PyTorch reference, so that the values are the same.
        const F shifted = f_add(unit_value<BITS, i>(lines), f_mul(grid.zero, f_set1(-1.0f)));
        f_store(lanes + 16 * i, f_mul(shifted, grid.scale));
        if constexpr (i % kQuad == kQuad - 1) {
          if (--left == 0 && group + 1 < w.groups) {
            grid = decode_stats(w, b, ++group);
            left = quads;
          }
        }
      });
      for (int half = 0; half < 2; ++half) {
        const int64_t k = u * kUnit + 16 * half;
        if (k >= w.in_features) break;
        transpose_words(values[half], reinterpret_cast<const uint8_t*>(lanes + 256 * half), 16);
        for (int64_t r = 0; r < rows; ++r) {
          alignas(64) float row[16];
          __builtin_memcpy(row, values[half] + 16 * r, 64);
          finish_columns(p, b * kRows + r, k, row, next[r]);
        }
      }
    }
  }
}

void spqr_dequantize(const SpqrDequantizeParams& p, int64_t first, int64_t last) {
  switch (p.weight.bits) {
    case 2: return spqr_dequantize_bits<2>(p, first, last);
    case 3: return spqr_dequantize_bits<3>(p, first, last);
    case 4: return spqr_dequantize_bits<4>(p, first, last);
  }
}
