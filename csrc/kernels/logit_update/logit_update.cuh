// What the kernels of the logit update share: scalars and the epilogue.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../detail/numeric.cuh"
#include "../kernels.h"

namespace entrgi {

struct UpdateScalars {
  float inverse_tau, lr, beta1, beta2, one_minus_beta1, one_minus_beta2;
  float corrected_lr, inverse_correction2;  // lr / (1 - beta1^step), 1 / (1 - beta2^step)
  float eps;
  int aligned;  // four columns of every matrix can be accessed as one vector

  explicit UpdateScalars(const LogitUpdateParams& p)
      : inverse_tau(static_cast<float>(std::min<double>(1 / p.temperature, FLT_MAX))),
        lr(static_cast<float>(p.lr)),
        beta1(static_cast<float>(p.beta1)),
        beta2(static_cast<float>(p.beta2)),
        one_minus_beta1(static_cast<float>(1 - p.beta1)),
        one_minus_beta2(static_cast<float>(1 - p.beta2)),
        corrected_lr(static_cast<float>(p.lr / (1 - std::pow(p.beta1, p.step)))),
        inverse_correction2(static_cast<float>(1 / (1 - std::pow(p.beta2, p.step)))),
        eps(static_cast<float>(p.eps)) {
    uint64_t bits = address_bits(p.logits.data, p.logits.stride, size_of(p.logits.dtype));
    if (p.logits.dtype != DType::kFloat32) bits *= 2;  // four 16-bit elements need 8 bytes, not 16
    bits |= address_bits(p.gradient.data, p.gradient.stride, 4) |
            address_bits(p.exp_avg.data, p.exp_avg.stride, 4) |
            address_bits(p.exp_avg_sq.data, p.exp_avg_sq.stride, 4);
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
  if (p.row_index == nullptr) return n;
  const int64_t row = p.row_index[n];
  return row >= 0 && row < p.target_rows ? row : -1;
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
    row.lse = fp32(p.logsumexp)[n];
    row.inner = static_cast<const float*>(p.workspace)[n];
  }
  return row;
}

// Four elements of a row as they were loaded; they become floats where they are used, since converting them
// at once would wait for each load before the next.
template <typename T>
struct alignas(4 * sizeof(T)) FourBits {
  std::conditional_t<sizeof(T) == 4, uint4, uint2> bits;

  __device__ __forceinline__ T& operator[](int i) { return reinterpret_cast<T*>(&bits)[i]; }
};

// One access of 8 or 16 bytes, or none, streamed past what the matrix product reads again (.cs). A predicate,
// where a branch would keep the instructions around it apart.
__device__ __forceinline__ void load_streamed_if(bool wanted, uint2& bits, const void* from) {
  asm volatile("{.reg .pred p;\n setp.ne.b32 p, %3, 0;\n @p ld.global.cs.v2.b32 {%0, %1}, [%2];}"
               : "+r"(bits.x), "+r"(bits.y)
               : "l"(__cvta_generic_to_global(from)), "r"(int{wanted})
               : "memory");
}
__device__ __forceinline__ void load_streamed_if(bool wanted, uint4& bits, const void* from) {
  asm volatile("{.reg .pred p;\n setp.ne.b32 p, %5, 0;\n @p ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
               : "l"(__cvta_generic_to_global(from)), "r"(int{wanted})
               : "memory");
}
__device__ __forceinline__ void store_streamed_if(bool wanted, void* to, const uint2& bits) {
  asm volatile("{.reg .pred p;\n setp.ne.b32 p, %3, 0;\n @p st.global.cs.v2.b32 [%0], {%1, %2};}" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(int{wanted})
               : "memory");
}
__device__ __forceinline__ void store_streamed_if(bool wanted, void* to, const uint4& bits) {
  asm volatile(
      "{.reg .pred p;\n setp.ne.b32 p, %5, 0;\n @p st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(
          __cvta_generic_to_global(to)),
      "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w), "r"(int{wanted})
      : "memory");
}
template <typename T>
__device__ __forceinline__ void store_four_if(bool wanted, T* to, const float (&x)[4]) {
  FourBits<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = from_float<T>(x[i]);
  store_streamed_if(wanted, to, four.bits);
}

// Four consecutive columns of a row, and how a thread moves them.
struct Columns {
  int64_t first;
  int left;      // columns from the first on that exist
  bool at_once;  // all four do, and rows are aligned: one access

  __device__ __forceinline__ bool any() const { return left > 0; }
  template <typename T>
  __device__ __forceinline__ void load(FourBits<T>& four, const T* row) const {
    if (at_once) return load_streamed_if(true, four.bits, row + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = i < left ? __ldcs(row + first + i) : from_float<T>(0.f);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* row, const float (&x)[4]) const {
    if (at_once) return store_four_if(true, row + first, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) __stcs(row + first + i, from_float<T>(x[i]));
    }
  }
};

