// The device without anything of this package: `probe alive` allocates and writes, `probe clusters` asks how
// many clusters of a full CTA are resident at once. One JSON object, status 0; an error's name and status 1
// otherwise.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

__global__ void full_cta() {
  extern __shared__ char memory[];
  if (threadIdx.x == blockDim.x) memory[0] = 0;
}

#define CHECK(call)                                             \
  if (const cudaError_t error = (call); error != cudaSuccess) { \
    std::printf("%s\n", cudaGetErrorName(error));               \
    return 1;                                                   \
  }

int alive() {
  constexpr size_t kBytes = 64 << 20;
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, kBytes));
  CHECK(cudaMemset(memory, 1, kBytes));
  CHECK(cudaDeviceSynchronize());
  std::printf("{\"alive\": true}\n");
  return 0;
}

int clusters() {
  constexpr int kSharedBytes = 200 * 1024;  // one CTA on a multiprocessor
  CHECK(cudaFuncSetAttribute(full_cta, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  std::printf("{");
  for (int size = 1; size <= 8; size *= 2) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1024);
    config.blockDim = dim3(384);
    config.dynamicSmemBytes = kSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int resident = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&resident, full_cta, &config));
    std::printf("%s\"%d\": %d", size > 1 ? ", " : "", size, resident);
  }
  std::printf("}\n");
  return 0;
}

int main(int count, char** arguments) {
  return count > 1 && std::strcmp(arguments[1], "clusters") == 0 ? clusters() : alive();
}
