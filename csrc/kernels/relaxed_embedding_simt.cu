// Relaxed embedding, the matrix product for fp32 E: partial[split] = q E in full fp32.
//
//   q = exp(z / tau - logsumexp)    z [N, V] bf16 / fp16 / fp32, E [V, d] fp32, both row-major
//
// Layout and splits as in relaxed_embedding_sm80.cu.
//
// Floor    V d 4 + N V sizeof(z) bytes; 2 N V d FLOPs on the ordinary cores (67 TFLOP/s on an H100, which
//          bind from some 40 rows on).
//
// Tiling   64 x 64 outputs per CTA (detail/simt_gemm.cuh), q computed once per CTA on its way to shared
//          memory.
//
// Considered: three TF32 products in place of one in fp32. The models that guide are 16-bit, and fp32 is what
// they are checked against: plain arithmetic is worth more here.
#include "detail/numeric.cuh"
#include "detail/simt_gemm.cuh"
#include "relaxed_embedding.cuh"

namespace entrgi {
namespace {

template <typename Z>
__global__ void __launch_bounds__(kSimtThreads)
    relaxed_embedding_simt_kernel(const RelaxedEmbeddingParams p, const SoftmaxScale scale, int64_t pitch,
                                  int splits) {
  __shared__ SimtShared shared;
  __shared__ float lse[kSimtTile];
  __shared__ bool present[kSimtTile];
  const int64_t tiles_m = (p.n + kSimtTile - 1) / kSimtTile, tiles_n = (p.dim + kSimtTile - 1) / kSimtTile;
  const int64_t first_row = blockIdx.x % tiles_m * kSimtTile;
  const int64_t first_column = blockIdx.x / tiles_m % tiles_n * kSimtTile;
  const int64_t split = blockIdx.x / (tiles_m * tiles_n);
  const int64_t steps = (p.vocab + kSimtStep - 1) / kSimtStep,
                steps_per_split = (steps + splits - 1) / splits;
  const int64_t first = split * steps_per_split * kSimtStep;
  const int64_t last = min(first + steps_per_split * kSimtStep, p.vocab);

  if (threadIdx.x < kSimtTile) {
    const int64_t n = first_row + threadIdx.x;
    present[threadIdx.x] = n < p.n && output_row(p, n) >= 0;
    lse[threadIdx.x] = present[threadIdx.x] ? p.logsumexp[n] : 0.f;
  }
  __syncthreads();

  const Z* logits = static_cast<const Z*>(p.logits) + first_row * p.logits_stride;
  const float* embedding = static_cast<const float*>(p.embedding) + first_column;
  float accumulator[4][4] = {};
  simt_product<false>(
      accumulator, first, last, shared,
      [&](int row, int64_t id) {
        if (!present[row]) return 0.f;
        return expf(log_softmax(to_float(logits[row * p.logits_stride + id]), scale.inverse_tau, lse[row]));
      },
      [&](int64_t id, int column) {
        return first_column + column < p.dim ? embedding[id * p.embedding_stride + column] : 0.f;
      });

  float* partial = static_cast<float*>(p.workspace) + split * p.n * pitch;
  const int64_t column = first_column + threadIdx.x % 16 * 4;
  if (column >= p.dim) return;  // the pitch is a multiple of four: four columns never leave the row
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t n = first_row + threadIdx.x / 16 * 4 + i;
    if (n < p.n) {
      // As an intrinsic: the compiler stores a float4 of four registers one by one.
      __stcg(reinterpret_cast<float4*>(partial + n * pitch + column),
             make_float4(accumulator[i][0], accumulator[i][1], accumulator[i][2], accumulator[i][3]));
    }
  }
}

}  // namespace

cudaError_t relaxed_embedding_simt(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.threads != kSimtThreads || plan.block_m != kSimtTile || plan.block_n != kSimtTile ||
      plan.block_k != kSimtStep) {
    return cudaErrorInvalidValue;
  }
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(plan.grid), kSimtThreads, 0, stream>>>(
        p, SoftmaxScale(p.temperature), pitch_of(p.dim), static_cast<int>(plan.splits));
    return cudaGetLastError();
  };
  switch (p.logits_dtype) {
    case DType::kBFloat16:
      return launch(relaxed_embedding_simt_kernel<__nv_bfloat16>);
    case DType::kFloat16:
      return launch(relaxed_embedding_simt_kernel<__half>);
    case DType::kFloat32:
      return launch(relaxed_embedding_simt_kernel<float>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace entrgi
