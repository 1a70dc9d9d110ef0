// Compares every instruction set that this processor runs with the portable code, which the Python tests compare with PyTorch. For processors
// that the tests themselves do not run on: built by a cross compiler and run in an emulator (test_neon.py). Arguments: a seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../kernels/cpu/isa.h"
#include "../../kernels/cpu/launch.h"

// What PyTorch would provide: here, one thread.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin < end) body(begin, end, context);
  return 0;
}

namespace {

using namespace hfq;

std::mt19937_64 generator;
int failures = 0, cases = 0;

template <class T>
std::vector<T> random_integers(int64_t count, int64_t least, int64_t most) {
  std::uniform_int_distribution<int64_t> draw(least, most);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(draw(generator));
  return values;
}

int64_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Normal numbers only, cut off rather than rounded: any will do.
std::vector<uint8_t> random_floats(int64_t count, DType dtype, float scale) {
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<uint8_t> out(static_cast<size_t>(count * size_of(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const float value = draw(generator);
    const uint32_t bits = bits_of(std::fabs(value) < 1e-4f ? 1e-4f : value);
    const uint16_t narrow = dtype == kBFloat16 ? static_cast<uint16_t>(bits >> 16)
                                               : static_cast<uint16_t>(((bits >> 16) & 0x8000u) | ((((bits >> 23) & 255u) - 112u) << 10) | ((bits >> 13) & 0x3ffu));
    if (dtype == kFloat32) std::memcpy(out.data() + 4 * i, &bits, 4);
    else std::memcpy(out.data() + 2 * i, &narrow, 2);
  }
  return out;
}

float value_of(const std::vector<uint8_t>& data, int64_t i, DType dtype) {
  if (dtype == kFloat32) {
    float value;
    std::memcpy(&value, data.data() + 4 * i, 4);
    return value;
  }
  uint16_t narrow;
  std::memcpy(&narrow, data.data() + 2 * i, 2);
  if (dtype == kFloat16) {
    if ((narrow & 0x7c00u) == 0x7c00u) return narrow & 0x3ffu ? std::nanf("") : INFINITY;
    const float magnitude = (narrow & 0x7c00u) ? std::ldexp(1.0f + static_cast<float>(narrow & 0x3ffu) / 1024.0f, static_cast<int>((narrow >> 10) & 31u) - 15)
                                               : std::ldexp(static_cast<float>(narrow & 0x3ffu), -24);
    return (narrow & 0x8000u) ? -magnitude : magnitude;
  }
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One step of rounding more or less than the portable code: it adds up in another order. `exact`: not even that.
void compare(const char* isa, const char* what, const std::vector<uint8_t>& expected, const std::vector<uint8_t>& found, DType dtype, bool exact) {
  ++cases;
  const int64_t count = static_cast<int64_t>(expected.size()) / size_of(dtype);
  float largest = 0.0f, error = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float a = value_of(expected, i, dtype), b = value_of(found, i, dtype);
    finite = finite && std::isfinite(a) && std::isfinite(b);
    largest = std::fmax(largest, std::fabs(a));
    error = std::fmax(error, std::fabs(a - b));
  }
  const float rounding = exact ? 0.0f : dtype == kFloat32 ? 2e-6f : dtype == kFloat16 ? 1e-3f : 8e-3f;
  if (finite && largest > 0.0f && error <= rounding * largest) return;
  ++failures;
  std::printf("%s: %s: error %g of %g%s\n", isa, what, static_cast<double>(error), static_cast<double>(largest), finite ? "" : ", not finite");
}

constexpr DType kDTypes[] = {kFloat32, kFloat16, kBFloat16};

struct Case {
  int64_t rows, columns, group, bits;
  bool zeros, codebook;  // a codebook of 8 bits: E4M3
};

// A weight in layout rows16 and everything that reads it.
struct Weight {
  Shape shape;
  std::vector<uint8_t> codes, scales, zeros, codebook;
  DType dtype;
};

Weight random_weight(const Case& c, DType dtype) {
  const int64_t columns = c.bits == 3 ? kSpan : 32 / c.bits, blocks = (c.rows + kRows - 1) / kRows;
  Weight w;
  Shape& s = w.shape;
  s.in_features = c.columns;
  s.out_features = c.rows;
  s.group_size = c.group < c.columns ? c.group : c.columns;
  s.groups = (c.columns + s.group_size - 1) / s.group_size;
  s.words = (c.columns + columns - 1) / columns * (c.bits == 3 ? 3 : 1);
  s.spans_per_group = (s.group_size + kSpan - 1) / kSpan;
  s.blocks_per_group = (s.group_size + kActBlock - 1) / kActBlock;
  s.bits = static_cast<int32_t>(c.bits);
  w.codes = random_integers<uint8_t>(blocks * s.words * kLineBytes, 0, 255);
  if (c.codebook && c.bits == 8)
    for (uint8_t& code : w.codes) code = (code & 127) == 127 ? 0 : code;  // NaN
  w.scales = random_floats(blocks * s.groups * kRows, dtype, 0.1f);
  if (c.zeros) w.zeros = random_floats(blocks * s.groups * kRows, dtype, 3.0f);
  if (c.codebook) w.codebook = random_floats(16, kFloat32, 1.0f);
  w.dtype = dtype;
  return w;
}

void check_linear(const char* isa, const Case& c, const Weight& w, int64_t tokens, DType dtype, bool int8, bool whole_rows) {
  const std::vector<uint8_t> x = random_floats(tokens * c.columns, dtype, 1.0f), bias = random_floats(c.rows, kFloat32, 1.0f);
  LinearCall call = {};
  call.shape = w.shape;
  call.tokens = tokens;
  call.x = x.data();
  call.qweight = w.codes.data();
  call.scales = w.scales.data();
  call.zeros = c.zeros ? w.zeros.data() : nullptr;
  call.codebook = c.codebook ? reinterpret_cast<const float*>(w.codebook.data()) : nullptr;
  call.bias = tokens % 2 ? bias.data() : nullptr;
  call.x_dtype = dtype;
  call.scale_dtype = w.dtype;
  call.bias_dtype = kFloat32;
  call.int8_activations = int8;
  call.whole_rows = whole_rows;
  if (whole_rows) call.shape.blocks_per_group = 1;
  std::vector<uint8_t> y[2];
  for (int i = 0; i < 2; ++i) {
    select_isa(i ? isa : "generic");
    y[i].assign(static_cast<size_t>(tokens * c.rows * size_of(dtype)), 0xff);
    call.y = y[i].data();
    launch_linears(&call, 1);
  }
  char what[160];
  std::snprintf(what, sizeof what, "linear of %lld x %lld, %lld bits, groups of %lld, zeros %d, codebook %d, %lld tokens, dtype %d, int8 %d, whole rows %d",
                static_cast<long long>(c.rows), static_cast<long long>(c.columns), static_cast<long long>(c.bits), static_cast<long long>(c.group), c.zeros,
                c.codebook, static_cast<long long>(tokens), dtype, int8, whole_rows);
  compare(isa, what, y[0], y[1], dtype, false);
}

// One NaN among E4M3 codes: all outputs of its row, and nothing else. Each element of the weight, too.
void check_nan(const char* isa, const Case& c, int64_t tokens, DType dtype, bool whole_rows) {
  Weight w = random_weight(c, kFloat32);
  const int64_t row = random_integers<int64_t>(1, 0, c.rows - 1)[0], column = random_integers<int64_t>(1, 0, c.columns - 1)[0];
  w.codes[static_cast<size_t>(((row / kRows * w.shape.words + column / 4) * kRows + row % kRows) * 4 + column % 4)] = tokens % 2 ? 127 : 255;
  const std::vector<uint8_t> x = random_floats(tokens * c.columns, dtype, 1.0f);
  std::vector<uint8_t> y(static_cast<size_t>(tokens * c.rows * size_of(dtype))), dense(static_cast<size_t>(c.rows * c.columns * size_of(dtype)));
  select_isa(isa);
  LinearCall call = {};
  call.shape = w.shape;
  call.tokens = tokens;
  call.x = x.data();
  call.qweight = w.codes.data();
  call.scales = w.scales.data();
  call.codebook = reinterpret_cast<const float*>(w.codebook.data());
  call.x_dtype = dtype;
  call.scale_dtype = kFloat32;
  call.whole_rows = whole_rows;
  if (whole_rows) call.shape.blocks_per_group = 1;
  call.y = y.data();
  launch_linears(&call, 1);
  DequantizeParams p = {};
  p.shape = w.shape;
  p.qweight = w.codes.data();
  p.scales = w.scales.data();
  p.codebook = call.codebook;
  p.scale_dtype = kFloat32;
  p.y_dtype = dtype;
  p.y = dense.data();
  launch_dequantize(p);
  bool right = true;
  for (int64_t i = 0; i < tokens * c.rows; ++i) right = right && std::isnan(value_of(y, i, dtype)) == (i % c.rows == row);
  for (int64_t i = 0; i < c.rows * c.columns; ++i) right = right && std::isnan(value_of(dense, i, dtype)) == (i == row * c.columns + column);
  ++cases;
  if (right) return;
  ++failures;
  std::printf("%s: a NaN in row %d, column %d of %d x %d, %d tokens, dtype %d, whole rows %d\n", isa, static_cast<int>(row), static_cast<int>(column),
              static_cast<int>(c.rows), static_cast<int>(c.columns), static_cast<int>(tokens), dtype, whole_rows);
}

void check_rows(const char* isa, const Case& c, const Weight& w, DType dtype) {
  const std::vector<int64_t> index = random_integers<int64_t>(21, 0, c.rows - 1);
  DequantizeParams p = {};
  p.shape = w.shape;
  p.qweight = w.codes.data();
  p.scales = w.scales.data();
  p.zeros = c.zeros ? w.zeros.data() : nullptr;
  p.codebook = c.codebook ? reinterpret_cast<const float*>(w.codebook.data()) : nullptr;
  p.scale_dtype = w.dtype;
  p.y_dtype = dtype;
  std::vector<uint8_t> whole[2], some[2];
  for (int i = 0; i < 2; ++i) {
    select_isa(i ? isa : "generic");
    whole[i].assign(static_cast<size_t>(c.rows * c.columns * size_of(dtype)), 0xff);
    some[i].assign(static_cast<size_t>(21 * c.columns * size_of(dtype)), 0xff);
    p.y = whole[i].data();
    launch_dequantize(p);
    LookupCall call = {p, index.data(), 21};
    call.table.y = some[i].data();
    launch_lookup(call);
  }
  char what[120];
  std::snprintf(what, sizeof what, "rows of %lld x %lld, %lld bits, zeros %d, codebook %d, dtype %d", static_cast<long long>(c.rows),
                static_cast<long long>(c.columns), static_cast<long long>(c.bits), c.zeros, c.codebook, dtype);
  compare(isa, what, whole[0], whole[1], dtype, true);
  compare(isa, what, some[0], some[1], dtype, true);
}

void check_spqr(const char* isa, int32_t bits, DType dtype) {
  SpqrWeight w = {};
  w.in_features = 200;
  w.out_features = 40;
  w.bits = bits;
  w.stat_bits = 3;
  w.group_size = 16;
  w.groups = 13;
  w.rows_per_stat = 16;
  w.words = (w.in_features * bits + 31) / 32;
  w.stat_words = (2 * w.groups * w.stat_bits + 31) / 32;
  w.stat_dtype = dtype;
  w.outliers = w.out_features * 2;
  const auto codes = random_integers<uint8_t>(3 * w.words * kLineBytes, 0, 255), stat_codes = random_integers<uint8_t>(3 * w.stat_words * kLineBytes, 0, 255);
  const auto stats = random_floats(3 * w.groups * 4, dtype, 1.0f), values = random_floats(w.outliers, dtype, 1.0f);
  std::vector<int32_t> offsets;
  std::vector<int16_t> columns;
  for (int32_t row = 0; row <= w.out_features; ++row) offsets.push_back(2 * row);
  for (int64_t row = 0; row < w.out_features; ++row) {
    columns.push_back(static_cast<int16_t>(row));
    columns.push_back(static_cast<int16_t>(150 + row));
  }
  w.qweight = codes.data();
  w.stat_codes = stat_codes.data();
  w.stats = stats.data();
  w.offsets = offsets.data();
  w.columns = columns.data();
  w.values = values.data();
  constexpr int64_t kTokens = 7;
  const auto x = random_floats(kTokens * w.in_features, dtype, 1.0f);
  std::vector<uint8_t> y[2], dense[2];
  for (int i = 0; i < 2; ++i) {
    select_isa(i ? isa : "generic");
    y[i].assign(static_cast<size_t>(kTokens * w.out_features * size_of(dtype)), 0xff);
    dense[i].assign(static_cast<size_t>(w.out_features * w.in_features * size_of(dtype)), 0xff);
    SpqrLinearParams linear = {};
    linear.weight = w;
    linear.x_dtype = dtype;
    linear.x = x.data();
    linear.y = y[i].data();
    launch_spqr_linear(linear, kTokens);
    launch_spqr_dequantize({w, dtype, dense[i].data()});
  }
  char what[60];
  std::snprintf(what, sizeof what, "spqr, %d bits, dtype %d", bits, dtype);
  compare(isa, what, y[0], y[1], dtype, false);
  compare(isa, what, dense[0], dense[1], dtype, false);
}

// What stands between the products of a decode step.
void check_decode(const char* isa, int64_t kv_heads, int64_t group, int64_t size, int64_t length, DType dtype) {
  constexpr int64_t kBatch = 3;
  const int64_t heads = kv_heads * group, q_width = heads * size, room = length + 2;
  const auto q = random_floats(kBatch * q_width, dtype, 1.0f), weight = random_floats(q_width, dtype, 1.0f), angles = random_floats(kBatch * size, dtype, 1.0f);
  const auto k = random_floats(kBatch * kv_heads * room * size, dtype, 1.0f), v = random_floats(kBatch * kv_heads * room * size, dtype, 1.0f);
  auto seen = random_integers<uint8_t>(kBatch * length, 0, 1);
  for (int64_t b = 0; b < kBatch; ++b) seen[static_cast<size_t>(b * length)] = 1;
  const int64_t bytes = kBatch * q_width * size_of(dtype);
  std::vector<uint8_t> normed[2], turned[2], gated[2], attended[2];
  for (int i = 0; i < 2; ++i) {
    select_isa(i ? isa : "generic");
    for (auto* y : {&normed[i], &turned[i], &gated[i], &attended[i]}) y->assign(static_cast<size_t>(bytes), 0xff);
    launch_rms_norm({kBatch, q_width, dtype, q.data(), weight.data(), normed[i].data(), 1e-5f, 1.0f, true});
    launch_rotate({kBatch, heads, size, dtype, q.data(), q_width, angles.data(), angles.data(), false, turned[i].data()});
    launch_gate({kBatch, q_width, dtype, q.data(), normed[0].data(), q_width, q_width, gated[i].data(), length % 2 == 0});
    AttendParams p = {};
    p.batch = kBatch;
    p.heads = heads;
    p.kv_heads = kv_heads;
    p.size = size;
    p.length = length;
    p.room = room;
    p.dtype = dtype;
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.mask = seen.data();
    p.mask_batch = length;
    p.mask_is_bool = true;
    p.scale = 0.2f;
    p.y = attended[i].data();
    launch_attend(p);
  }
  char what[120];
  std::snprintf(what, sizeof what, "decode step, %lld x %lld heads of %lld, %lld tokens, dtype %d", static_cast<long long>(kv_heads),
                static_cast<long long>(group), static_cast<long long>(size), static_cast<long long>(length), dtype);
  compare(isa, what, normed[0], normed[1], dtype, false);
  compare(isa, what, turned[0], turned[1], dtype, true);
  compare(isa, what, gated[0], gated[1], dtype, false);
  compare(isa, what, attended[0], attended[1], dtype, false);
}

void check(const char* isa) {
  const Case kCases[] = {{33, 256, 64, 4, false, false}, {17, 130, 64, 4, true, false}, {48, 520, 128, 4, false, true},  {31, 100, 40, 4, false, false},
                         {40, 700, 192, 2, true, false}, {16, 256, 32, 2, false, false}, {33, 320, 128, 3, false, false}, {20, 96, 96, 3, true, false},
                         {20, 300, 128, 8, false, false}, {5, 72, 8, 8, true, false},     {5, 7, 7, 4, false, false},      {37, 300, 300, 8, false, true},
                         {5, 7, 7, 8, false, true},       {130, 64, 64, 8, false, true}};
  std::vector<int64_t> numbers = {1, 2, 3, 4, 5, 9};
  select_isa(isa);
  if (kernels().tiles_linear) numbers.insert(numbers.end(), {16, 17, 40, 550});
  for (const Case& c : kCases) {
    const bool e4m3 = c.codebook && c.bits == 8;
    for (const DType dtype : kDTypes) {
      const Weight w = random_weight(c, dtype);
      for (const int64_t tokens : numbers)
        for (const bool rounded : {false, true}) {
          check_linear(isa, c, w, tokens, dtype, rounded && !e4m3, rounded && e4m3);
          if (e4m3) check_nan(isa, c, tokens, dtype, rounded);
        }
      check_rows(isa, c, w, dtype);
    }
  }
  for (const DType dtype : kDTypes) {
    const Case c = {37, 300, 300, 8, false, false};
    const Weight w = random_weight(c, kFloat32);
    for (const int64_t tokens : {1, 2, 5}) check_linear(isa, c, w, tokens, dtype, true, true);
    for (const int32_t bits : {2, 3, 4}) check_spqr(isa, bits, dtype);
    for (const int64_t length : {1, 16, 45}) {
      check_decode(isa, 2, 4, 64, length, dtype);
      check_decode(isa, 3, 1, 48, length, dtype);
      check_decode(isa, 1, 7, 128, length, dtype);
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  std::printf("isas: %s\n", supported_isas());
  std::vector<char> names(std::strlen(supported_isas()) + 1);
  std::memcpy(names.data(), supported_isas(), names.size());
  for (char* name = std::strtok(names.data(), ","); name; name = std::strtok(nullptr, ",")) {
    if (std::strcmp(name, "generic") == 0) continue;
    cases = 0;
    check(name);
    std::printf("%s: %d cases\n", name, cases);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
