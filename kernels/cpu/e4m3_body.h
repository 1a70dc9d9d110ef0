// Products with weights in E4M3, and rounding of activations to it. Included after rows16_body.h, inside the same anonymous namespace.
//
//   y[m, n] = sum_k value(code[n, k]) * x[m, k]  *  scale[n]  + bias[n]
//
// or, where activations are E4M3 as well, times token_scale[m] * scale[n]. Float16s come from the bytes by two shifts and a mask, and processors
// turn those into float32 in their order: so the columns of a word that are 16 bits apart, 0 and 2, or 1 and 3, come out side by side for 8 rows,
// and meet pairs of activations. A product is two sums for each token and row until its end.

// ---- activations ----

// store(k, low, high): columns k to k + 15 and k + 16 to k + 31 of a token, rounded, zeros beyond K.
template <class Store>
inline void round_token(const QuantizeParams& p, int64_t token, const Store& store) {
  const Shape& s = p.shape;
  const F inverse = f_set1(scale_token(p, token, kE4m3Most));
  for (int64_t k = 0; k < s.in_features; k += kSpan) {
    alignas(64) float values[kSpan];
    load_columns(values, p.x, token * s.in_features + k, smaller(kSpan, s.in_features - k), p.x_dtype);
    store(k, f_to_e4m3(f_mul(f_load(values), inverse)), f_to_e4m3(f_mul(f_load(values + 16), inverse)));
  }
}

void quantize_e4m3(const QuantizeParams& p) {
  const int64_t columns = p.shape.in_features;
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (p.rows) {
      round_token(p, t, [&](int64_t k, F low, F high) {
        store_first(p.rows, t * columns + k, kFloat32, low, columns - k);
        if (columns - k > 16) store_first(p.rows, t * columns + k + 16, kFloat32, high, columns - k - 16);
      });
    } else if (p.out.wide) {
      round_token(p, t, [&](int64_t k, F low, F high) {
        const int64_t at = (k / kSpan * kTileTokens + t) * kSpan;
        f_store_as(p.out.wide, at, kBFloat16, low);  // which holds each E4M3
        f_store_as(p.out.wide, at + 16, kBFloat16, high);
      });
    } else {
      round_token(p, t, [&](int64_t k, F low, F high) {
        float* span = p.out.values + (k / kSpan * p.out.stride + t) * kSpan;
        f_store(span, low);
        f_store(span + 16, high);
        order_for_e4m3(span);
      });
    }
  }
}

// ---- products ----

constexpr int kLineParts = kLineBytes / sizeof(Part), kPartRows = kRows / kLineParts;

// `words` words of the rows of a part, up to a span of them, times M tokens: one register of codes and two of sums for each token at a time,
// which AVX2 has room for.
template <int M, int CHAINS, int PART>
inline void add_words(Pairs (&sum)[CHAINS][M], Part& largest, const uint8_t* line, const float* x, int64_t words) {
  for (int64_t w = 0; w < words; ++w, line += kLineBytes, x += 4) {
    if (PART == 0) __builtin_prefetch(line + 4096, 0, 2);  // see fetch()
    const Part codes = part_load(line + PART * sizeof(Part));
    largest = part_larger(largest, codes);
    const Pairs even = e4m3_even(codes), odd = e4m3_odd(codes);
    each_column<M>([&](auto token) {
      constexpr int m = decltype(token)::value;
      const Lanes first = l_pair(x + m * kSpan), second = l_pair(x + m * kSpan + 2);
      Pairs &a = sum[0][m], &b = sum[CHAINS - 1][m];
      a.low = l_fma(even.low, first, a.low);
      a.high = l_fma(even.high, first, a.high);
      b.low = l_fma(odd.low, second, b.low);
      b.high = l_fma(odd.high, second, b.high);
    });
  }
}

// A row block times M tokens.
template <int M>
void e4m3_block(const LinearParams& p, int64_t block) {
  constexpr int kChains = M == 1 ? 2 : 1;  // of dependent sums, and twice that: too few for one token
  constexpr int64_t kWords = kSpan / 4;
  Pairs sum[kLineParts][kChains][M];
  Part largest[kLineParts];
  each_column<kLineParts>([&](auto part) {
    constexpr int i = decltype(part)::value;
    largest[i] = part_zero();
    for (int c = 0; c < kChains; ++c)
      for (int m = 0; m < M; ++m) sum[i][c][m] = {l_zero(), l_zero()};
  });
  const uint8_t* line = p.qweight + block * p.shape.words * kLineBytes;
  const float* x = p.x.values;
  for (int64_t words = p.shape.words; words > 0; words -= kWords, line += kWords * kLineBytes, x += M * kSpan) {
    each_column<kLineParts>([&](auto part) {
      constexpr int i = decltype(part)::value;
      if (words >= kWords) add_words<M, kChains, i>(sum[i], largest[i], line, x, kWords);
      else add_words<M, kChains, i>(sum[i], largest[i], line, x, words);
    });
  }
  alignas(64) float total[M][kRows];
  each_column<kLineParts>([&](auto part) {
    constexpr int i = decltype(part)::value;
    const Lanes nan = l_nan_where_full(largest[i]);
    each_column<M>([&](auto token) {
      constexpr int m = decltype(token)::value;
      Pairs pairs = sum[i][0][m];
      if (kChains > 1) pairs = {l_add(pairs.low, sum[i][kChains - 1][m].low), l_add(pairs.high, sum[i][kChains - 1][m].high)};
      l_store(total[m] + i * kPartRows, l_add(l_join(pairs), nan));
    });
  });
  for (int m = 0; m < M; ++m) store_e4m3(p, block, m, f_load(total[m]));
}

void e4m3_linear(const LinearParams& p, int64_t first, int64_t last) {
  by_tokens(p.tokens, [&](auto tokens) {
    for (int64_t block = first; block < last; ++block) e4m3_block<decltype(tokens)::value>(p, block);
  });
}
