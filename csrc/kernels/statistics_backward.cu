// Gradient of the vocabulary pass in the logits, elementwise:
//
//   dz = g_lse q / tau - g_H p (log p + H) - g_Htau q (log q + H_tau) / tau
//   p = exp(z - logsumexp at temperature 1),  q = exp(z / tau - logsumexp)
//
// Layout   z [N, V] bf16 / fp16 / fp32, gradient [N, V] dense in z's dtype, the rest fp32 vectors [N].
//
// Floor    2 N V sizeof(z) bytes.
//
// Tiling   one CTA per 2,048 ids of a row; coalesced scalar accesses, eight per thread, whatever the
//          alignment.
//
// Considered: vector accesses; the sampler never calls this, autograd on statistics does.
#include <algorithm>
#include <cfloat>

#include "detail/launch.h"
#include "detail/numeric.cuh"
#include "kernels.h"
#include "plan_families.h"

namespace entrgi {
namespace {

constexpr int kThreads = kElementwise.threads, kPerBlock = kElementwise.block_n;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    statistics_backward_kernel(const LogitStatisticsBackwardParams p, float inverse_tau) {
  const int64_t blocks_per_row = (p.vocab + kPerBlock - 1) / kPerBlock;
  const int64_t n = blockIdx.x / blocks_per_row;
  const float grad_lse = p.grad_logsumexp == nullptr ? 0.f : fp32(p.grad_logsumexp)[n] * inverse_tau;
  const float grad_entropy = p.grad_entropy == nullptr ? 0.f : fp32(p.grad_entropy)[n];
  const float grad_tempered =
      p.grad_tempered_entropy == nullptr ? 0.f : fp32(p.grad_tempered_entropy)[n] * inverse_tau;
  const float lse = fp32(p.logsumexp)[n], unit_lse = fp32(p.unit_logsumexp)[n];
  const float entropy = fp32(p.entropy)[n], tempered = fp32(p.tempered_entropy)[n];
  const T* logits = static_cast<const T*>(p.logits.data) + n * p.logits.stride;
  T* gradient = static_cast<T*>(p.gradient) + n * p.vocab;
  const int64_t begin = blockIdx.x % blocks_per_row * kPerBlock, end = min(begin + kPerBlock, p.vocab);
#pragma unroll 4
  for (int64_t id = begin + threadIdx.x; id < end; id += kThreads) {
    const float z = to_float(logits[id]);
    const float log_p = z - unit_lse, log_q = log_softmax(z, inverse_tau, lse);
    const float prob = expf(log_p), q = expf(log_q);
    float dz = 0.f;  // where a probability is 0 its logarithm may be -inf
    if (prob != 0) dz -= grad_entropy * prob * (log_p + entropy);
    if (q != 0) dz += q * (grad_lse - grad_tempered * (log_q + tempered));
    gradient[id] = from_float<T>(dz);
  }
}

}  // namespace

cudaError_t logit_statistics_backward(const LogitStatisticsBackwardParams& p, const Plan& plan,
                                      cudaStream_t stream) {
  if (plan.kernel != Kernel::kStatisticsBackward) return cudaErrorInvalidValue;
  if (p.n == 0) return cudaSuccess;
  const float inverse_tau = static_cast<float>(std::min<double>(1 / p.temperature, FLT_MAX));
  const auto kernel = choose([&]<typename T>() { return &compiled<statistics_backward_kernel<T>>; },
                             any_type(p.logits.dtype));
  return launch(kernel, {plan.grid, kThreads}, stream, p, inverse_tau);
}

}  // namespace entrgi
