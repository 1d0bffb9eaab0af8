// What the kernels of the vocabulary pass share: scales, statistics from sums, launchers.
#pragma once

#include <math_constants.h>

#include <algorithm>
#include <cmath>

#include "../detail/numeric.cuh"
#include "../kernels.h"

namespace entrgi {

struct Scales {
  float tau, inverse;    // 1 / tau
  float scale;           // log2(e) / tau
  float bins_per_logit;  // of the threshold search's first level: 32 / tau

  explicit Scales(double temperature)
      : tau(static_cast<float>(temperature)),
        inverse(bounded(1 / temperature)),
        scale(bounded(M_LOG2E / temperature)),
        bins_per_logit(bounded(32 / temperature)) {}

  // Whether e^(z / tau) differs from e^z: one exponential less where it does not. Decided by the factor that
  // the integer masses take, too.
  __device__ __forceinline__ bool tempered() const { return scale != kLog2e; }

 private:
  static float bounded(double x) { return static_cast<float>(std::min<double>(x, FLT_MAX)); }
};

// Writes a row's statistics from its sums (softmax_state.cuh). The logarithm of a peaked row's
// probabilities is exact: log_softmax in detail/numeric.cuh rounds the same product.
__device__ __forceinline__ void write_statistics(const LogitStatisticsParams& p, const Scales& scales,
                                                 int64_t n, float max, float sum, float weighted,
                                                 float sum_tau, float weighted_tau, int argmax) {
  fp32(p.logsumexp)[n] = log_softmax(max, scales.inverse, -logf(sum_tau));
  fp32(p.entropy)[n] = logf(sum) - weighted / sum;
  fp32(p.tempered_entropy)[n] = logf(sum_tau) - weighted_tau / sum_tau * scales.inverse;
  p.argmax[n] = argmax;
}

__device__ __forceinline__ void refuse_statistics(const LogitStatisticsParams& p, int64_t n) {
  fp32(p.logsumexp)[n] = fp32(p.entropy)[n] = fp32(p.tempered_entropy)[n] = CUDART_NAN_F;
  p.argmax[n] = -1;
}

// One cluster of CTAs per row (vocab_pass_sm90.cu).
template <bool kDraw>
cudaError_t vocab_pass_sm90(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream);

}  // namespace entrgi
