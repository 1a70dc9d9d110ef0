// Attention of one query per sequence to the tokens of a cache, in float32 with running maxima (Dao et al., 2022).
//
// 16 or 32 lanes hold 16 bytes each of a key and of a value, and up to four heads of the query that share them: keys and values are read once.
// A thread block takes some of the tokens for one head of keys and values; where there are few heads, several blocks share their tokens, and
// a second kernel adds what they found. Keys and values that the mask hides are not read.
//
// Bytes: 8 heads of 128 numbers and 1000 tokens are 4 MB of keys and values for each layer, some 2 us of memory; each token costs a warp about
// 30 instructions for each query head, which 132 multiprocessors have done in as long.
#include "decode.h"
#include "pieces.h"

namespace hfq {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeads = 4;        // of the query, that share a head of keys and values in one thread block
constexpr int kAhead = 2;        // loads of keys and values that a lane has on the way
constexpr int64_t kLeast = 64;   // tokens of a part: fewer would not pay for the second kernel
constexpr int64_t kMostParts = 64;

struct AttendBlocks : AttendParams {
  int64_t parts, part_tokens;
  int64_t runs;        // of kHeads query heads of one head of keys
  float* workspace;    // [B, H, parts, D + 2] if there are several parts: sums, largest score, sum of weights
};

__device__ __forceinline__ float nothing() { return as_float(0xff800000u); }  // - infinity

// exp(score - largest), 0 for what is hidden.
__device__ __forceinline__ float weight_of(float score, float largest) { return score == nothing() ? 0.0f : exponential(score - largest); }

// Of a query that sees nothing, 0. What is not a number stays so.
__device__ __forceinline__ float quotient(float sum, float all) { return all == 0.0f ? 0.0f : divide(sum, all); }

template <class T, int kLanes>
__device__ __forceinline__ void attend_block(const AttendBlocks& p) {
  constexpr int kPiece = kPerLoad<T>, kAtOnce = 32 / kLanes * kWarps;  // tokens of all warps
  using Number = Bits<T>;
  const int64_t part = blockIdx.x % p.parts, run = blockIdx.x / p.parts % p.runs, kv_head = blockIdx.x / p.parts / p.runs % p.kv_heads;
  const int64_t batch = blockIdx.x / p.parts / p.runs / p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t first_head = kv_head * group + run * kHeads;
  const int heads = static_cast<int>(group - run * kHeads < kHeads ? group - run * kHeads : kHeads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % kLanes * kPiece;
  const bool present = column < p.size;
  const int32_t first = static_cast<int32_t>(part * p.part_tokens), length = static_cast<int32_t>(p.length);
  const int32_t end = first + p.part_tokens < length ? first + static_cast<int32_t>(p.part_tokens) : length;

  float q[kHeads][kPiece], sums[kHeads][kPiece], largest[kHeads], total[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int c = 0; c < kPiece; ++c) q[h][c] = sums[h][c] = 0.0f;
    largest[h] = nothing(), total[h] = 0.0f;
    if (h < heads && present) load_piece(T{}, static_cast<const Number*>(p.q) + (batch * p.heads + first_head + h) * p.size + column, q[h]);
#pragma unroll
    for (int c = 0; c < kPiece; ++c) q[h][c] *= p.scale;
  }

  // What the mask adds to the score of head h and this token.
  const int64_t of_mask = batch * p.mask_batch + first_head * p.mask_heads;
  const auto bias = [&](int h, int32_t token) {
    if (!p.mask) return 0.0f;
    const int64_t at = of_mask + h * p.mask_heads + token;
    if (p.mask_is_bool) return load_written(static_cast<const uint8_t*>(p.mask) + at) ? 0.0f : nothing();
    return to_float(T{}, load_written(static_cast<const Number*>(p.mask) + at));
  };

  const int64_t of_head = (batch * p.kv_heads + kv_head) * p.room * p.size + column;
  const Number *k = static_cast<const Number*>(p.k) + of_head, *v = static_cast<const Number*>(p.v) + of_head;
  for (int32_t base = first + warp * (32 / kLanes) + lane / kLanes; base - lane / kLanes < end; base += kAhead * kAtOnce) {
    uint4 keys[kAhead], values[kAhead];
    float added[kAhead][kHeads];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int32_t token = base + i * kAtOnce;
      bool seen = false;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        added[i][h] = h < heads && token < end ? bias(h, token) : nothing();
        seen = seen || added[i][h] != nothing();
      }
      keys[i] = values[i] = make_uint4(0, 0, 0, 0);
      if (seen && present) {
        const int64_t at = token * p.size;
        keys[i] = load_written(reinterpret_cast<const uint4*>(k + at));
        values[i] = load_written(reinterpret_cast<const uint4*>(v + at));
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float key[kPiece], value[kPiece];
      to_floats(T{}, keys[i], key);
      to_floats(T{}, values[i], value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0.0f;
#pragma unroll
        for (int c = 0; c < kPiece; ++c) score += q[h][c] * key[c];
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) score += as_float(shuffle_xor(as_bits(score), lanes));
        score = added[i][h] == nothing() ? nothing() : score + added[i][h];
        const float most = score > largest[h] ? score : largest[h];
        const float old = weight_of(largest[h], most), own = weight_of(score, most);
        largest[h] = most;
        total[h] = total[h] * old + own;
#pragma unroll
        for (int c = 0; c < kPiece; ++c) sums[h][c] = sums[h][c] * old + own * value[c];
      }
    }
  }

  // Those of all lanes of a column, in their order: [warp, lane / kLanes][head][D + 2].
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t width = p.size + 2;
  constexpr int kSets = kWarps * (32 / kLanes);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float* to = shared + ((warp * (32 / kLanes) + lane / kLanes) * kHeads + h) * width;
    if (present)
