// W8A8: activations quantized once per token, over the whole row, times 8-bit weights with one scale per row. The sum over all of K stays
// an int32; the scales come in one multiplication at the end. Included after rows16_body.h, in the
// same anonymous namespace.
//
//   y[m, n] = sum_k (code[n, k] - 128) * x[m, k]  *  (token_scale[m] * scale[n])  + bias[n]
//
// `code * x` is summed up from -128 * sum(x). Sums may wrap on their way; the result fits 32 bits up to K = 2^17 (128 * 127 * 2^17 < 2^31).

// One token: its codes, its scale, -128 * the sum of its codes. NaN or infinity anywhere in it makes the scale NaN, and with it all outputs.
inline void quantize_token(const QuantizeParams& p, int64_t token) {
  const Shape& s = p.shape;
  const int64_t at = token * s.in_features;
  alignas(64) float values[kSpan];
  I largest = i_set1(0);
  for (int64_t k = 0; k < s.in_features; k += kSpan) {
    load_columns(values, p.x, at + k, smaller(kSpan, s.in_features - k), p.x_dtype);
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
    scale = some ? amax / 127.0f : 0.0f;
    inverse = some && finite ? 127.0f / amax : 0.0f;
  }
  p.out.block_scales[token] = finite ? scale : __builtin_nanf("");
  I sums = i_set1(0);
  for (int64_t k = 0; k < s.in_features; k += kSpan) {
    alignas(64) int32_t codes[kSpan];
    load_columns(values, p.x, at + k, smaller(kSpan, s.in_features - k), p.x_dtype);
    sums = round_span(sums, values, f_set1(inverse), codes);
    pack_codes<8>(codes_at(p.out, k / kSpan, token), codes);
  }
  p.out.block_init[token] = -128 * sum_of(sums);
}

void quantize(const QuantizeParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) quantize_token(p, token);
}

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
  if constexpr (M <= kMaxTokens) {
    int64_t block = first;
    for (; block + kRowBlocks <= last; block += kRowBlocks) int8_tile<kRowBlocks, M>(p, block);
    for (; block < last; ++block) int8_tile<1, M>(p, block);
  }
}

void int8_linear(const LinearParams& p, int64_t first, int64_t last) {
  switch (p.tokens) {
    case 1: return int8_tokens<1>(p, first, last);
    case 2: return int8_tokens<2>(p, first, last);
    case 3: return int8_tokens<3>(p, first, last);
    case 4: return int8_tokens<4>(p, first, last);
    case 5: return int8_tokens<5>(p, first, last);
    case 6: return int8_tokens<6>(p, first, last);
    case 7: return int8_tokens<7>(p, first, last);
    case 8: return int8_tokens<8>(p, first, last);
  }
}
