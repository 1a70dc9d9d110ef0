// What stands between the products of a decode step (decode.h), written once over 16 lanes. Included after rows16_parts.h, inside the same
// anonymous namespace. Loops over plain floats are written so that compilers vectorize them.

// So many numbers fill whole vectors.
inline int64_t whole_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// e^x to 2e-7 of itself; e^-87 below that, infinity from 88.4 on; not-a-number stays that. 2^n e^r with n an integer and |r| <= ln(2) / 2; e^r by
// its Taylor series.
inline float exp_of(float x) {
  const float low = x < -87.0f ? -87.0f : x, bounded = low > 89.0f ? 89.0f : low;  // 2^128 is infinity's bits
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bit counts ones
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, so that n times the first is exact
  const float e = 1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return e * power;
}

// `count` numbers, at most kDecodeChunk, from x[at] as floats; filled up to whole vectors with zeros.
inline void load_chunk(float* out, const void* x, int64_t at, int64_t count, DType dtype) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) f_store(out + i, f_load_as(x, at + i, dtype));
  for (const int64_t whole = whole_vectors(count); i < whole; ++i) out[i] = i < count ? load_scalar(x, at + i, dtype) : 0.0f;
}

inline void store_chunk(void* y, int64_t at, int64_t count, DType dtype, const float* values) {
  for (int64_t i = 0; i < count; i += 16) store_first(y, at + i, dtype, f_load(values + i), count - i);
}

// As if `count` numbers had been written as `dtype` and read again.
inline void round_chunk(float* values, int64_t count, DType dtype) {
  if (dtype == kFloat32) return;
  alignas(64) uint8_t narrow[64];
  for (int64_t i = 0; i < count; i += 16) {
    f_store_as(narrow, 0, dtype, f_load(values + i));
    f_store(values + i, f_load_as(narrow, 0, dtype));
  }
}

