// The current device as the launch plans see it.
#include <algorithm>
#include <string_view>

#include "detail/launch.h"
#include "kernels.h"

namespace entrgi {
namespace {

// Never launched: a CTA of it fills a multiprocessor, as those of the products for Hopper do.
constexpr int kFillingBytes = 200 * 1024;
__global__ void filling_kernel() {}

// Clusters that stay within a group of multiprocessors, of which some have more than others, and some none
// free where the device is shared: only the driver knows how many fit. 0 where it launches none.
cudaError_t count_clusters(int size, int* clusters) {
  cudaLaunchAttribute attribute = cluster_attribute(size);
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(size);
  config.blockDim = 128;
  config.dynamicSmemBytes = kFillingBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = reported(cudaOccupancyMaxActiveClusters(clusters, &filling_kernel, &config));
  if (error == cudaErrorInvalidClusterSize) *clusters = 0;
  return error == cudaErrorInvalidClusterSize ? cudaSuccess : error;
}

constexpr bool has_code(std::string_view architecture) {
  std::string_view list = ENTRGI_CUDA_ARCHITECTURES;
  while (!list.empty()) {
    const size_t end = std::min(list.find(','), list.size());
    if (list.substr(0, end) == architecture) return true;
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return false;
}

// Code for sm_90a runs on compute capability 9.0 alone, the PTX of compute_90 there and on everything newer;
// what cannot launch clusters of eight (a part of a device) or has less shared memory runs what was compiled
// for sm_80, or the same from that PTX.
int newest_code(int capability) {
  if (capability == 90 && (has_code("sm_90a") || has_code("compute_90a"))) return 90;
  if (capability >= 90 && has_code("compute_90")) return 100;
  return capability < 80 ? capability : 80;
}

cudaError_t ask(int index, Device* device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->num_sms, cudaDevAttrMultiProcessorCount, index);
  }
  if (error != cudaSuccess) return reported(error);
  const int capability = 10 * major + minor;
  device->arch = std::min(newest_code(capability), 80);
  int shared_bytes = 0;
  error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error != cudaSuccess) return reported(error);
  if (newest_code(capability) < 90 || shared_bytes < kHopperSharedBytes) return cudaSuccess;
  error = compiled<filling_kernel, kFillingBytes>.prepare(index);
  if (error == cudaSuccess) error = count_clusters(2, &device->clusters_of_2);
  if (error == cudaSuccess) error = count_clusters(4, &device->clusters_of_4);
  if (error == cudaSuccess) error = count_clusters(8, &device->clusters_of_8);
  if (error == cudaSuccess && device->clusters_of_8 > 0) device->arch = newest_code(capability);
  return error;
}

}  // namespace

cudaError_t current_device(Device* device) {
  static PerDevice<Device> known;
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return reported(error);
  if (const Device* found = known.find(index)) {
    *device = *found;
    return cudaSuccess;
  }
  const cudaError_t error = ask(index, device);
  if (error == cudaSuccess) known.add(index, *device);
  return error;
}

}  // namespace entrgi
