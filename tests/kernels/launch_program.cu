// Exercises csrc/kernels/detail/launch.h and device.cu in front of a runtime whose questions are counted, and prints
// what happened, a line `name value` each. The functions here stand before those of the shared runtime.
#include <dlfcn.h>

#include <climits>
#include <cstdio>
#include <cstdlib>

#include "kernels/detail/launch.h"
#include "kernels/kernels.h"

namespace {
int attributes_set = 0, clusters_asked = 0;

template <typename Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
}  // namespace

extern "C" cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  ++attributes_set;
  return real<cudaError_t (*)(const void*, cudaFuncAttribute, int)>("cudaFuncSetAttribute")(function,
                                                                                            attribute, value);
}

extern "C" cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                      const cudaLaunchConfig_t* config) {
  ++clusters_asked;
  const int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  *clusters = size == 8 ? from_environment("EIGHTS", 16) : size == 4 ? from_environment("FOURS", 32) : 66;
  return *clusters > 0 ? cudaSuccess : cudaErrorInvalidClusterSize;
}

namespace {
constexpr int64_t kMost = 100 * 1024;
__global__ void add_kernel(int* to, const int value) {
  extern __shared__ int shared[];
  shared[threadIdx.x] = value;
  if (threadIdx.x == 0) atomicAdd(to, shared[0]);
}

cudaError_t launch(int64_t grid, int64_t shared_bytes, int* to) {
  return entrgi::launch(&entrgi::compiled<add_kernel, kMost>, {grid, 32, shared_bytes}, nullptr, to, 3);
}

void print(const char* name, int value) {
  std::printf("%s %d\n", name, value);
}
}  // namespace

int main() {
  int* sum = nullptr;
  cudaMalloc(&sum, sizeof(int));
  cudaMemset(sum, 0, sizeof(int));

  const bool warm = from_environment("WARM", 0) != 0;
  if (warm) print("warm_up", entrgi::warm_up());
  attributes_set = warm ? attributes_set : 0;
  const int before = attributes_set;
  for (int i = 0; i < 5; ++i) print("launch", launch(2, kMost, sum));
  print("attributes_set_by_launches", attributes_set - before);
  int host = 0;
  cudaMemcpy(&host, sum, sizeof(int), cudaMemcpyDeviceToHost);
  print("sum", host);

  entrgi::KernelOf<int*, int>* const none = nullptr;
  print("not_compiled", entrgi::launch(none, {1, 32}, nullptr, sum, 3));
  print("no_ctas", launch(0, 128, sum));
  print("too_many_ctas", launch(int64_t{INT_MAX} + 1, 128, sum));
  print("left_behind", cudaGetLastError());
  print("too_much_memory", launch(1, 300 * 1024, sum) != cudaSuccess);
  print("left_behind", cudaGetLastError());

  entrgi::Device device{};
  for (int i = 0; i < 3; ++i) print("device", entrgi::current_device(&device));
  print("clusters_asked", clusters_asked);
  print("arch", device.arch);
  print("clusters_of_4", device.clusters_of_4);
  print("clusters_of_8", device.clusters_of_8);
  print("left_behind", cudaGetLastError());
  return 0;
}
