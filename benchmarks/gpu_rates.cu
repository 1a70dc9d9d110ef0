// What plans of wgmma.cu and wide.cu reckon with, measured: clocks of an instruction of four warps by how many tokens it has, alone and with other
// instructions beside it; bytes a clock that come from L2 to a multiprocessor by cp.async; and clocks of what wide_digits.h is made of.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I kernels/cuda -run -o /tmp/gpu_rates benchmarks/gpu_rates.cu
#include <cstdint>
#include <cstdio>
#include <vector>

#include "fragments.h"
#include "wgmma.h"
#include "wgmma_block.h"

namespace hfq {
namespace {

constexpr int kRounds = 256, kOfRound = 4;
constexpr int kKilobytes = 96;  // of shared memory of a thread block

bool failed(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}

// Clocks of a thread block, by its first thread.
__device__ void store_clocks(int64_t begin, int64_t* clocks) {
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
}

// Operands are zeros: more instructions fit into a clock than with numbers that change, if the GPU gets hot. `kBeside`: multiply-adds of pairs of
// 16-bit numbers for each wgmma, as many as make its operands.
template <int kTokens, int kBeside>
__global__ void multiply(int64_t* clocks, float* to) {
  uint8_t* const memory = swizzled_memory();
  for (int i = threadIdx.x; i < kTokens * 64; i += blockDim.x) reinterpret_cast<uint32_t*>(memory)[i] = 0;
  fence_proxy_async();
  __syncthreads();
  const uint64_t x = x_descriptor(shared_address(memory));
  float sums[kTokens / 2] = {};
  uint32_t a[4] = {}, numbers[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) numbers[i] = threadIdx.x + i;
  const int64_t begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kOfRound; ++i) wgmma(BFloat16{}, sums, a, x + 2 * i, true);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < kBeside * kOfRound; ++i) numbers[i % 8] = fma2(BFloat16{}, numbers[i % 8], numbers[(i + 1) % 8], numbers[(i + 3) % 8]);
    wgmma_wait<1>();
  }
  wgmma_wait<0>(sums);
  store_clocks(begin, clocks);
  float all = 0;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) all += sums[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) all += static_cast<float>(numbers[i]);
  to[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

// 16 KB a round, of four rounds at a time. `apart`: bytes from what a block reads to what the next one does; 0: all read the same.
__global__ void copy(const uint8_t* from, int64_t apart, int64_t mask, int64_t* clocks) {
  const uint32_t to = shared_address(swizzled_memory()) + 16 * threadIdx.x;
  const int64_t begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const uint8_t* const own = from + ((blockIdx.x * apart + (int64_t{round} << 14)) & mask) + 16 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; ++i) cp_async(to + (round % 4 << 14) + i * 2048, own + i * 2048);
    cp_async_commit();
    cp_async_wait<3>();
  }
  cp_async_wait<0>();
  store_clocks(begin, clocks);
}

// What a thread does to one of eight words, none of which waits for another.
struct Permute {
  static constexpr const char* kName = "permute bytes";
  static __device__ void on(uint32_t& word, uint32_t other) { word = permute_bytes_or_signs(word, other, word); }
};
struct Halve {
  static constexpr const char* kName = "upper half by a product";
  static __device__ void on(uint32_t& word, uint32_t other) { word = upper_half(word); }
};
struct PermuteAndHalve {
  static constexpr const char* kName = "two permutations, a LOP3, an upper half";
  static __device__ void on(uint32_t& word, uint32_t other) {
    word = permute_bytes_or_signs(word, other, word) ^ permute_bytes_or_signs(other, word, upper_half(word));
  }
};
struct MultiplyBytes {
  static constexpr const char* kName = "mma of bytes";
  static __device__ void on(uint32_t& word, uint32_t other) {
    int32_t d[4] = {static_cast<int32_t>(word), 1, 2, 3};
    const uint32_t a[4] = {other, other, other, other};
    mma(d, a, other, other);
    word = static_cast<uint32_t>(d[0]);
  }
};

template <class Work>
__global__ void repeat(int64_t* clocks, uint32_t* to) {
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) words[i] = 0x01234567u * (threadIdx.x + i);
  const uint32_t other = threadIdx.x << 16;
  const int64_t begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 8; ++i) Work::on(words[i], other);
  store_clocks(begin, clocks);
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) all ^= words[i];
  to[blockIdx.x * blockDim.x + threadIdx.x] = all;
}

