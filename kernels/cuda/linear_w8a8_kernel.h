// The kernel for few tokens and weights of 8 bits, for one kind of codes in each file that includes this: the weight is read once, as it lies
// in rows.
//
// A lane of mma.m16n8k32 takes four neighbouring bytes of rows g and g + 8 at two places. A sum may be taken in any order, so both places, and
// those of a second instruction, stand side by side: 16 bytes of each row in one load, and the same columns of x in another. So rows serve
// tensor cores as they are, and the matrix library as well. E4M3 become float16s, for four m16n8k16 (e4m3.h). A warp's step is 64 columns; four
// lanes read 64 neighbouring bytes of a row, whole sectors of memory, and the next step the other half of the line.
//
// A thread block takes one or two tiles of 16 rows and up to 32 tokens; its 8 warps share out the columns. Loads go straight to registers,
// 4 KB of weights of each warp on the way (2 where many tokens need the registers). That is 96 KB of a multiprocessor, which has 24 such warps;
// 20 bytes per clock (H200) need 20 KB over a latency of 1000 clocks. A step has 30 instructions for 1024 bytes, with E4M3 50, whose
// time has room for 200: memory is the only limit.
#pragma once

#include "runs.h"
#include "tokens.h"

namespace hfq {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr uint32_t kStepColumns = 64, kPairColumns = 2 * kStepColumns;
constexpr uint32_t kRound = kWarps * kPairColumns;  // columns of all warps, two steps each

// ---- from memory to sums ----

template <int kTiles, int kTokenTiles>
struct Step {
  uint4 weights[kTiles][2];  // rows g, g + 8
  uint4 tokens[kTokenTiles];
};

// From one token to the next in shared memory: in models, where K is a multiple of 128, other banks for neighbours.
__device__ __forceinline__ uint32_t inside_stride(uint32_t in_features) { return in_features + 64; }

__device__ __forceinline__ uint32_t at_most(int i, int64_t last) { return static_cast<uint32_t>(i < last ? i : last); }

// 8 neighbouring codes of a row as operands of matrix instructions, two words for each: bytes as they are, or float16s.
template <class Code>
struct Operand;
template <>
struct Operand<Int8> {
  uint32_t words[2];
  __device__ __forceinline__ Operand(uint32_t first, uint32_t second) : words{first, second} {}
};
template <>
struct Operand<E4M3> {
  uint32_t words[4];
  __device__ __forceinline__ Operand(uint32_t first, uint32_t second) {
    const uint2 low = halves(first), high = halves(second);
    words[0] = low.x, words[1] = low.y, words[2] = high.x, words[3] = high.y;
  }
};

// sums += rows g (`low`) and g + 8 (`high`) times tokens.
template <class Code>
__device__ __forceinline__ void multiply_rows(typename Code::Sum (&sums)[4], const Operand<Code>& low, const Operand<Code>& high,
                                              const Operand<Code>& x) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(x) / 4); i += 2) {
    const uint32_t a[4] = {low.words[i], high.words[i], low.words[i + 1], high.words[i + 1]};
    if constexpr (std::is_same_v<Code, Int8>)
      mma(sums, a, x.words[i], x.words[i + 1]);
    else
      mma(Float16{}, sums, a, x.words[i], x.words[i + 1]);
  }
}

// kInside: codes of tokens lie in shared memory.
template <class Code, int kTiles, int kTokenTiles, bool kInside>
struct W8A8Warp {
  static constexpr int kAhead = kTiles == 2 || kTokenTiles == 4 ? 2 : 4;  // steps on the way; even
  using Steps = Step<kTiles, kInside ? 1 : kTokenTiles>;

  // The thread block's first row and token, and from there to the lane's bytes: 32 rows fit 32 bits, and addresses two registers.
  const uint8_t *qweight, *codes;
  uint32_t rows[kTiles][2], tokens[kTokenTiles];
  uint32_t in_features;
  uint32_t columns;                    // from the lane's first one to the end of the row
  typename Code::Sum sums[kTiles][kTokenTiles][4] = {};

