#include <cstring>

#include "isa.h"
#include "launch.h"
#include "launch_parts.h"

namespace hfq {
namespace {

constexpr int64_t kGrain = 8 * 1024;         // numbers per thread: a few microseconds
constexpr int64_t kAttendBytes = 64 * 1024;  // keys and values per thread, likewise

}  // namespace

void launch_rms_norm(const NormParams& params) {
  const Kernels& isa = kernels();
  advise_huge_pages(params.y, params.rows * params.columns * element_size(params.dtype));
  parallel_for(params.rows, at_least_one(kGrain / params.columns), [&](int64_t first, int64_t last) { isa.rms_norm(params, first, last); });
}

void launch_rotate(const RotateParams& params) {
  const Kernels& isa = kernels();
  parallel_for(params.tokens, at_least_one(kGrain / (params.heads * params.size)), [&](int64_t first, int64_t last) { isa.rotate(params, first, last); });
}

void launch_gate(const GateParams& params) {
  const Kernels& isa = kernels();
  advise_huge_pages(params.y, params.rows * params.columns * element_size(params.dtype));
  parallel_for(params.rows * ceil_div(params.columns, kDecodeChunk), kGrain / kDecodeChunk, [&](int64_t first, int64_t last) { isa.gate(params, first, last); });
}

void launch_append(const AppendCall& call) {
  const auto copy = [&](void* out, int64_t row, const void* in, int64_t from) {
    std::memcpy(static_cast<char*>(out) + (row * call.room + call.at) * call.bytes, static_cast<const char*>(in) + from, static_cast<size_t>(call.bytes));
  };
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t h = 0; h < call.heads; ++h) {
      copy(call.keys, b * call.heads + h, call.k, (b * call.heads + h) * call.bytes);
      copy(call.values, b * call.heads + h, call.v, b * call.v_stride + h * call.bytes);
    }
}

void launch_attend(const AttendParams& params) {
  const Kernels& isa = kernels();
  const int64_t bytes = 2 * params.length * params.size * element_size(params.dtype);
  parallel_for(params.batch * params.kv_heads, at_least_one(kAttendBytes / at_least_one(bytes)), [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    const int64_t numbers = kMostHeadsAtOnce * (round_up(params.length, 16) + params.size);
    isa.attend(params, reinterpret_cast<float*>(scratch.reserve(static_cast<size_t>(numbers * 4))), first, last);
  });
}

}  // namespace hfq