#pragma unroll
      for (int c = 0; c < kPiece; ++c) to[column + c] = sums[h][c];
    if (lane % kLanes == 0) to[p.size] = largest[h], to[p.size + 1] = total[h];
  }
  sync_block();
  for (int64_t at = threadIdx.x; at < heads * p.size; at += kThreads) {
    const int64_t h = at / p.size, c = at % p.size;
    float most = nothing(), sum = 0.0f, all = 0.0f;
    for (int set = 0; set < kSets; ++set) {
      const float score = shared[(set * kHeads + h) * width + p.size];
      most = score > most ? score : most;
    }
    for (int set = 0; set < kSets; ++set) {
      const float* from = shared + (set * kHeads + h) * width;
      const float share = weight_of(from[p.size], most);
      sum += from[c] * share, all += from[p.size + 1] * share;
    }
    const int64_t head = batch * p.heads + first_head + h;
    if (p.parts == 1) {
      store(static_cast<Number*>(p.y) + head * p.size + c, from_float(T{}, quotient(sum, all)));
    } else {
      float* to = p.workspace + (head * p.parts + part) * width;
      store(to + c, sum);
      if (c == 0) store(to + p.size, most), store(to + p.size + 1, all);
    }
  }
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3) attend_kernel(const AttendBlocks p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  attend_block<T, kLanes>(p);
}

// A thread block for each query head adds what all parts found.
template <class T>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const AttendBlocks p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t head = blockIdx.x, width = p.size + 2;
  const float* from = p.workspace + head * p.parts * width;
  for (int64_t c = threadIdx.x; c < p.size; c += kThreads) {
    float most = nothing(), sum = 0.0f, all = 0.0f;
    for (int64_t part = 0; part < p.parts; ++part) {
      const float score = load_written(from + part * width + p.size);
      most = score > most ? score : most;
    }
    for (int64_t part = 0; part < p.parts; ++part) {
      const float share = weight_of(load_written(from + part * width + p.size), most);
      sum += load_written(from + part * width + c) * share, all += load_written(from + part * width + p.size + 1) * share;
    }
    store(static_cast<Bits<T>*>(p.y) + head * p.size + c, from_float(T{}, quotient(sum, all)));
  }
}

// ---- launcher ----

AttendBlocks blocks_of(const AttendParams& params) {
  AttendBlocks p = {};
  static_cast<AttendParams&>(p) = params;
  p.runs = (p.heads / p.kv_heads + kHeads - 1) / kHeads;
  // Three thread blocks for each multiprocessor, as long as each has enough tokens.
  const int64_t one = p.batch * p.kv_heads * p.runs, wanted = one ? (3 * static_cast<int64_t>(multiprocessors()) + one - 1) / one : 1;
  const int64_t most = (p.length + kLeast - 1) / kLeast;
  int64_t parts = wanted < most ? wanted : most;
  parts = parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
  p.part_tokens = (p.length + parts - 1) / parts;
  p.parts = p.part_tokens ? (p.length + p.part_tokens - 1) / p.part_tokens : 1;
  return p;
}

template <class T, int kLanes>
const char* launch_lanes(const AttendBlocks& p, cudaStream_t stream) {
  const size_t shared = static_cast<size_t>(kWarps * (32 / kLanes) * kHeads * (p.size + 2)) * sizeof(float);
  const unsigned blocks = static_cast<unsigned>(p.batch * p.kv_heads * p.runs * p.parts);
  const char* error = launch_early(attend_kernel<T, kLanes>, blocks, kThreads, shared, stream, p);
  if (error || p.parts == 1) return error;
  return launch_early(add_parts_kernel<T>, static_cast<unsigned>(p.batch * p.heads), kThreads, 0, stream, p);
}

template <class T>
const char* launch_dtype(const AttendBlocks& p, cudaStream_t stream) {
  return p.size <= 16 * kPerLoad<T> ? launch_lanes<T, 16>(p, stream) : launch_lanes<T, 32>(p, stream);
}

}  // namespace

int64_t attend_workspace(const AttendParams& params) {
  const AttendBlocks p = blocks_of(params);
  return p.parts > 1 ? p.batch * p.heads * p.parts * (p.size + 2) : 0;
}

const char* launch_attend(const AttendParams& params, float* workspace, cudaStream_t stream) {
  if (params.batch == 0) return nullptr;
  AttendBlocks p = blocks_of(params);
  p.workspace = workspace;
  if (p.dtype == kFloat32) return launch_dtype<Float32>(p, stream);
  return p.dtype == kFloat16 ? launch_dtype<Float16>(p, stream) : launch_dtype<BFloat16>(p, stream);
}

}  // namespace hfq
