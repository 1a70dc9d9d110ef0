// Products with weights in E4M3, and rounding of activations to it. Included by rows16_body.h, inside the same anonymous namespace.
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

// A row block times M tokens from `token` on.
template <int M>
void e4m3_block(const LinearParams& p, int64_t block, int64_t token) {
  constexpr int kParts = M == 1 ? 2 : 1;  // chains of dependent sums: four for one token, two for each of several
  Pairs sum[kParts][M];
  for (int i = 0; i < kParts; ++i)
    for (int m = 0; m < M; ++m) sum[i][m] = {f_zero(), f_zero()};
  Line largest = line_zero();
  const auto add_word = [&](const uint8_t* line, const float* x) __attribute__((always_inline)) {
    const Line codes = fetch(line);
    largest = line_larger(largest, codes);
    const auto add_columns = [&](Pairs values, Pairs(&sums)[M], const float* pairs) __attribute__((always_inline)) {
      for (int m = 0; m < M; ++m) {
        const F both = f_pair(pairs + m * kSpan);
        sums[m].low = f_fma(values.low, both, sums[m].low);
        sums[m].high = f_fma(values.high, both, sums[m].high);
      }
    };
    add_columns(e4m3_even(codes), sum[0], x);
    add_columns(e4m3_odd(codes), sum[kParts - 1], x + 2);
  };
  constexpr int64_t kWords = kSpan / 4;
  const uint8_t* line = p.qweight + block * p.shape.words * kLineBytes;
  const float* x = p.x.values + token * kSpan;
  int64_t words = p.shape.words;
  for (; words >= kWords; words -= kWords, line += kWords * kLineBytes, x += p.x.stride * kSpan)
    for (int64_t w = 0; w < kWords; ++w) add_word(line + w * kLineBytes, x + 4 * w);
  for (int64_t w = 0; w < words; ++w) add_word(line + w * kLineBytes, x + 4 * w);
  const F nan = f_nan_where_full(largest);
  for (int m = 0; m < M; ++m) {
    Pairs total = sum[0][m];
    if (kParts > 1) total = {f_add(total.low, sum[kParts - 1][m].low), f_add(total.high, sum[kParts - 1][m].high)};
    store_e4m3(p, block, token + m, f_add(f_join(total), nan));
  }
}

// body(Column<M>) for M = tokens, 1 to kE4m3Tokens.
template <int M = 1, class Body>
inline void by_e4m3_tokens(int64_t tokens, const Body& body) {
  if (tokens == M) return body(Column<M>{});
  if constexpr (M < kE4m3Tokens) by_e4m3_tokens<M + 1>(tokens, body);
}

void e4m3_linear(const LinearParams& p, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block)  // which stays in the cache
    for (int64_t token = 0; token < p.tokens; token += kE4m3Tokens)
      by_e4m3_tokens(smaller(kE4m3Tokens, p.tokens - token), [&](auto tokens) { e4m3_block<decltype(tokens)::value>(p, block, token); });
}
