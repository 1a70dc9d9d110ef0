// Products of integers: all that instruction sets with and without dot products of bytes (VNNI) differ in. Included after rows16_parts.h, inside the
// same anonymous namespace.

// ---- activations with a scale for each kActBlock columns ----

// 32 columns times M tokens. Codes up to 15 are summed up in 16 bits where there is no better instruction.
template <int M, Codes CODES, int PARTS>
inline void dot_span(I (&dot)[PARTS][M], const uint8_t* line, const int8_t* x, Table table) {
  Line lines[lines_of(CODES)];
  if constexpr (CODES == kTable || CODES == kBytes) {
    each_column<8>([&](auto column) {
      constexpr int q = decltype(column)::value;
      fetch_as_needed<CODES, q, 8>(lines, line);
      const Line codes = quad<CODES, q>(lines, table);
      for (int m = 0; m < M; ++m) dot[q % PARTS][m] = byte_dot(dot[q % PARTS][m], codes, load_word(x + kStepBytes * m + 4 * q));
    });
  } else {
    SmallSum small[PARTS][M];
    for (int i = 0; i < PARTS; ++i)
      for (int m = 0; m < M; ++m) small[i][m] = small_begin(dot[i][m]);
    each_column<8>([&](auto column) {
      constexpr int q = decltype(column)::value;
      fetch_as_needed<CODES, q, 8>(lines, line);
      const Line codes = quad<CODES, q>(lines, table);
      for (int m = 0; m < M; ++m) small[q % PARTS][m] = small_dot(small[q % PARTS][m], codes, load_word(x + kStepBytes * m + 4 * q));
    });
    for (int i = 0; i < PARTS; ++i)
      for (int m = 0; m < M; ++m) dot[i][m] = small_end(small[i][m], dot[i][m]);
  }
}

template <int M, Codes CODES>
void block_product(const LinearParams& p, int64_t first, int64_t last) {
  constexpr int64_t kLines = lines_of(CODES);
  constexpr int kParts = M <= 2 ? 2 : 1;  // chains of dependent sums: one of them is too slow for one token
  const Shape& s = p.shape;
  const Table table = table_load(p.codebook_u8);
  alignas(64) uint8_t buffer[kLines * kLineBytes];
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* line = p.qweight + b * s.words * kLineBytes;
    F total[M];
    for (int m = 0; m < M; ++m) total[m] = f_zero();
    for (int64_t g = 0; g < s.groups; ++g) {
      F sum[M];
      for (int m = 0; m < M; ++m) sum[m] = f_zero();
      if (p.zeros) {
        const F zero = f_load_as(p.zeros, (b * s.groups + g) * kRows, p.scale_dtype);
        for (int m = 0; m < M; ++m) sum[m] = f_mul(zero, f_set1(-p.x.group_sums[g * M + m]));
      }
      int64_t words = words_of<CODES>(smaller(s.group_size, s.in_features - g * s.group_size));
      int64_t span = g * s.spans_per_group;
      for (int64_t block = g * s.blocks_per_group; words > 0; ++block) {
        I dot[kParts][M];
        for (int m = 0; m < M; ++m) dot[0][m] = i_set1(p.x.block_init[block * M + m]);
        for (int i = 1; i < kParts; ++i)
          for (int m = 0; m < M; ++m) dot[i][m] = i_set1(0);
        for (int64_t i = 0; i < kActBlock / kSpan && words > 0; ++i, ++span, words -= kLines, line += kLines * kLineBytes) {
          const int8_t* x = p.x.codes + (span / 2 * M) * kStepBytes + span % 2 * kSpan;
          dot_span<M, CODES, kParts>(dot, whole_span<CODES>(buffer, line, words), x, table);
        }
        for (int m = 0; m < M; ++m) {
          for (int i = 1; i < kParts; ++i) dot[0][m] = i_add(dot[0][m], dot[i][m]);
          sum[m] = f_fma(f_from_i(dot[0][m]), f_set1(p.x.block_scales[block * M + m]), sum[m]);
        }
      }
      line += words * kLineBytes;  // back over what the last span lacked
      const F scale = f_load_as(p.scales, (b * s.groups + g) * kRows, p.scale_dtype);
      for (int m = 0; m < M; ++m) total[m] = f_fma(sum[m], scale, total[m]);
    }
    for (int m = 0; m < M; ++m) store_outputs(p, b, m, f_mul(total[m], f_set1(p.output_factor)));
  }
}

void linear_int8(const LinearParams& p, int64_t first, int64_t last) {
  by_tokens_and_codes(p, [&](auto tokens, auto codes) { block_product<decltype(tokens)::value, decltype(codes)::value>(p, first, last); });
}

// ---- W8A8 ----
//
// Activations quantized once per token, over the whole row, times 8-bit weights with one scale per row. The sum over all of K stays an int32; the
// scales come in one multiplication at the end.
//
//   y[m, n] = sum_k (code[n, k] - 128) * x[m, k]  *  (token_scale[m] * scale[n])  + bias[n]
//
// `code * x` is summed up from -128 * sum(x). Sums may wrap on their way; the result fits 32 bits up to K = 2^17 (128 * 127 * 2^17 < 2^31).

// BLOCKS * 16 rows times M tokens: each word of the activations is fetched once for all the row blocks.
template <int BLOCKS, int M>
inline void int8_tile(const LinearParams& p, int64_t block) {
  const int64_t words = p.shape.words;
  const uint8_t* line = p.qweight + block * words * kLineBytes;
  I dot[BLOCKS][M];
  for (int i = 0; i < BLOCKS; ++i)
    for (int m = 0; m < M; ++m) dot[i][m] = i_set1(p.x.block_init[m]);
  for (int64_t w = 0; w < words; ++w, line += kLineBytes) {
    const int8_t* x = p.x.codes + w / 16 * M * kStepBytes + w % 16 * 4;
    Line codes[BLOCKS];
    for (int i = 0; i < BLOCKS; ++i) codes[i] = fetch(line + i * words * kLineBytes);
    for (int m = 0; m < M; ++m) {
      const uint32_t word = load_word(x + kStepBytes * m);
      for (int i = 0; i < BLOCKS; ++i) dot[i][m] = byte_dot(dot[i][m], codes[i], word);
    }
  }
  for (int i = 0; i < BLOCKS; ++i) {
    const F scale = f_load_as(p.scales, (block + i) * kRows, p.scale_dtype);
    for (int m = 0; m < M; ++m) {
      const F factor = f_mul(f_set1(p.x.block_scales[m]), scale);
      store_outputs(p, block + i, m, f_mul(f_from_i(dot[i][m]), factor));
    }
  }
}

template <int M>
void int8_tokens(const LinearParams& p, int64_t first, int64_t last) {
  int64_t block = first;
  for (; block + kRowBlocks <= last; block += kRowBlocks) int8_tile<kRowBlocks, M>(p, block);
  for (; block < last; ++block) int8_tile<1, M>(p, block);
}

void int8_linear(const LinearParams& p, int64_t first, int64_t last) {
  by_tokens(p.tokens, [&](auto tokens) { int8_tokens<decltype(tokens)::value>(p, first, last); });
}
