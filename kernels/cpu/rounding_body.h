// Choosing codes, written once over 16 lanes; lane = row. Included after lanes_*.h, inside the same anonymous namespace. The arithmetic is
// written with the compiler's own vectors; of the primitives only f_load, f_load_as and f_store_as are used.

typedef float V __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));

#define HFQ_INLINE inline __attribute__((always_inline))

HFQ_INLINE V v_load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
HFQ_INLINE void v_store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
HFQ_INLINE V v_set1(float x) { return V{} + x; }
HFQ_INLINE Mask v_finite(V v) { return (v <= 3.402823466e+38f) & (v >= -3.402823466e+38f); }

// 1 / scale, and 0 where the scale is 0 or so small that its reciprocal overflows.
HFQ_INLINE V v_reciprocal(V scale) {
  const V inverse = 1.0f / scale;
  return v_finite(inverse) ? inverse : V{};
}

// The nearest whole number within 0 .. most, ties to even; 0 for NaN. Both ends are whole, so it may be clamped before it is rounded; then
// adding 1.5 * 2^23 leaves no bits for a fraction.
HFQ_INLINE V v_code(V v, float most) {
  v = v > 0.0f ? v : V{};
  v = v < most ? v : v_set1(most);
  return (v + 12582912.0f) - 12582912.0f;
}

// The nearest point of an ascending codebook, and its code. A value on a boundary takes the lower one.
struct Codebook {
  float values[16], boundaries[15];
  explicit Codebook(const float* from) {
    for (int i = 0; i < 16; ++i) values[i] = from ? from[i] : 0.0f;
    for (int i = 0; i < 15; ++i) boundaries[i] = (values[i + 1] + values[i]) / 2;
  }
  HFQ_INLINE V point(V v) const {
    V found = v_set1(values[0]);
    for (int i = 0; i < 15; ++i) found = v > boundaries[i] ? v_set1(values[i + 1]) : found;
    return found;
  }
  HFQ_INLINE V code(V v) const {
    V found = V{};
    for (int i = 0; i < 15; ++i) found = v > boundaries[i] ? v_set1(static_cast<float>(i + 1)) : found;
    return found;
  }
};

// ---- column by column ----

constexpr int kTileVectors = static_cast<int>(kTileRows / 16);

// Lanes n .. n + count of a row of N, zero beyond.
HFQ_INLINE void load_tile(V* tile, const float* from, int64_t count) {
  if (count == kTileRows) {
    for (int r = 0; r < kTileVectors; ++r) tile[r] = v_load(from + 16 * r);
    return;
  }
  float padded[kTileRows] = {};
  __builtin_memcpy(padded, from, static_cast<size_t>(count) * sizeof(float));
  for (int r = 0; r < kTileVectors; ++r) tile[r] = v_load(padded + 16 * r);
}

