// How many clusters of thread blocks run at a time, by their size and each block's shared memory. Multiprocessors that are left over by groups
// of them stay idle: plans ask the same before they cut a product (active_clusters, kernels/cuda/launch.h).
//
//   nvcc -arch=native -run -o /tmp/gpu_clusters benchmarks/gpu_clusters.cu
#include <cstdio>

__global__ void nothing() {}

static bool failed(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}

int main() {
  constexpr int kKilobytes[] = {50, 100, 227};
  cudaDeviceProp properties;
  if (failed(cudaGetDeviceProperties(&properties, 0))) return 1;
  std::printf("%s, %d multiprocessors; clusters at a time\nblocks", properties.name, properties.multiProcessorCount);
  for (int kilobytes : kKilobytes) std::printf("  %3d KB", kilobytes);
  if (failed(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, kKilobytes[2] << 10))) return 1;
  for (unsigned blocks = 1; blocks <= 8; ++blocks) {
    std::printf("\n%6u", blocks);
    for (int kilobytes : kKilobytes) {
      cudaLaunchAttribute cluster;
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = blocks;
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      cudaLaunchConfig_t how = {};
      how.gridDim = dim3(blocks), how.blockDim = dim3(128), how.dynamicSmemBytes = kilobytes << 10;
      how.attrs = &cluster, how.numAttrs = 1;
      int active = 0;
      if (failed(cudaOccupancyMaxActiveClusters(&active, nothing, &how))) return 1;
      std::printf("  %6d", active);
    }
  }
  std::printf("\n");
  return 0;
}
