// Element types, fast exponentials and the order of floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

namespace entrgi {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Memory in acc (params.h), which is float wherever kernels run: the operators take double on the CPU alone.
__device__ __forceinline__ float* fp32(void* acc) {
  return static_cast<float*>(acc);
}
__device__ __forceinline__ const float* fp32(const void* acc) {
  return static_cast<const float*>(acc);
}

// threadIdx.x, of which the compiler knows nothing: what depends on it is computed anew where it is needed,
// and takes no registers through a search.
__device__ __forceinline__ int this_thread() {
  int thread = static_cast<int>(threadIdx.x);
  asm volatile("" : "+r"(thread));
  return thread;
}

// 2^x in one instruction, about 2 ulp.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log softmax(z / tau). The product is rounded on its own, as it was when logsumexp was made from the maximum
// (vocab_pass.cu): where one id holds the mass of a row its q is 1, not e^(rounding of z / tau), and the
// terms of a gradient that ought to vanish cancel. A fused multiply-add left gradients of saturated rows 12
// (tau 0.7) to 4,000 (tau 0.003) times as far off (measured).
__device__ __forceinline__ float log_softmax(float z, float inverse_tau, float logsumexp) {
  return __fmul_rn(z, inverse_tau) - logsumexp;
}

// x - max, for use as (x - max) e^(x - max): -inf and NaN become a finite number whose exponential is 0.
__device__ __forceinline__ float shifted(float x, float max) {
  return fmaxf(x - max, -1e30f);
}

// Unsigned integers in the order of floats. Sixteen-bit logits fill only the upper bits.
template <typename T>
constexpr int kKeyShift = 0;
template <>
inline constexpr int kKeyShift<__nv_bfloat16> = 16;
template <>
inline constexpr int kKeyShift<__half> = 13;

template <typename T>
__device__ __forceinline__ uint32_t ordered_key(float z) {
  const uint32_t bits = __float_as_uint(z);
  return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) >> kKeyShift<T>;
}

template <typename T>
__device__ __forceinline__ float from_ordered_key(uint32_t key) {
  const uint32_t low = (1u << kKeyShift<T>)-1;
  const uint32_t upper = key << kKeyShift<T>;
  return __uint_as_float(upper & 0x80000000u ? upper & 0x7fffffffu : ~(upper | low));
}

}  // namespace entrgi