// `scratch` holds [B, kTileRows] floats.
void round_columns(const RoundParams& p, float* scratch, int64_t first, int64_t last) {
  const Codebook codebook(p.codebook);
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t n = tile * kTileRows, count = p.rows - n < kTileRows ? p.rows - n : kTileRows;
    for (int64_t i = 0; i < p.columns; ++i) {
      V target[kTileVectors], origin[kTileVectors], scale[kTileVectors], zero[kTileVectors];
      load_tile(target, p.targets + i * p.rows + n, count);
      load_tile(origin, p.origins + i * p.rows + n, count);
      load_tile(scale, p.scales + p.groups[i] * p.rows + n, count);
      for (int r = 0; r < kTileVectors; ++r) zero[r] = v_set1(p.zero);
      if (p.zeros) load_tile(zero, p.zeros + p.groups[i] * p.rows + n, count);
      const float* asked = p.asked + i * p.columns;
      for (int64_t j = 0; j < i; ++j)
        for (int r = 0; r < kTileVectors; ++r) target[r] += asked[j] * v_load(scratch + j * kTileRows + 16 * r);
      alignas(64) float codes[kTileRows];
      for (int r = 0; r < kTileVectors; ++r) {
        const V steps = target[r] * v_reciprocal(scale[r]);
        const V code = p.codebook ? codebook.code(steps) : v_code(steps + zero[r], p.most);
        const V point = p.codebook ? codebook.point(steps) : code - zero[r];
        v_store(codes + 16 * r, code);
        v_store(scratch + i * kTileRows + 16 * r, origin[r] - point * scale[r]);
      }
      for (int64_t l = 0; l < count; ++l) p.codes[i * p.rows + n + l] = static_cast<uint8_t>(static_cast<int32_t>(codes[l]));
      __builtin_memcpy(p.changes + i * p.rows + n, scratch + i * kTileRows, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

// ---- the best grid of a group ----

struct Grid {
  V scale, zero;
};

// To the nearest value that is stored; scales are not rounded to 0.
HFQ_INLINE V v_stored(V v, DType dtype, bool scale) {
  if (dtype == kFloat32) return v;
  alignas(64) float wide[16];
  alignas(64) uint16_t narrow[16];
  v_store(wide, v);
  f_store_as(narrow, 0, dtype, f_load(wide));
  f_store(wide, f_load_as(narrow, 0, dtype));
  const V nearest = v_load(wide);
  if (!scale) return nearest;
  const V least = v_set1(dtype == kFloat16 ? 5.9604644775390625e-8f : 9.18354961579912e-41f);  // the smallest subnormal
  const V away = v > 0.0f ? least : v < 0.0f ? -least : V{};
  return nearest == 0.0f ? away : nearest;
}

// 16 rows of one group: weights [S, 16]; costs [S, 16] or [S]; `points` is scratch of [S, 16].
template <bool kAsymmetric, bool kCodebook, bool kCostOfRows>
struct Group {
  const SearchParams& p;
  const Codebook& codebook;
  int64_t size;  // S
  const float *weights, *costs;
  float* points;
  V total, mean;  // of the costs; of the weights, asymmetric grids only

  HFQ_INLINE V cost(int64_t s) const { return kCostOfRows ? v_load(costs + 16 * s) : v_set1(costs[s]); }

  void begin() {
    V sum{};
    total = V{};
    for (int64_t s = 0; s < size; ++s) {
      total += cost(s);
      sum += cost(s) * v_load(weights + 16 * s);
    }
    mean = sum / total;
  }

  // The squared error on a grid; `next` becomes the least squares grid for its codes.
  HFQ_INLINE V turn(const Grid& grid, Grid& next) const {
    const V inverse = v_reciprocal(grid.scale);
    V error{}, a{}, b{};
    for (int64_t s = 0; s < size; ++s) {
      const V w = v_load(weights + 16 * s), c = cost(s), steps = w * inverse;
      const V point = kCodebook ? codebook.point(steps) : v_code(steps + grid.zero, p.most) - grid.zero;
      const V missed = w - point * grid.scale, weighed = c * point;
      error += c * missed * missed;
      if (kAsymmetric) {
        a += weighed;
        v_store(points + 16 * s, point);
      } else {
        a += weighed * w;
        b += weighed * point;
      }
    }
    next = grid;
    if (!kAsymmetric) {
      const V slope = a / b;
      next.scale = (v_finite(slope) & (slope != 0.0f)) ? slope : grid.scale;
      return error;
    }
    const V middle = a / total;
    V across{}, along{};
    for (int64_t s = 0; s < size; ++s) {
      const V centred = v_load(points + 16 * s) - middle, weighed = cost(s) * centred;
      across += weighed * v_load(weights + 16 * s);
      along += weighed * centred;
    }
    const V slope = across / along, zero = (middle - mean / slope) + grid.zero;
    const Mask usable = v_finite(slope) & (slope > 0.0f) & v_finite(zero);
    next.scale = usable ? slope : grid.scale;
    next.zero = usable ? zero : grid.zero;
    return error;
  }

  HFQ_INLINE Grid search(int64_t block, int64_t group) const {
    Grid best{};
    V least = v_set1(__builtin_inff());
    for (int64_t start = 0; start < p.starts; ++start) {
      alignas(64) float scales[16], zeros[16];
      for (int64_t l = 0; l < 16; ++l) {
        const int64_t row = 16 * block + l < p.rows ? 16 * block + l : p.rows - 1, i = (start * p.rows + row) * p.groups + group;
        scales[l] = p.scales[i];
        zeros[l] = kAsymmetric ? p.zeros[i] : p.zero;
      }
      Grid grid{v_load(scales), v_load(zeros)};
      for (int64_t turn_of = 0; turn_of < p.turns; ++turn_of) {
        grid.scale = v_stored(grid.scale, p.dtype, true);
        if (kAsymmetric) grid.zero = v_stored(grid.zero, p.dtype, false);
        if (start == 0 && turn_of == 0) best = grid;
        Grid next;
        const V error = turn(grid, next);
        const Mask better = error < least;
        least = better ? error : least;
        best.scale = better ? grid.scale : best.scale;
        best.zero = better ? grid.zero : best.zero;
        grid = next;
      }
    }
    return best;
  }
};

template <bool kAsymmetric, bool kCodebook, bool kCostOfRows>
void search_grids(const SearchParams& p, float* scratch, int64_t first, int64_t last) {
  const Codebook codebook(p.codebook);
  float *const weights = scratch, *const points = weights + 16 * p.group_size, *const costs = points + 16 * p.group_size;
  for (int64_t i = first; i < last; ++i) {
    const int64_t block = i / p.groups, group = i % p.groups, begin = group * p.group_size;
    const int64_t size = p.columns - begin < p.group_size ? p.columns - begin : p.group_size;
    for (int64_t l = 0; l < 16; ++l) {
      const int64_t row = 16 * block + l < p.rows ? 16 * block + l : p.rows - 1;
      for (int64_t s = 0; s < size; ++s) weights[16 * s + l] = p.weight[row * p.columns + begin + s];
      if (kCostOfRows)
        for (int64_t s = 0; s < size; ++s) costs[16 * s + l] = p.importance[row * p.columns + begin + s];
    }
    if (!kCostOfRows)
      for (int64_t s = 0; s < size; ++s) costs[s] = p.importance ? p.importance[begin + s] : 1.0f;
    Group<kAsymmetric, kCodebook, kCostOfRows> of{p, codebook, size, weights, costs, points, {}, {}};
    if (kAsymmetric) of.begin();
    const Grid best = of.search(block, group);
    alignas(64) float scales[16], zeros[16];
    v_store(scales, best.scale);
    v_store(zeros, best.zero);
    for (int64_t l = 0; l < 16 && 16 * block + l < p.rows; ++l) {
      p.best_scales[(16 * block + l) * p.groups + group] = scales[l];
      p.best_zeros[(16 * block + l) * p.groups + group] = zeros[l];
    }
  }
}

template <bool kCostOfRows>
void search_grids_with(const SearchParams& p, float* scratch, int64_t first, int64_t last) {
  if (p.codebook) return search_grids<false, true, kCostOfRows>(p, scratch, first, last);
  if (p.zeros) return search_grids<true, false, kCostOfRows>(p, scratch, first, last);
  search_grids<false, false, kCostOfRows>(p, scratch, first, last);
}

// `scratch` holds [3, group_size, 16] floats; work item i is group i % G of row block i / G.
void search_grid(const SearchParams& p, float* scratch, int64_t first, int64_t last) {
  if (p.importance_of_rows) return search_grids_with<true>(p, scratch, first, last);
  search_grids_with<false>(p, scratch, first, last);
}
