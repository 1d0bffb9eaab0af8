#include "launch.h"

#include <limits>

#include "../kernels.h"

namespace entrgi {
namespace {

CompiledKernel* first_kernel = nullptr;  // filled while the library loads, by one thread

}  // namespace

CompiledKernel::CompiledKernel(const void* function, int64_t most_shared_bytes)
    : function_(function), most_shared_bytes_(static_cast<int>(most_shared_bytes)), next_(first_kernel) {
  first_kernel = this;
}

cudaError_t CompiledKernel::prepare(int device) {
  if (prepared_.find(device) != nullptr) return cudaSuccess;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, function_);  // loads it
  if (error == cudaSuccess && most_shared_bytes_ > 0) {
    error = cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes_);
  }
  if (error == cudaSuccess && most_shared_bytes_ > 0) {
    error = cudaFuncSetAttribute(function_, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) prepared_.add(device, true);
  return reported(error);
}

cudaError_t CompiledKernel::launch(const LaunchConfig& config, void** arguments, cudaStream_t stream) {
  if (config.grid < 1 || config.grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return reported(error);
  if (const cudaError_t error = prepare(device); error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = cluster_attribute(config.cluster);
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.grid));
  launch.blockDim = dim3(static_cast<unsigned>(config.threads));
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = config.cluster > 1 ? 1 : 0;
  return reported(cudaLaunchKernelExC(&launch, function_, arguments));
}

cudaError_t warm_up() {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return reported(error);
  for (CompiledKernel* kernel = first_kernel; kernel != nullptr; kernel = kernel->next()) {
    if (const cudaError_t error = kernel->prepare(device); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace entrgi