  // Rows and tokens that do not exist are others, computed for nothing and not stored.
  __device__ __forceinline__ W8A8Warp(const W8A8Params& p, int64_t first_row, int64_t first_token) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const uint32_t first = 16 * (lane % 4);
    in_features = static_cast<uint32_t>(p.in_features);
    columns = first < in_features ? in_features - first : 0;
    qweight = kept(p.qweight + first_row * p.in_features);
    const int64_t last_row = p.out_features - 1 - first_row, last_token = p.tokens - 1 - first_token;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) rows[i / 2][i % 2] = kept(at_most(8 * i + g, last_row) * in_features + first);
    if constexpr (kInside) {
      tokens[0] = at_most(g, last_token) * inside_stride(in_features) + (columns > 0 ? first : 0);
    } else {
      codes = kept(p.codes + first_token * p.in_features);
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) tokens[i] = kept(at_most(8 * i + g, last_token) * in_features + first);
    }
  }

  __device__ __forceinline__ void load_weights(Steps& step, uint32_t column) const {
    const bool present = column < columns;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        step.weights[i][half] = make_uint4(0, 0, 0, 0);
        if (present) step.weights[i][half] = load_streaming(reinterpret_cast<const uint4*>(qweight + (rows[i][half] + column)));
      }
    }
  }

  __device__ __forceinline__ void load_tokens(Steps& step, uint32_t column) const {
    if constexpr (!kInside) {
      const bool present = column < columns;
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        step.tokens[i] = make_uint4(0, 0, 0, 0);
        if (present) step.tokens[i] = load_written(reinterpret_cast<const uint4*>(codes + (tokens[i] + column)));
      }
    }
  }

  __device__ __forceinline__ void multiply(const Steps& step, uint32_t column) {
    uint4 x[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      if constexpr (kInside)
        // Behind K any codes: they meet weights of zero.
        x[j] = *reinterpret_cast<const uint4*>(codes + (tokens[j] + (column < columns ? column : 0)));
      else
        x[j] = step.tokens[j];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto operand = [half](const uint4& v) { return half ? Operand<Code>(v.z, v.w) : Operand<Code>(v.x, v.y); };
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const Operand<Code> of_tokens = operand(x[j]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) multiply_rows(sums[i][j], operand(step.weights[i][0]), operand(step.weights[i][1]), of_tokens);
      }
    }
  }

  // `fill`: what is to be done once while the first loads are on their way.
  template <class Fill>
  __device__ __forceinline__ void run(const Fill& fill) {
    const uint32_t first = threadIdx.x / 32 * kPairColumns;
    const auto place = [](uint32_t column, int s) { return column + s / 2 * kRound + s % 2 * kStepColumns; };
    Steps steps[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load_weights(steps[s], place(first, s));
    // Tokens come from the kernel before this one; no kernel that lets the next one start writes weights.
    let_next_kernel_start();
    wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load_tokens(steps[s], place(first, s));
    fill(*this);
    // All steps, then all loads. ptxas gives all loads that live across a loop's end one scoreboard, which counts: to wait for one of them is to
    // wait for the last one issued, so that a load behind each step would cost each step a latency of memory.
    for (uint32_t column = first; column < in_features; column += kAhead / 2 * kRound) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) multiply(steps[s], place(column, s));
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        load_weights(steps[s], place(column + kAhead / 2 * kRound, s));
        load_tokens(steps[s], place(column + kAhead / 2 * kRound, s));
      }
    }
  }
};

// ---- tokens quantized in the kernel ----

// Shared memory behind the sums of the warps.
struct Inside {
  uint32_t largest[kWarps][kMostTokensInside];  // of each warp's part of each token
  float scales[kMostTokensInside];
  uint8_t codes[16];                            // [tokens, K + 64], the last 64 of each unused
};

template <class Code, class T>
__device__ __forceinline__ void quantize_inside(const W8A8Params& p, Inside* inside) {
  using Words = decltype(codes_of(Code{}, T{}, uint4{}, 0.0f));
  const uint32_t in_features = static_cast<uint32_t>(p.in_features), loads = in_features / kPerLoad<T>;
  const int tokens = static_cast<int>(p.tokens);
  for (int m = 0; m < tokens; ++m) {
    const uint4* x = static_cast<const uint4*>(p.x) + m * loads;
    uint32_t bits = 0;
#pragma unroll 2
    for (uint32_t at = threadIdx.x; at < loads; at += kThreads) bits = larger(bits, largest(T{}, load_written(x + at)));
    bits = largest_of_warp(bits);
    if (threadIdx.x % 32 == 0) inside->largest[threadIdx.x / 32][m] = bits;
  }
  sync_block();
  for (int m = 0; m < tokens; ++m) {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bits = larger(bits, inside->largest[w][m]);
    const Rounding rounding = rounding_of<Code>(bits, p.input_scale);
    if (threadIdx.x == 0) inside->scales[m] = rounding.scale;
    const uint4* x = static_cast<const uint4*>(p.x) + m * loads;
    Words* codes = reinterpret_cast<Words*>(inside->codes + m * inside_stride(in_features));
#pragma unroll 2
    for (uint32_t at = threadIdx.x; at < loads; at += kThreads) codes[at] = codes_of(Code{}, T{}, load_written(x + at), rounding.inverse);
  }
  sync_block();
}

