// Relaxed embedding, the matrix product for fp32 E and many rows: partial = q E by the caller's fp32 product.
//
//   for each chunk of ids   q [N, ids] = exp(z / tau - logsumexp) in fp32, 0 in rows of padding (this kernel)
//                           partial [N, pitch] (+)= q E[ids]                                   (the caller's)
//
// Layouts  workspace: partial [N, pitch], q [N, block_n]. z [N, V] bf16 / fp16 / fp32, E [V, d] fp32.
//
// Floor    of this kernel: N V (sizeof(z) + 4) bytes, and the product reads q again.
//
// Tiling   2,048 ids of one row per CTA, a thread's eight loads in flight.
//
// Considered: the whole q at once (N V 4 bytes of scratch: 311 MB at N = 512, V = 152k, counted);
// relaxed_embedding_simt.cu, which writes no q and is better below 128 rows, where E binds.
#include "../detail/launch.h"
#include "../detail/matmul_chunk.h"
#include "../detail/numeric.cuh"
#include "relaxed_embedding.cuh"

namespace entrgi {
namespace {

constexpr int kThreads = MatmulChunk::kThreads, kIdsOfThread = MatmulChunk::kIds / kThreads;

template <typename Z>
__global__ void __launch_bounds__(kThreads)
    relaxed_embedding_matmul_kernel(const RelaxedEmbeddingParams p, const SoftmaxScale scale, float* q,
                                    int64_t pitch, const MatmulChunk chunk) {
  const int64_t n = blockIdx.x / chunk.ctas;
  const int64_t begin = int64_t{blockIdx.x % chunk.ctas} * MatmulChunk::kIds + threadIdx.x;
  const bool present = output_row(p, n) >= 0;
  const float lse = present ? fp32(p.logsumexp)[n] : 0.f;
  const Z* logits = static_cast<const Z*>(p.logits.data) + n * p.logits.stride + chunk.first;
  Z z[kIdsOfThread];
#pragma unroll
  for (int i = 0; i < kIdsOfThread; ++i) {
    const int64_t id = begin + i * kThreads;
    z[i] = present && id < chunk.ids ? __ldcs(logits + id) : from_float<Z>(0.f);
  }
#pragma unroll
  for (int i = 0; i < kIdsOfThread; ++i) {
    const int64_t id = begin + i * kThreads;
    if (id >= chunk.ids) continue;
    q[n * pitch + id] = present ? expf(log_softmax(to_float(z[i]), scale.inverse_tau, lse)) : 0.f;
  }
}

}  // namespace

cudaError_t relaxed_embedding_matmul(const RelaxedEmbeddingParams& p, const Plan& plan, Gemm gemm,
                                     cudaStream_t stream) {
  if (plan.block_n < 1 || gemm == nullptr) return cudaErrorInvalidValue;
  const int64_t pitch = pitch_of(p.dim);
  float* partial = static_cast<float*>(p.workspace);
  float* q = partial + p.n * pitch;
  const auto kernel = choose([&]<typename Z>() { return &compiled<relaxed_embedding_matmul_kernel<Z>>; },
                             any_type(p.logits.dtype));
  for (int64_t first = 0; first < p.vocab; first += plan.block_n) {
    const MatmulChunk chunk = MatmulChunk::at(first, p.vocab, plan);
    const cudaError_t error = launch(kernel, {p.n * chunk.ctas, kThreads}, stream, p,
                                     SoftmaxScale(p.temperature), q, int64_t{plan.block_n}, chunk);
    if (error != cudaSuccess) return error;
    float* embedding = static_cast<float*>(p.embedding.data) + first * p.embedding.stride;
    gemm({.a = {q, plan.block_n},
          .b = {embedding, p.embedding.stride},
          .c = {partial, pitch},
          .m = p.n,
          .n = p.dim,
          .k = chunk.ids,
          .b_transposed = false,
          .accumulate = first > 0},
         stream);
  }
  return cudaSuccess;
}

}  // namespace entrgi
