// The current device as the launch plans see it.
#include <cuda_runtime_api.h>

#include <cstring>

#include "kernels.h"

namespace entrgi {

// Code for sm_90a runs on compute capability 9.0 alone; every other device runs what was compiled for sm_80
// (or the PTX of compute_80), whatever it is.
cudaError_t current_device(Device* device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->num_sms, cudaDevAttrMultiProcessorCount, index);
  }
  const int capability = 10 * major + minor;
  const bool hopper = capability == 90 && std::strstr(ENTRGI_CUDA_ARCHITECTURES, "90a") != nullptr;
  device->arch = hopper ? 90 : capability < 80 ? capability : 80;
  return error;
}

}  // namespace entrgi