// ---- kernel ----

__device__ __forceinline__ uint32_t word_of(int32_t sum) { return static_cast<uint32_t>(sum); }
__device__ __forceinline__ uint32_t word_of(float sum) { return as_bits(sum); }

// What a thread block computes: kTiles tiles of rows for 8 kTokenTiles tokens. T: of x where it quantizes; void where it reads codes.
template <class Code, class T, int kTiles, int kTokenTiles>
__device__ __forceinline__ void w8a8_block(const W8A8Params& p, int64_t first_row, int64_t first_token) {
  constexpr bool kInside = !std::is_void_v<T>;
  constexpr int kTileSums = kTiles * kTokenTiles * 128;
  using Sum = typename Code::Sum;
  Sum* partial = reinterpret_cast<Sum*>(shared_memory());  // [kWarps][kTiles][kTokenTiles][32][4]
  Inside* inside = reinterpret_cast<Inside*>(shared_memory() + kWarps * kTileSums * sizeof(Sum));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  W8A8Warp<Code, kTiles, kTokenTiles, kInside> mine(p, first_row, first_token);
  mine.run([&](auto& self) {
    if constexpr (kInside) {
      quantize_inside<Code, T>(p, inside);
      self.codes = inside->codes;
    } else {
      static_cast<void>(self);
    }
  });

#pragma unroll
  for (int i = 0; i < kTiles * kTokenTiles; ++i) {
    const auto& sums = mine.sums[i / kTokenTiles][i % kTokenTiles];
    *reinterpret_cast<uint4*>(partial + warp * kTileSums + i * 128 + 4 * lane) =
        make_uint4(word_of(sums[0]), word_of(sums[1]), word_of(sums[2]), word_of(sums[3]));
  }
  sync_block();

  for (int i = threadIdx.x; i < kTileSums; i += kThreads) {
    const int row = i % 16, token = i / 16 % 8, pair = i / 128;
    const int64_t n = first_row + pair / kTokenTiles * 16 + row, m = first_token + pair % kTokenTiles * 8 + token;
    if (n >= p.out_features || m >= p.tokens) continue;
    const Sum* from = partial + pair * 128 + (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += from[w * kTileSums];
    const float token_scale = kInside ? inside->scales[m] : load_written(p.token_scales + m);
    float y = scaled_sum(sum, token_scale, load_float(p.scales, n, p.scale_dtype));
    if (p.bias) y = add(y, load_float(p.bias, n, p.bias_dtype));
    store_float(p.y, m * p.out_features + n, p.x_dtype, y);
  }
}

template <class Code, class T, int kTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles == 1 ? 3 : 2) w8a8_kernel(const W8A8Params p) {
  // Neighbouring thread blocks read the same weights for other tokens: the second finds them in L2.
  const uint32_t token_blocks = std::is_void_v<T> ? p.token_blocks : 1;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / token_blocks) * (16 * kTiles);
  w8a8_block<Code, T, kTiles, kTokenTiles>(p, first_row, static_cast<int64_t>(blockIdx.x % token_blocks) * (8 * kTokenTiles));
}

