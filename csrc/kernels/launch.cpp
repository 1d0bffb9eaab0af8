#include "launch.h"

#include <limits>

#include "kernels.h"

namespace entrgi {
namespace {

KernelEntry* first_entry = nullptr;  // filled while the library loads, by one thread

}  // namespace

KernelEntry::KernelEntry(const void* kernel, int64_t most_shared_bytes)
    : function(kernel), most_shared_bytes(static_cast<int>(most_shared_bytes)), next(first_entry) {
  first_entry = this;
}

cudaError_t KernelEntry::prepare(int device) {
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, function);  // loads it
  if (error == cudaSuccess && most_shared_bytes > 0) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes);
  }
  if (error == cudaSuccess && most_shared_bytes > 0) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) prepared.fetch_or(bit);
  return reported(error);
}

cudaError_t launch_entry(KernelEntry& entry, const LaunchConfig& config, void** arguments,
                         cudaStream_t stream) {
  if (config.grid < 1 || config.grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return reported(error);
  if (const cudaError_t error = entry.prepare(device); error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(config.grid));
  launch.blockDim = dim3(static_cast<unsigned>(config.threads));
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = config.cluster > 1 ? 1 : 0;
  return reported(cudaLaunchKernelExC(&launch, entry.function, arguments));
}

cudaError_t warm_up() {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return reported(error);
  for (KernelEntry* entry = first_entry; entry != nullptr; entry = entry->next) {
    if (const cudaError_t error = entry->prepare(device); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace entrgi
