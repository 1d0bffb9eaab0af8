// The one way from a launcher to the device: a grid that fits, attributes set once for every kernel and
// device, no error left behind for whoever launches next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "plan.h"

namespace entrgi {

// launch.template operator()<T>() with the element type of a matrix.
template <typename Launch>
cudaError_t with_type(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kBFloat16:
      return launch.template operator()<__nv_bfloat16>();
    case DType::kFloat16:
      return launch.template operator()<__half>();
    case DType::kFloat32:
      return launch.template operator()<float>();
    default:
      return cudaErrorInvalidValue;
  }
}

// The same for a matrix of 16-bit elements.
template <typename Launch>
cudaError_t with_16_bit_type(DType dtype, const Launch& launch) {
  if (size_of(dtype) != 2) return cudaErrorInvalidValue;
  return dtype == DType::kBFloat16 ? launch.template operator()<__nv_bfloat16>()
                                   : launch.template operator()<__half>();
}

struct LaunchConfig {
  int64_t grid;
  int threads;
  int64_t shared_bytes = 0;  // dynamic
  int64_t cluster = 1;       // CTAs of a cluster
};

// The error, and the runtime's record of it cleared: whatever is launched next by `<<<>>>`, here or in torch,
// would be blamed for it.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// A kernel that was compiled, and what it must be told before its first launch on a device.
struct KernelEntry {
  const void* function;
  int most_shared_bytes;  // dynamic shared memory of its largest plan
  std::atomic<uint64_t> prepared{0};
  KernelEntry* next;

  KernelEntry(const void* kernel, int64_t most_shared_bytes);
  // Sets its attributes on the current device unless that was done before. cudaFuncSetAttribute may wait for
  // copies in flight, and loads the kernel's module, which a graph capture may refuse.
  cudaError_t prepare(int device);
};

// The entry of a kernel, on the list that warm_up goes through since the library was loaded.
template <auto kKernel, int64_t kMostSharedBytes>
inline KernelEntry kernel_entry{reinterpret_cast<const void*>(kKernel), kMostSharedBytes};

cudaError_t launch_entry(KernelEntry& entry, const LaunchConfig& config, void** arguments,
                         cudaStream_t stream);

namespace detail {
template <typename... Parameters, typename... Arguments>
cudaError_t launch_as(void (*)(Parameters...), KernelEntry& entry, const LaunchConfig& config,
                      cudaStream_t stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  return [&](std::remove_cv_t<Parameters>... values) {
    void* pointers[] = {&values...};
    return launch_entry(entry, config, pointers, stream);
  }(arguments...);
}
}  // namespace detail

// Launches kKernel, whose plans ask for at most kMostSharedBytes of dynamic shared memory. A grid of no CTAs
// or of more than a device counts is cudaErrorInvalidConfiguration.
template <auto kKernel, int64_t kMostSharedBytes = 0, typename... Arguments>
cudaError_t launch_kernel(const LaunchConfig& config, cudaStream_t stream, const Arguments&... arguments) {
  return detail::launch_as(kKernel, kernel_entry<kKernel, kMostSharedBytes>, config, stream, arguments...);
}

}  // namespace entrgi
