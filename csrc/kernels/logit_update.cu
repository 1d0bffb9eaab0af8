// Logit update: the gradient of the reward in the logits, stored or applied as an ascent step in place.
//
//   dReward/dz_i = q_i (G . E_i - G . e_soft) / tau,   q_i = exp(z_i / tau - logsumexp)
//
// First this kernel, inner[n] = G[rows[n]] . soft[n] in fp32: the two terms of the bracket cancel, so e_soft
// is taken unblended and unrounded. Then the product G E^T with the rest as its epilogue
// (logit_update_sm80.cu, logit_update_simt.cu).
//
// Layouts  G [R, d] in E's dtype, soft fp32 [N, d], inner fp32 [N] (workspace).
// Floor    of this kernel: N d (sizeof(G) + 4) bytes, a thousandth of the product's.
// Tiling   one warp per row, lanes strided over d, a shuffle tree: the order is fixed.
#include "logit_update.cuh"

namespace entrgi {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) inner_product_kernel(const LogitUpdateParams p) {
  const int64_t n = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (n >= p.n) return;
  const int64_t row = grad_row(p, n);
  if (row < 0) return;
  const T* grad = static_cast<const T*>(p.grad) + row * p.grad_stride;
  const float* soft = p.soft + n * p.soft_stride;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t k = lane; k < p.dim; k += 32) sum = fmaf(to_float(grad[k]), soft[k], sum);
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(~0u, sum, delta);
  if (lane == 0) static_cast<float*>(p.workspace)[n] = sum;
}

}  // namespace

cudaError_t logit_update(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  const bool is_float = p.embedding_dtype == DType::kFloat32;
  const bool needs_moments = p.rule == UpdateRule::kAdam && !(p.step == 1 && p.last);
  if (plan.kernel != (is_float ? Kernel::kLogitUpdateSimt : Kernel::kLogitUpdateSm80) || p.vocab < 1 ||
      p.dim < 1 || (needs_moments && (p.exp_avg == nullptr || p.exp_avg_sq == nullptr))) {
    return cudaErrorInvalidValue;
  }
  if (p.n == 0) return cudaSuccess;
  const auto inner_product = [&](auto kernel) {
    const unsigned grid = static_cast<unsigned>((p.n + kThreads / 32 - 1) / (kThreads / 32));
    kernel<<<grid, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  };
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.embedding_dtype) {
    case DType::kBFloat16:
      error = inner_product(inner_product_kernel<__nv_bfloat16>);
      break;
    case DType::kFloat16:
      error = inner_product(inner_product_kernel<__half>);
      break;
    case DType::kFloat32:
      error = inner_product(inner_product_kernel<float>);
      break;
  }
  if (error != cudaSuccess) return error;
  return is_float ? logit_update_simt(p, plan, stream) : logit_update_sm80(p, plan, stream);
}

}  // namespace entrgi
