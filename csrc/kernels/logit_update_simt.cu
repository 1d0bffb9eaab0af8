// Logit update, the product and its epilogue for fp32 E: full fp32 on the ordinary cores.
//
//   G [R, d] fp32 gathered by row, E [V, d] fp32, z [N, V] bf16 / fp16 / fp32, moments fp32 [N, V]
//
// Floor    V d 4 bytes + z and the moments read and written once; 2 N V d FLOPs on the ordinary cores.
//
// Tiling   64 x 64 outputs per CTA (detail/simt_gemm.cuh); a thread's four columns of a row are consecutive,
//          so the epilogue moves 8 or 16 bytes at a time. Row tiles fastest: CTAs sharing rows of E run
//          together.
//
// Considered: see relaxed_embedding_simt.cu.
#include "detail/simt_gemm.cuh"
#include "logit_update.cuh"

namespace entrgi {
namespace {

template <typename Z>
__global__ void __launch_bounds__(kSimtThreads)
    logit_update_simt_kernel(const LogitUpdateParams p, const UpdateScalars scalars) {
  __shared__ SimtShared shared;
  __shared__ int64_t row_offset[kSimtTile];
  const int64_t tiles_m = (p.n + kSimtTile - 1) / kSimtTile;
  const int64_t first_row = blockIdx.x % tiles_m * kSimtTile;
  const int64_t first_column = blockIdx.x / tiles_m * kSimtTile;
  if (threadIdx.x < kSimtTile) {
    const int64_t n = first_row + threadIdx.x;
    const int64_t row = n < p.n ? grad_row(p, n) : -1;
    row_offset[threadIdx.x] = row < 0 ? -1 : row * p.grad_stride;
  }
  __syncthreads();

  const float* grad = static_cast<const float*>(p.grad);
  const float* embedding = static_cast<const float*>(p.embedding) + first_column * p.embedding_stride;
  float accumulator[4][4] = {};
  simt_product<true>(
      accumulator, 0, p.dim, shared,
      [&](int row, int64_t k) { return row_offset[row] < 0 ? 0.f : grad[row_offset[row] + k]; },
      [&](int64_t k, int column) {
        return first_column + column < p.vocab ? embedding[column * p.embedding_stride + k] : 0.f;
      });

  const AnyColumns columns(p, scalars, first_column + threadIdx.x % 16 * 4);
  UpdateRow rows[4];
  FourLogits<Z, AnyColumns> logits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    rows[i] = load_update_row(p, first_row + threadIdx.x / 16 * 4 + i);
    if (!rows[i].padding) logits[i].load(p, rows[i].n, columns);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (rows[i].n < p.n) logits[i].apply(p, scalars, rows[i], columns, accumulator[i]);
  }
}

}  // namespace

cudaError_t logit_update_simt(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.threads != kSimtThreads || plan.block_m != kSimtTile || plan.block_n != kSimtTile) {
    return cudaErrorInvalidValue;
  }
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(plan.grid), kSimtThreads, 0, stream>>>(p, UpdateScalars(p));
    return cudaGetLastError();
  };
  switch (p.logits_dtype) {
    case DType::kBFloat16:
      return launch(logit_update_simt_kernel<__nv_bfloat16>);
    case DType::kFloat16:
      return launch(logit_update_simt_kernel<__half>);
    case DType::kFloat32:
      return launch(logit_update_simt_kernel<float>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace entrgi
