// What the kernels of the relaxed embedding share.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "../kernels.h"

namespace entrgi {

// q = exp(z / tau - lse) as 2^((z inverse_tau - lse) log2(e)): the difference is taken before the conversion
// to base 2, where it is small for every q that counts.
struct SoftmaxScale {
  float inverse_tau;
  explicit SoftmaxScale(double temperature)
      : inverse_tau(static_cast<float>(std::min<double>(1 / temperature, FLT_MAX))) {}
};

// fp16 operands hold q 2^15: a flat row at V = 152k has q = 6.6e-6, where fp16 is subnormal and 1 % coarse.
template <typename T>
constexpr float kLog2Scale = std::is_same_v<T, __half> ? 15.f : 0.f;
template <typename T>
constexpr float kUnscale = std::is_same_v<T, __half> ? 0x1p-15f : 1.f;

#ifdef __CUDACC__
// Row of `output` that logit row n writes, or -1 for padding.
__device__ __forceinline__ int64_t output_row(const RelaxedEmbeddingParams& p, int64_t n) {
  if (p.row_index == nullptr) return n;
  const int64_t row = p.row_index[n];
  return row >= 0 && row < p.target_rows ? row : -1;
}
#endif

// The matrix products: partial [splits, N, pitch] into the workspace. What they leave in rows of padding is
// not used, whatever those hold.
cudaError_t relaxed_embedding_sm90(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t relaxed_embedding_sm80(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t relaxed_embedding_simt(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t relaxed_embedding_matmul(const RelaxedEmbeddingParams& p, const Plan& plan, Gemm gemm,
                                     cudaStream_t stream);

}  // namespace entrgi
