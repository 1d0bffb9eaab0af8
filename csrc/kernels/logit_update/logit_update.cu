// Logit update: the gradient of the reward in the logits, stored or applied as an ascent step in place.
//
//   dReward/dz_i = q_i (G . E_i - G . e_soft) / tau,   q_i = exp(z_i / tau - logsumexp)
//
// First this kernel, inner[n] = G[rows[n]] . soft[n] in fp32: the two terms of the bracket cancel, so e_soft
// is taken unblended and unrounded. Where TMA or torch is to read G, the same pass leaves a dense copy of the
// gathered rows, with zeros for padding. Then the product G E^T with the rest as its epilogue
// (logit_update_sm90.cu, logit_update_sm80.cu, logit_update_simt.cu, logit_update_matmul.cu).
//
// Layouts  G [R, d] in E's dtype, soft fp32 [N, d], inner fp32 [N] and the copy (tiles.h).
// Floor    of this kernel: N d (2 sizeof(G) + 4) bytes, a thousandth of the product's.
// Tiling   one CTA per row, threads strided over d with eight loads in flight, a shuffle tree: the order is
//          fixed. One warp per row would take d / 128 round trips to memory: some 10 us at d = 2048, where
//          N = 8 should take 135 us in all (both assumed: 600 ns a round trip, an H200's bandwidth).
#include "../detail/launch.h"
#include "logit_update.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace logit_update_tiles;

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    inner_product_kernel(const LogitUpdateParams p, void* copy, int64_t pitch) {
  T* gathered = static_cast<T*>(copy);
  const int64_t n = blockIdx.x;
  const int64_t row = grad_row(p, n);
  if (row < 0) {
    if (gathered != nullptr) {
      for (int64_t k = threadIdx.x; k < p.dim; k += kThreads) gathered[n * pitch + k] = from_float<T>(0.f);
    }
    return;
  }
  const T* grad = static_cast<const T*>(p.grad.data) + row * p.grad.stride;
  const float* soft = fp32(p.soft.data) + n * p.soft.stride;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t k = threadIdx.x; k < p.dim; k += kThreads) {
    const T g = __ldg(grad + k);
    sum = fmaf(to_float(g), __ldg(soft + k), sum);
    if (gathered != nullptr) gathered[n * pitch + k] = g;
  }
  __shared__ float sums[kThreads / 32];
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(~0u, sum, delta);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) sum += sums[warp];
    static_cast<float*>(p.workspace)[n] = sum;
  }
}

}  // namespace

cudaError_t logit_update(const LogitUpdateParams& p, const Plan& plan, Gemm gemm, cudaStream_t stream) {
  const bool is_float = p.embedding.dtype == DType::kFloat32,
             matmul = plan.kernel == Kernel::kLogitUpdateMatmul;
  const bool needs_moments = p.rule == UpdateRule::kAdam && !(p.step == 1 && p.last);
  if (is_float != (matmul || plan.kernel == Kernel::kLogitUpdateSimt) || p.vocab < 1 || p.dim < 1 ||
      (needs_moments && (p.exp_avg.data == nullptr || p.exp_avg_sq.data == nullptr))) {
    return cudaErrorInvalidValue;
  }
  if (p.n == 0) return cudaSuccess;
  const bool gather = matmul || plan.kernel == Kernel::kLogitUpdateSm90;
  char* gathered = gather ? static_cast<char*>(p.workspace) + GatheredGrad::offset(p.n) : nullptr;
  const auto kernel =
      choose([&]<typename T>() { return &compiled<inner_product_kernel<T>>; }, any_type(p.embedding.dtype));
  const cudaError_t error = launch(kernel, {p.n, kThreads}, stream, p, gathered, GatheredGrad::pitch(p.dim));
  if (error != cudaSuccess) return error;
  switch (plan.kernel) {
    case Kernel::kLogitUpdateSm90:
      return logit_update_sm90(p, plan, stream);
    case Kernel::kLogitUpdateSm80:
      return logit_update_sm80(p, plan, stream);
    case Kernel::kLogitUpdateSimt:
      return logit_update_simt(p, plan, stream);
    case Kernel::kLogitUpdateMatmul:
      return logit_update_matmul(p, plan, gemm, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace entrgi