struct Gpu {
  int multiprocessors = 0;
  int64_t* clocks = nullptr;
  void* memory = nullptr;

  // Of the slowest block, the second time.
  template <class Launch>
  double slowest(int blocks, const Launch& launch) const {
    std::vector<int64_t> found(blocks);
    for (int i = 0; i < 2; ++i) launch();
    if (failed(cudaGetLastError()) || failed(cudaDeviceSynchronize())) return -1;
    cudaMemcpy(found.data(), clocks, found.size() * sizeof(int64_t), cudaMemcpyDeviceToHost);
    int64_t most = 0;
    for (int64_t one : found) most = one > most ? one : most;
    return static_cast<double>(most);
  }
};

template <int kTokens, int kBeside>
void print_products(const Gpu& gpu) {
  std::printf("%6d %8d", kTokens, kBeside);
  cudaFuncSetAttribute(multiply<kTokens, kBeside>, cudaFuncAttributeMaxDynamicSharedMemorySize, kKilobytes << 10);
  for (int groups : {1, 2, 4}) {
    if (groups * kTokens > 512) continue;  // registers
    const double clocks = gpu.slowest(gpu.multiprocessors, [&] {
      multiply<kTokens, kBeside><<<gpu.multiprocessors, 128 * groups, kKilobytes << 10>>>(gpu.clocks, static_cast<float*>(gpu.memory));
    });
    const double each = clocks / (kRounds * kOfRound);
    std::printf("   %6.1f (%4.0f)", each, 64.0 * 16 * kTokens * groups / each);
  }
  std::printf("\n");
}

template <int kBeside>
void print_all(const Gpu& gpu) {
  print_products<16, kBeside>(gpu), print_products<32, kBeside>(gpu);
  print_products<64, kBeside>(gpu), print_products<128, kBeside>(gpu), print_products<256, kBeside>(gpu);
}

// Of a scheduler, with four warps.
template <class Work>
void print_clocks(const Gpu& gpu) {
  const double clocks = gpu.slowest(
      gpu.multiprocessors, [&] { repeat<Work><<<gpu.multiprocessors, 512>>>(gpu.clocks, static_cast<uint32_t*>(gpu.memory)); });
  std::printf("%-34s %5.2f\n", Work::kName, clocks / (4 * 8 * kRounds));
}

int run() {
  Gpu gpu;
  cudaDeviceProp properties;
  if (failed(cudaGetDeviceProperties(&properties, 0))) return 1;
  gpu.multiprocessors = properties.multiProcessorCount;
  constexpr int64_t kBytes = int64_t{32} << 20;  // L2 has more
  if (failed(cudaMalloc(&gpu.clocks, 2 * gpu.multiprocessors * sizeof(int64_t))) || failed(cudaMalloc(&gpu.memory, kBytes))) return 1;
  if (failed(cudaMemset(gpu.memory, 0, kBytes))) return 1;
  std::printf("%s\n\nclocks of a wgmma with so many tokens, and so many others beside it (products a clock) of 1, 2 and 4 groups\n", properties.name);
  print_all<0>(gpu), print_all<8>(gpu), print_all<16>(gpu);
  std::printf("\nbytes a clock of each multiprocessor, from L2 by cp.async\n");
  cudaFuncSetAttribute(copy, cudaFuncAttributeMaxDynamicSharedMemorySize, kKilobytes << 10);
  const struct {
    const char* name;
    int64_t apart, mask;
  } ways[] = {{"each its own", kBytes >> 8, kBytes - 1}, {"all the same 1 MB", 0, (1 << 20) - 1}};
  for (const auto& way : ways)
    for (int blocks : {1, 2}) {
      const double clocks = gpu.slowest(gpu.multiprocessors * blocks, [&] {
        copy<<<gpu.multiprocessors * blocks, 128, kKilobytes << 10>>>(static_cast<const uint8_t*>(gpu.memory), way.apart, way.mask, gpu.clocks);
      });
      std::printf("%-18s %d blocks  %5.1f\n", way.name, blocks, blocks * 16384.0 * kRounds / clocks);
    }
  std::printf("\nclocks of a scheduler\n");
  print_clocks<Permute>(gpu), print_clocks<Halve>(gpu), print_clocks<PermuteAndHalve>(gpu), print_clocks<MultiplyBytes>(gpu);
  return 0;
}

}  // namespace
}  // namespace hfq

int main() { return hfq::run(); }
