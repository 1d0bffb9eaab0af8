// Relaxed embedding: output[rows[n]] = soft + w (E[x] - soft) and soft = q E, q = softmax(z / tau).
//
// A matrix product over parts of the vocabulary (relaxed_embedding_sm90.cu, _sm80.cu, _simt.cu, _matmul.cu),
// then this reduction: one thread per output element sums the parts in order, which makes the result
// reproducible, and blends in the gathered row of the hard token.
//
// Layouts  partial fp32 [splits, N, pitch] (workspace), soft fp32 [N, d]
//          output [R, d] and E [V, d] in E's dtype
//
// Floor    of the reduction: splits N d 4 bytes read, mostly from L2.
//
// Considered: the last CTA of a tile reducing in the product's own launch (one launch less; needs counters
// that are zeroed between launches, and its result is late by the slowest CTA anyway).
#include <math_constants.h>

#include "../detail/launch.h"
#include "../detail/numeric.cuh"
#include "relaxed_embedding.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_and_blend_kernel(const RelaxedEmbeddingParams p, int64_t pitch, int splits) {
  const unsigned blocks_per_row = static_cast<unsigned>((p.dim + kThreads - 1) / kThreads);
  const int64_t n = blockIdx.x / blocks_per_row;
  const int64_t column = int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x;
  const int64_t row = output_row(p, n);
  if (row < 0 || column >= p.dim) return;

  const float* partial = static_cast<const float*>(p.workspace) + n * pitch + column;
  float soft = 0.f;
#pragma unroll 16  // reads in flight: with few rows, latency is all there is
  for (int split = 0; split < splits; ++split) soft += partial[split * p.n * pitch];
  fp32(p.soft.data)[n * p.soft.stride + column] = soft;

  float value = soft;
  if (p.hard_tokens != nullptr) {
    const int64_t token = p.hard_tokens[n];
    if (token >= 0 && token < p.vocab) {
      const float hard =
          to_float(static_cast<const T*>(p.embedding.data)[token * p.embedding.stride + column]);
      value = soft + (p.weight == nullptr ? 1.f : fp32(p.weight)[n]) * (hard - soft);
    } else {
      value = CUDART_NAN_F;
    }
  }
  static_cast<T*>(p.output.data)[row * p.output.stride + column] = from_float<T>(value);
}

cudaError_t product(const RelaxedEmbeddingParams& p, const Plan& plan, Gemm gemm, cudaStream_t stream) {
  const bool is_float = p.embedding.dtype == DType::kFloat32;
  const bool takes_float =
      plan.kernel == Kernel::kRelaxedEmbeddingSimt || plan.kernel == Kernel::kRelaxedEmbeddingMatmul;
  if (is_float != takes_float) return cudaErrorInvalidValue;
  switch (plan.kernel) {
    case Kernel::kRelaxedEmbeddingSm90:
      return relaxed_embedding_sm90(p, plan, stream);
    case Kernel::kRelaxedEmbeddingSm80:
      return relaxed_embedding_sm80(p, plan, stream);
    case Kernel::kRelaxedEmbeddingSimt:
      return relaxed_embedding_simt(p, plan, stream);
    case Kernel::kRelaxedEmbeddingMatmul:
      return relaxed_embedding_matmul(p, plan, gemm, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t relaxed_embedding(const RelaxedEmbeddingParams& p, const Plan& plan, Gemm gemm,
                              cudaStream_t stream) {
  if (plan.splits < 1 || p.vocab < 1 || p.dim < 1) return cudaErrorInvalidValue;
  if (p.n == 0) return cudaSuccess;
  if (const cudaError_t error = product(p, plan, gemm, stream); error != cudaSuccess) return error;

  const auto kernel = choose([&]<typename T>() { return &compiled<reduce_and_blend_kernel<T>>; },
                             any_type(p.embedding.dtype));
  return launch(kernel, {p.n * ceil_div(p.dim, kThreads), kThreads}, stream, p, pitch_of(p.dim),
                static_cast<int>(plan.splits));
}

}  // namespace entrgi