// The same for tokens that are sorted by expert: what a thread block of experts_kernel.h is to one of linear_kernel.h.
template <class Code, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles == 1 ? 3 : 2) w8a8_experts_kernel(const W8A8ExpertsParams p) {
  const Routing& r = p.routing;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / r.slots) * 16;
  wait_for_previous_kernel();
  const Run run = find_run<8 * kTokenTiles>(r, static_cast<uint32_t>(p.product.tokens), blockIdx.x % r.slots);
  if (run.first >= run.end) return;
  W8A8Params own = p.product;
  if (run.expert == r.experts) {
    if (own.x_dtype == kFloat32) return store_zeros(static_cast<float*>(own.y), own.out_features, run, first_row, 16, kThreads);
    return store_zeros(static_cast<uint16_t*>(own.y), own.out_features, run, first_row, 16, kThreads);
  }
  own.qweight += run.expert * r.qweight_bytes;
  own.scales = static_cast<const uint8_t*>(own.scales) + run.expert * r.scale_bytes;
  if (own.bias) own.bias = static_cast<const uint8_t*>(own.bias) + run.expert * r.bias_bytes;
  own.tokens = run.end;
  w8a8_block<Code, void, 1, kTokenTiles>(own, first_row, run.first);
}

// ---- launchers ----

template <class Code, class T, int kTiles, int kTokenTiles>
const char* launch_kind(const W8A8Params& params, cudaStream_t stream) {
  W8A8Params p = params;
  p.token_blocks = static_cast<uint32_t>((p.tokens + 8 * kTokenTiles - 1) / (8 * kTokenTiles));
  const int64_t row_blocks = (p.out_features + 16 * kTiles - 1) / (16 * kTiles);
  size_t shared = kWarps * kTiles * kTokenTiles * 128 * sizeof(typename Code::Sum);
  if (!std::is_void_v<T>) shared += sizeof(Inside) + static_cast<size_t>(p.tokens * (p.in_features + 64));
  const int64_t blocks = row_blocks * p.token_blocks;
  return launch_early(w8a8_kernel<Code, T, kTiles, kTokenTiles>, static_cast<unsigned>(blocks), kThreads, evenly(shared, blocks), stream, p);
}

template <class Code, int kTokenTiles>
const char* launch_codes(const W8A8Params& p, cudaStream_t stream) {
  // Codes of 8 tokens are half as many bytes as a tile's weights, read by every thread block through L2. Two tiles share them where that leaves
  // enough thread blocks: 2 for each multiprocessor, or 1 where tokens are most of what is read.
  const int64_t tiles = p.out_features / 16, enough = (kTokenTiles == 1 ? 4 : 2) * static_cast<int64_t>(multiprocessors());
  return tiles >= enough ? launch_kind<Code, void, 2, kTokenTiles>(p, stream) : launch_kind<Code, void, 1, kTokenTiles>(p, stream);
}

template <class Code>
const char* launch_w8a8_of(const W8A8Params& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.out_features == 0) return nullptr;
  if (quantizes_inside(Code::kType, p.tokens, p.in_features)) {
    if (p.x_dtype == kFloat32) return launch_kind<Code, Float32, 1, 1>(p, stream);
    return p.x_dtype == kFloat16 ? launch_kind<Code, Float16, 1, 1>(p, stream) : launch_kind<Code, BFloat16, 1, 1>(p, stream);
  }
  if (p.tokens <= 8) return launch_codes<Code, 1>(p, stream);
  return p.tokens <= 16 ? launch_codes<Code, 2>(p, stream) : launch_codes<Code, 4>(p, stream);
}

template <class Code, int kTokenTiles>
const char* launch_experts_kind(const W8A8ExpertsParams& params, cudaStream_t stream) {
  W8A8ExpertsParams p = params;
  p.routing.slots = static_cast<uint32_t>(expert_slots(p.product.tokens, p.routing.experts, 8 * kTokenTiles));
  const int64_t row_blocks = (p.product.out_features + 15) / 16;
  constexpr size_t kShared = kWarps * kTokenTiles * 128 * sizeof(typename Code::Sum);
  return launch_early(w8a8_experts_kernel<Code, kTokenTiles>, static_cast<unsigned>(row_blocks * p.routing.slots), kThreads, kShared, stream, p);
}

template <class Code>
const char* launch_w8a8_experts_of(const W8A8ExpertsParams& p, cudaStream_t stream) {
  if (p.product.tokens == 0 || p.product.out_features == 0) return nullptr;
  // Longer runs where experts have more than 8 tokens each.
  return p.product.tokens > 8 * p.routing.experts ? launch_experts_kind<Code, 4>(p, stream) : launch_experts_kind<Code, 1>(p, stream);
}

}  // namespace
}  // namespace hfq