__device__ __forceinline__ Columns columns_at(const LogitUpdateParams& p, const UpdateScalars& s,
                                              int64_t first) {
  const int left = static_cast<int>(min(p.vocab - first, int64_t{4}));
  return {first, left, s.aligned && left >= 4};
}

// Square root and quotient to an ulp or two: what they make is a step, small beside the logit it changes.
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adam's first step ignores what the moments hold, its last one leaves them alone.
__device__ __forceinline__ bool reads_moments(const LogitUpdateParams& p) {
  return p.rule == UpdateRule::kAdam && p.step > 1;
}
__device__ __forceinline__ bool writes_moments(const LogitUpdateParams& p) {
  return p.rule == UpdateRule::kAdam && !p.last;
}

// `product` = G . E_i, `inner` = G . e_soft.
__device__ __forceinline__ void gradient_of(float (&gradient)[4], const float (&logit)[4],
                                            const float (&product)[4], float lse, float inner,
                                            float inverse_tau) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float q = exp2_approx(log_softmax(logit[i], inverse_tau, lse) * kLog2e);
    // 0 where q is 0, whatever the product is; NaN stays NaN.
    gradient[i] = q != 0 ? q * (product[i] - inner) * inverse_tau : 0.f;
  }
}

__device__ __forceinline__ void ascend(float (&logit)[4], const float (&gradient)[4],
                                       const UpdateScalars& s) {
#pragma unroll
  for (int i = 0; i < 4; ++i) logit[i] += s.lr * gradient[i];
}

// The same by Adam. `mean` and `square` are the new moments; `m` and `v` those there are, if any.
__device__ __forceinline__ void ascend(float (&logit)[4], float (&mean)[4], float (&square)[4],
                                       const float (&gradient)[4], bool any_moments, FourBits<float>& m,
                                       FourBits<float>& v, const UpdateScalars& s) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mean[i] = s.one_minus_beta1 * gradient[i];
    square[i] = s.one_minus_beta2 * (gradient[i] * gradient[i]);
  }
  if (any_moments) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mean[i] += s.beta1 * m[i];
      square[i] += s.beta2 * v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    logit[i] += __fdividef(s.corrected_lr * mean[i], sqrt_approx(square[i] * s.inverse_correction2) + s.eps);
  }
}

// Four logits of a row and their moments. Loading and applying are apart so that a thread can have several
// loads in flight: the stores in between would otherwise order them, as everything happens in place.
template <typename Z>
struct FourLogits {
  FourBits<Z> z;
  FourBits<float> m, v;

  // Of row n, which is not padding.
  __device__ __forceinline__ void load(const LogitUpdateParams& p, int64_t n, const Columns& columns) {
    if (!columns.any()) return;
    columns.load(z, static_cast<const Z*>(p.logits.data) + n * p.logits.stride);
    if (reads_moments(p)) {
      columns.load(m, fp32(p.exp_avg.data) + n * p.exp_avg.stride);
      columns.load(v, fp32(p.exp_avg_sq.data) + n * p.exp_avg_sq.stride);
    }
  }

  // Each logit belongs to one thread, which makes the update in place safe.
  __device__ __forceinline__ void apply(const LogitUpdateParams& p, const UpdateScalars& s,
                                        const UpdateRow& row, const Columns& columns,
                                        const float (&product)[4]) {
    if (!columns.any() || (row.padding && p.rule != UpdateRule::kGradient)) return;
    float logit[4], gradient[4] = {};
    if (!row.padding) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logit[i] = to_float(z[i]);
      gradient_of(gradient, logit, product, row.lse, row.inner, s.inverse_tau);
    }
    if (p.rule == UpdateRule::kGradient) {
      columns.store(fp32(p.gradient.data) + row.n * p.gradient.stride, gradient);
      return;
    }
    if (p.rule == UpdateRule::kSgd) {
      ascend(logit, gradient, s);
    } else {
      float mean[4], square[4];
      ascend(logit, mean, square, gradient, reads_moments(p), m, v, s);
      if (writes_moments(p)) {
        columns.store(fp32(p.exp_avg.data) + row.n * p.exp_avg.stride, mean);
        columns.store(fp32(p.exp_avg_sq.data) + row.n * p.exp_avg_sq.stride, square);
      }
    }
    columns.store(static_cast<Z*>(p.logits.data) + row.n * p.logits.stride, logit);
  }
};
#endif

// The matrix products with their epilogue; the workspace holds G . e_soft [N], and for the first and the last
// the gathered rows of G (GatheredGrad).
cudaError_t logit_update_sm90(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t logit_update_sm80(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t logit_update_simt(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream);
cudaError_t logit_update_matmul(const LogitUpdateParams& p, const Plan& plan, Gemm gemm, cudaStream_t stream);

}  // namespace entrgi
