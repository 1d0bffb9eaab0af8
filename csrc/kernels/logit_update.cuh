// What the kernels of the logit update share: scalars and the epilogue.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "detail/numeric.cuh"
#include "kernels.h"

namespace entrgi {

struct UpdateScalars {
  float inverse_tau, lr, beta1, beta2, one_minus_beta1, one_minus_beta2;
  float inverse_correction1, inverse_correction2;  // 1 / (1 - beta^step)
  float eps;
  int aligned;  // four columns of every matrix can be accessed as one vector

  explicit UpdateScalars(const LogitUpdateParams& p)
      : inverse_tau(static_cast<float>(std::min<double>(1 / p.temperature, FLT_MAX))),
        lr(static_cast<float>(p.lr)),
        beta1(static_cast<float>(p.beta1)),
        beta2(static_cast<float>(p.beta2)),
        one_minus_beta1(static_cast<float>(1 - p.beta1)),
        one_minus_beta2(static_cast<float>(1 - p.beta2)),
        inverse_correction1(static_cast<float>(1 / (1 - std::pow(p.beta1, p.step)))),
        inverse_correction2(static_cast<float>(1 / (1 - std::pow(p.beta2, p.step)))),
        eps(static_cast<float>(p.eps)) {
    uint64_t bits = address_bits(p.logits, p.logits_stride, size_of(p.logits_dtype));
    if (p.logits_dtype != DType::kFloat32) bits *= 2;  // four 16-bit elements need 8 bytes, not 16
    bits |= address_bits(p.gradient, p.gradient_stride, 4) | address_bits(p.exp_avg, p.exp_avg_stride, 4) |
            address_bits(p.exp_avg_sq, p.exp_avg_sq_stride, 4);
    aligned = bits % 16 == 0;
  }

 private:
  static uint64_t address_bits(const void* base, int64_t stride, int64_t element_bytes) {
    return base == nullptr ? 0
                           : reinterpret_cast<uint64_t>(base) | static_cast<uint64_t>(stride * element_bytes);
  }
};

#ifdef __CUDACC__
// Row of `grad` that logit row n reads, or -1 for padding.
__device__ __forceinline__ int64_t grad_row(const LogitUpdateParams& p, int64_t n) {
  if (p.rows == nullptr) return n;
  const int64_t row = p.rows[n];
  return row >= 0 && row < p.num_grad_rows ? row : -1;
}

// Elements [0, count) of four; one access where all four are there and the matrix is aligned.
template <typename T>
__device__ __forceinline__ void load_four(float (&x)[4], const T* from, int count, bool aligned) {
  if (aligned && count >= 4) {
    using Raw = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    const Raw raw = *reinterpret_cast<const Raw*>(from);
    const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < count ? to_float(from[i]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, const float (&x)[4], int count, bool aligned) {
  if (aligned && count >= 4) {
    using Raw = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    Raw raw;
    T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) elements[i] = from_float<T>(x[i]);
    *reinterpret_cast<Raw*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = from_float<T>(x[i]);
    }
  }
}

// A row as the epilogue sees it. A padding row only ever gets a gradient of 0; one past the end is padding
// too.
struct UpdateRow {
  int64_t n;
  float lse, inner;  // inner = G . e_soft
  bool padding;
};

__device__ __forceinline__ UpdateRow load_update_row(const LogitUpdateParams& p, int64_t n) {
  UpdateRow row{n, 0.f, 0.f, n >= p.n || grad_row(p, n) < 0};
  if (!row.padding) {
    row.lse = p.logsumexp[n];
    row.inner = static_cast<const float*>(p.workspace)[n];
  }
  return row;
}

// Four logits of a row and their moments. Loading and applying are apart so that a thread can have several
// loads in flight: the stores in between would otherwise order them, as everything happens in place.
template <typename Z>
struct FourLogits {
  float z[4], m[4], v[4];

  __device__ __forceinline__ void load(const LogitUpdateParams& p, const UpdateScalars& s,
                                       const UpdateRow& row, int64_t column) {
    const int count = static_cast<int>(min(p.vocab - column, int64_t{4}));
    if (count <= 0 || row.padding) return;
    load_four(z, static_cast<const Z*>(p.logits) + row.n * p.logits_stride + column, count, s.aligned);
    if (p.rule == UpdateRule::kAdam && p.step > 1) {
      load_four(m, p.exp_avg + row.n * p.exp_avg_stride + column, count, s.aligned);
      load_four(v, p.exp_avg_sq + row.n * p.exp_avg_sq_stride + column, count, s.aligned);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) m[i] = v[i] = 0.f;
    }
  }

  // `product` = G . E_i. Each logit belongs to one thread, which makes the update in place safe.
  __device__ __forceinline__ void apply(const LogitUpdateParams& p, const UpdateScalars& s,
                                        const UpdateRow& row, int64_t column, const float (&product)[4]) {
    const int count = static_cast<int>(min(p.vocab - column, int64_t{4}));
    if (count <= 0 || (row.padding && p.rule != UpdateRule::kGradient)) return;
    float gradient[4] = {};
    if (!row.padding) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float q = exp2_approx(log_softmax(z[i], s.inverse_tau, row.lse) * kLog2e);
        // 0 where q is 0, whatever the product is; NaN stays NaN.
        gradient[i] = q != 0 ? q * (product[i] - row.inner) * s.inverse_tau : 0.f;
      }
    }
    if (p.rule == UpdateRule::kGradient) {
      store_four(p.gradient + row.n * p.gradient_stride + column, gradient, count, s.aligned);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.rule == UpdateRule::kSgd) {
        z[i] += s.lr * gradient[i];
      } else {
        m[i] = s.one_minus_beta1 * gradient[i] + s.beta1 * m[i];
        v[i] = s.one_minus_beta2 * (gradient[i] * gradient[i]) + s.beta2 * v[i];
        z[i] += s.lr * (m[i] * s.inverse_correction1) / (sqrtf(v[i] * s.inverse_correction2) + s.eps);
      }
    }
    if (p.rule == UpdateRule::kAdam && !p.last) {
      store_four(p.exp_avg + row.n * p.exp_avg_stride + column, m, count, s.aligned);
      store_four(p.exp_avg_sq + row.n * p.exp_avg_sq_stride + column, v, count, s.aligned);
    }
    store_four(static_cast<Z*>(p.logits) + row.n * p.logits_stride + column, z, count, s.aligned);
  }
};
#endif

// The matrix products with their epilogue; the workspace holds G . e_soft [N].
cudaError_t logit_update_sm80(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t logit_update_simt(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream);

}  // namespace entrgi