inline float sum_of(F v) {
  alignas(64) float lanes[16];
  f_store(lanes, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// ---- norm ----

void rms_norm(const NormParams& p, int64_t first, int64_t last) {
  alignas(64) float x[kDecodeChunk], weight[kDecodeChunk];
  for (int64_t row = first; row < last; ++row) {
    const int64_t begin = row * p.columns;
    F squares = f_zero();
    for (int64_t at = 0; at < p.columns; at += kDecodeChunk) {
      const int64_t count = smaller(kDecodeChunk, p.columns - at);
      load_chunk(x, p.x, begin + at, count, p.dtype);
      for (int64_t i = 0; i < count; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(p.columns) + p.eps);
    for (int64_t at = 0; at < p.columns; at += kDecodeChunk) {
      const int64_t count = smaller(kDecodeChunk, p.columns - at), whole = whole_vectors(count);
      load_chunk(x, p.x, begin + at, count, p.dtype);
      load_chunk(weight, p.weight, at, count, p.dtype);
      for (int64_t i = 0; i < whole; ++i) x[i] *= factor;
      if (p.round_first) round_chunk(x, whole, p.dtype);
      for (int64_t i = 0; i < whole; ++i) x[i] *= weight[i] + p.offset;
      store_chunk(p.y, begin + at, count, p.dtype, x);
    }
  }
}

// ---- rotary embedding ----

// Halves of a head: (a, b) -> (a cos - b sin, b cos + a sin), each product rounded as PyTorch would. `half` is at most kDecodeChunk.
inline void rotate_half(float* y, const float* a, const float* b, const float* cos, const float* sin, float sign, int64_t half, DType dtype) {
  alignas(64) float turned[kDecodeChunk];
  const int64_t whole = whole_vectors(half);
  for (int64_t i = 0; i < whole; ++i) y[i] = a[i] * cos[i];
  for (int64_t i = 0; i < whole; ++i) turned[i] = sign * b[i] * sin[i];
  round_chunk(y, whole, dtype);
  round_chunk(turned, whole, dtype);
  for (int64_t i = 0; i < whole; ++i) y[i] += turned[i];
}

void rotate(const RotateParams& p, int64_t first, int64_t last) {
  const int64_t half = p.size / 2;
  alignas(64) float a[kDecodeChunk], b[kDecodeChunk], y[kDecodeChunk], cos[2][kDecodeChunk], sin[2][kDecodeChunk];
  for (int64_t token = first; token < last; ++token) {
    const int64_t angle = p.shared ? 0 : token * p.size;
    for (int64_t i = 0; i < 2; ++i) {
      load_chunk(cos[i], p.cos, angle + i * half, half, p.dtype);
      load_chunk(sin[i], p.sin, angle + i * half, half, p.dtype);
    }
    for (int64_t head = token * p.heads; head < (token + 1) * p.heads; ++head) {
      const int64_t at = head * p.size, from = token * p.x_stride + (head - token * p.heads) * p.size;
      load_chunk(a, p.x, from, half, p.dtype);
      load_chunk(b, p.x, from + half, half, p.dtype);
      rotate_half(y, a, b, cos[0], sin[0], -1.0f, half, p.dtype);
      store_chunk(p.y, at, half, p.dtype, y);
      rotate_half(y, b, a, cos[1], sin[1], 1.0f, half, p.dtype);
      store_chunk(p.y, at + half, half, p.dtype, y);
    }
  }
}

// ---- gate ----

// Both are x times a logistic function: of x, or (Hendrycks and Gimpel, 2016) of a cubic that comes near the normal distribution's. Units are
// chunks of a row.
void gate(const GateParams& p, int64_t first, int64_t last) {
  alignas(64) float x[kDecodeChunk], up[kDecodeChunk];
  const int64_t chunks = (p.columns + kDecodeChunk - 1) / kDecodeChunk;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t row = unit / chunks, at = unit % chunks * kDecodeChunk, count = smaller(kDecodeChunk, p.columns - at), whole = whole_vectors(count);
    load_chunk(x, p.gate, row * p.gate_stride + at, count, p.dtype);
    load_chunk(up, p.up, row * p.up_stride + at, count, p.dtype);
    if (p.tanh_gelu)
      for (int64_t i = 0; i < whole; ++i) x[i] = x[i] / (1.0f + exp_of(-1.59576912f * (x[i] + 0.044715f * (x[i] * x[i] * x[i]))));
    else
      for (int64_t i = 0; i < whole; ++i) x[i] = x[i] / (1.0f + exp_of(-x[i]));
    round_chunk(x, whole, p.dtype);
    for (int64_t i = 0; i < whole; ++i) x[i] *= up[i];
    store_chunk(p.y, row * p.columns + at, count, p.dtype, x);
  }
}

// ---- attention of one token ----

// Query heads and vectors of a value row that fit the register file together.
constexpr int kHeadsAtOnce = kMaxTokens >= 8 ? kMostHeadsAtOnce : 2, kVectorsAtOnce = kMaxTokens >= 8 ? 4 : 2;

// scores[h][t] = q_h . k_t for 16 tokens from t on, of which `count` exist. Products of lanes are turned over, so that sums go across registers.
template <int HEADS, DType T>
inline void score(float* scores, int64_t stride, const float* q, const void* k, int64_t at, int64_t size, int64_t count) {
  alignas(64) float lanes[HEADS][16][16];
  alignas(64) uint32_t turned[256];
  for (int64_t t = 0; t < count; ++t) {
    F sums[HEADS];
    for (int h = 0; h < HEADS; ++h) sums[h] = f_zero();
    for (int64_t i = 0; i < size; i += 16) {
      const F key = f_load_as(k, at + t * size + i, T);
      for (int h = 0; h < HEADS; ++h) sums[h] = f_fma(f_load(q + h * size + i), key, sums[h]);
    }
    for (int h = 0; h < HEADS; ++h) f_store(lanes[h][t], sums[h]);
  }
  for (int h = 0; h < HEADS; ++h) {
    transpose_words(turned, reinterpret_cast<const uint8_t*>(lanes[h]), count);
    F sum = f_zero();
    for (int i = 0; i < 16; ++i) sum = f_add(sum, f_load(reinterpret_cast<const float*>(turned) + 16 * i));
    f_store(scores + h * stride, sum);
  }
}

// y_h = factor_h * (sum over t of weights[h][t] v_t), columns [i, i + 16 VECTORS).
template <int HEADS, int VECTORS, DType T>
inline void weigh(void* y, int64_t y_at, const float* factors, const float* weights, int64_t stride, const void* v, int64_t at, int64_t size, int64_t length) {
  F sums[HEADS][VECTORS];
  for (int h = 0; h < HEADS; ++h)
    for (int j = 0; j < VECTORS; ++j) sums[h][j] = f_zero();
  for (int64_t t = 0; t < length; ++t) {
    F values[VECTORS];
    for (int j = 0; j < VECTORS; ++j) values[j] = f_load_as(v, at + t * size + 16 * j, T);
    for (int h = 0; h < HEADS; ++h) {
      const F weight = f_set1(weights[h * stride + t]);
      for (int j = 0; j < VECTORS; ++j) sums[h][j] = f_fma(weight, values[j], sums[h][j]);
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int j = 0; j < VECTORS; ++j) f_store_as(y, y_at + h * size + 16 * j, T, f_mul(sums[h][j], f_set1(factors[h])));
}

// Scores to weights e^(score - largest), zeros beyond `length`. Returns what to multiply with so that they add up to 1, or 0 if no token is seen.
inline float weights_of(float* scores, int64_t length) {
  constexpr float kUnseen = -__builtin_inff();
  const int64_t whole = whole_vectors(length);
  for (int64_t t = length; t < whole; ++t) scores[t] = kUnseen;
  float most[16], sums[16] = {};
  for (int i = 0; i < 16; ++i) most[i] = kUnseen;
  for (int64_t t = 0; t < whole; t += 16)
    for (int i = 0; i < 16; ++i) most[i] = scores[t + i] > most[i] ? scores[t + i] : most[i];
  float largest = most[0];
  for (int i = 1; i < 16; ++i) largest = most[i] > largest ? most[i] : largest;
  const float origin = largest == kUnseen ? 0.0f : largest;
  for (int64_t t = 0; t < whole; t += 16)
    for (int i = 0; i < 16; ++i) {
      const float score = scores[t + i], weight = exp_of(score - origin);
      scores[t + i] = score == kUnseen ? 0.0f : weight;
      sums[i] += scores[t + i];
    }
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += sums[i];
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

inline void add_mask(const AttendParams& p, int64_t batch, int64_t head, float* scores) {
  const int64_t at = batch * p.mask_batch + head * p.mask_heads;
  if (p.mask_is_bool) {
    const uint8_t* seen = static_cast<const uint8_t*>(p.mask) + at;
    for (int64_t t = 0; t < p.length; ++t) scores[t] = seen[t] ? scores[t] : -__builtin_inff();
  } else {
    for (int64_t t = 0; t < p.length; ++t) scores[t] += load_scalar(p.mask, at + t, p.dtype);
  }
}

template <int HEADS, DType T>
inline void attend_heads(const AttendParams& p, float* scratch, int64_t batch, int64_t kv_head, int64_t head) {
  const int64_t stride = whole_vectors(p.length), keys = (batch * p.kv_heads + kv_head) * p.room * p.size, at = (batch * p.heads + head) * p.size;
  float *scores = scratch, *q = scratch + HEADS * stride;
  for (int64_t i = 0; i < HEADS * p.size; i += 16) f_store(q + i, f_mul(f_load_as(p.q, at + i, T), f_set1(p.scale)));
  for (int64_t t = 0; t < p.length; t += 16) score<HEADS, T>(scores + t, stride, q, p.k, keys + t * p.size, p.size, smaller(16, p.length - t));
  float factors[HEADS];
  for (int h = 0; h < HEADS; ++h) {
    if (p.mask) add_mask(p, batch, head + h, scores + h * stride);
    factors[h] = weights_of(scores + h * stride, p.length);
  }
  int64_t i = 0;
  for (; i + 16 * kVectorsAtOnce <= p.size; i += 16 * kVectorsAtOnce)
    weigh<HEADS, kVectorsAtOnce, T>(p.y, at + i, factors, scores, stride, p.v, keys + i, p.size, p.length);
  for (; i < p.size; i += 16) weigh<HEADS, 1, T>(p.y, at + i, factors, scores, stride, p.v, keys + i, p.size, p.length);
}

template <DType T>
inline void attend_as(const AttendParams& p, float* scratch, int64_t first, int64_t last) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t batch = unit / p.kv_heads, kv_head = unit % p.kv_heads, end = (kv_head + 1) * group;
    int64_t head = kv_head * group;
    for (; head + kHeadsAtOnce <= end; head += kHeadsAtOnce) attend_heads<kHeadsAtOnce, T>(p, scratch, batch, kv_head, head);
    for (; head < end; ++head) attend_heads<1, T>(p, scratch, batch, kv_head, head);
  }
}

// Units are key-value heads of a sequence.
void attend(const AttendParams& p, float* scratch, int64_t first, int64_t last) {
  if (p.dtype == kFloat32) return attend_as<kFloat32>(p, scratch, first, last);
  if (p.dtype == kFloat16) return attend_as<kFloat16>(p, scratch, first, last);
  attend_as<kBFloat16>(p, scratch, first, last);
}
