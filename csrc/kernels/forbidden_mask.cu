// A list of forbidden ids as the mask bool [V] that vocab_pass.cu reads; the cluster kernel takes the list.
//
// Floor    V bytes cleared and one written for each id: with the launches themselves some 5 us.
#include "kernels.h"
#include "launch.h"

namespace entrgi {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    forbidden_mask_kernel(const int32_t* ids, int64_t count, int64_t vocab, bool* mask) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  // Ids that do not exist forbid nothing; two threads may write the same true.
  if (i < count && ids[i] >= 0 && ids[i] < vocab) mask[ids[i]] = true;
}

}  // namespace

cudaError_t forbidden_mask(const int32_t* ids, int64_t count, int64_t vocab, bool* mask,
                           cudaStream_t stream) {
  const cudaError_t error = reported(cudaMemsetAsync(mask, 0, static_cast<size_t>(vocab), stream));
  if (error != cudaSuccess || count == 0) return error;
  return launch_kernel<forbidden_mask_kernel>({(count + kThreads - 1) / kThreads, kThreads}, stream, ids,
                                              count, vocab, mask);
}

}  // namespace entrgi
