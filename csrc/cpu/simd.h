// Vectors as wide as the instruction set of the including file (row_kernels_*.cpp), on the compiler's vector
// extensions; the few operations they lack are written for AVX2 and AVX-512, with a loop for everything else.
// Everything is internal to the including file: the same source is compiled once per instruction set, named
// by ENTRGI_SIMD, the width of its vectors in bits: 512 (AVX-512), 256 (AVX2) or 128. (Not by __AVX512F__: a
// target pragma comes too late for the preprocessor of g++.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ENTRGI_VECTOR_BYTES (ENTRGI_SIMD / 8)
#define ENTRGI_INLINE inline __attribute__((always_inline))
#define ENTRGI_LAMBDA __attribute__((always_inline))

namespace entrgi::cpu {
namespace {

constexpr int kVectorBytes = ENTRGI_VECTOR_BYTES;

template <class Element, int kLanes>
using Vector __attribute__((vector_size(sizeof(Element) * kLanes))) = Element;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The accumulator type of an element type, and the vector of it.
template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::Type;

template <class F>
constexpr int kLanesOf = kVectorBytes / sizeof(F);

using F32 = Vector<float, kLanesOf<float>>;
using I32 = Vector<int32_t, kLanesOf<float>>;
using U32 = Vector<uint32_t, kLanesOf<float>>;
using F64 = Vector<double, kLanesOf<double>>;
using I64 = Vector<int64_t, kLanesOf<double>>;
using U64 = Vector<uint64_t, kLanesOf<double>>;
using Half16 = Vector<uint16_t, kLanesOf<float>>;
using Bytes32 = Vector<uint8_t, kLanesOf<float>>;   // one byte for each float lane
using Bytes64 = Vector<uint8_t, kLanesOf<double>>;  // one byte for each double lane

template <class F>
struct Simd;
template <>
struct Simd<float> {
  using V = F32;
  using I = I32;
  using Bytes = Bytes32;
};
template <>
struct Simd<double> {
  using V = F64;
  using I = I64;
  using Bytes = Bytes64;
};
template <class F>
using VectorOf = typename Simd<F>::V;
template <class F>
using MaskOf = typename Simd<F>::I;  // -1 where true
template <class F>
using Lane = std::conditional_t<sizeof(F) == 8, int64_t, int32_t>;  // an element of it

template <class To, class From>
ENTRGI_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
ENTRGI_INLINE V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class F>
ENTRGI_INLINE VectorOf<F> splat(F x) {
  return x - VectorOf<F>{};
}

// ---- loads and stores with conversion ---------------------------------------------------------------------

ENTRGI_INLINE F32 widen_half(Half16 h) {
#if ENTRGI_SIMD == 512
  return (F32)_mm512_cvtph_ps((__m256i)h);
#elif ENTRGI_SIMD == 256
  return (F32)_mm256_cvtph_ps((__m128i)h);
#else
  // The exponent is rebiased by a multiplication, which is exact for subnormals too.
  const U32 bits = __builtin_convertvector(h, U32);
  const U32 magnitude = (bits & 0x7fffu) << 13;
  const U32 scaled = (U32)((F32)magnitude * 0x1p112f);
  const U32 special = magnitude | 0x7f800000u;
  return (F32)((magnitude >= 0x0f800000u ? special : scaled) | (bits & 0x8000u) << 16);
#endif
}

ENTRGI_INLINE uint16_t narrow_half(float x) {  // round to nearest even
  uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (u < 0x38800000u)                          // subnormal half: the addition rounds
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(u) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((u + 0xc8000fffu + (u >> 13 & 1u)) >> 13));
}

ENTRGI_INLINE F32 load(const float* p) {
  return load_raw<F32>(p);
}
ENTRGI_INLINE F64 load(const double* p) {
  return load_raw<F64>(p);
}
ENTRGI_INLINE F32 load(const BFloat16* p) {
  return (F32)(__builtin_convertvector(load_raw<Half16>(p), U32) << 16);
}
ENTRGI_INLINE F32 load(const Float16* p) {
  return widen_half(load_raw<Half16>(p));
}

ENTRGI_INLINE void store(float* p, F32 v) {
  std::memcpy(p, &v, sizeof(v));
}
ENTRGI_INLINE void store(double* p, F64 v) {
  std::memcpy(p, &v, sizeof(v));
}
ENTRGI_INLINE void store(BFloat16* p, F32 v) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const U32 quiet = bits >> 16 | 0x40u;
  const Half16 h = __builtin_convertvector((v == v) ? rounded : quiet, Half16);
  std::memcpy(p, &h, sizeof(h));
}
ENTRGI_INLINE void store(Float16* p, F32 v) {
#if ENTRGI_SIMD == 512
  const Half16 h = (Half16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif ENTRGI_SIMD == 256
  const Half16 h = (Half16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Half16 h;
  for (int i = 0; i < kLanesOf<float>; ++i) h[i] = narrow_half(v[i]);
#endif
  std::memcpy(p, &h, sizeof(h));
}

// The last, partial vector: lanes from `count` on hold `fill`, and are not stored.
template <class T>
ENTRGI_INLINE VectorOf<Accumulator<T>> load_part(const T* p, int count, Accumulator<T> fill) {
  using F = Accumulator<T>;
  if (count > kLanesOf<F>) __builtin_unreachable();  // quiets -Warray-bounds
  T buffer[kLanesOf<F>] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  VectorOf<F> v = load(buffer);
  for (int i = count; i < kLanesOf<F>; ++i) v[i] = fill;
  return v;
}

template <class T>
ENTRGI_INLINE void store_part(T* p, VectorOf<Accumulator<T>> v, int count) {
  if (count > kLanesOf<Accumulator<T>>) __builtin_unreachable();
  T buffer[kLanesOf<Accumulator<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// A place in a row: a full vector, or its first `count` lanes.
template <class T>
ENTRGI_INLINE VectorOf<Accumulator<T>> load_lanes(const T* p, int count, Accumulator<T> fill) {
  return count == kLanesOf<Accumulator<T>> ? load(p) : load_part(p, count, fill);
}

template <class T>
ENTRGI_INLINE void store_lanes(T* p, VectorOf<Accumulator<T>> v, int count) {
  if (count == kLanesOf<Accumulator<T>>) {
    store(p, v);
  } else {
    store_part(p, v, count);
  }
}

// f(i, lanes) for i = 0, kLanes, ...: all lanes but in the last call.
template <class F, class Body>
ENTRGI_INLINE void for_lanes(int64_t n, const Body& body) {
  constexpr int kLanes = kLanesOf<F>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// ---- lanes and masks --------------------------------------------------------------------------------------

// Bit i is set where lane i is true.
ENTRGI_INLINE uint32_t mask_bits(I32 m) {
#if ENTRGI_SIMD == 512
  return static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)m));
#elif ENTRGI_SIMD == 256
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanesOf<float>; ++i) bits |= static_cast<uint32_t>(m[i] != 0) << i;
  return bits;
#endif
}
ENTRGI_INLINE uint32_t mask_bits(I64 m) {
#if ENTRGI_SIMD == 512
  return static_cast<uint32_t>(_mm512_movepi64_mask((__m512i)m));
#elif ENTRGI_SIMD == 256
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)m));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanesOf<double>; ++i) bits |= static_cast<uint32_t>(m[i] != 0) << i;
  return bits;
#endif
}

template <class V>
ENTRGI_INLINE auto horizontal_max(V v) {
  auto best = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class V>
ENTRGI_INLINE double horizontal_sum(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

ENTRGI_INLINE F32 square_root(F32 v) {
#if ENTRGI_SIMD == 512
  return (F32)_mm512_sqrt_ps((__m512)v);
#elif ENTRGI_SIMD == 256
  return (F32)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanesOf<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
ENTRGI_INLINE F64 square_root(F64 v) {
  for (int i = 0; i < kLanesOf<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// The two halves of a float vector as doubles.
ENTRGI_INLINE void widen(F32 v, F64& low, F64& high) {
  using HalfVector = Vector<float, kLanesOf<double>>;
  HalfVector halves[2];
  std::memcpy(halves, &v, sizeof(v));
  low = __builtin_convertvector(halves[0], F64);
  high = __builtin_convertvector(halves[1], F64);
}

ENTRGI_INLINE F32 narrow(F64 low, F64 high) {
  using HalfVector = Vector<float, kLanesOf<double>>;
  const HalfVector halves[2] = {__builtin_convertvector(low, HalfVector),
                                __builtin_convertvector(high, HalfVector)};
  return load_raw<F32>(halves);
}

// Sums of float lanes go on in double after this many additions: thousands of equal small terms that join a
// large one in float would all round the same way.
constexpr int64_t kSumBlock = 16;

template <class F>
struct WideSum;
template <>
struct WideSum<float> {
  F64 low = {}, high = {};
  ENTRGI_INLINE void add(F32 v) {
    F64 l, h;
    widen(v, l, h);
    low += l;
    high += h;
  }
  ENTRGI_INLINE double total() const { return horizontal_sum(low + high); }
};
template <>
struct WideSum<double> {
  F64 sum = {};
  ENTRGI_INLINE void add(F64 v) { sum += v; }
  ENTRGI_INLINE double total() const { return horizontal_sum(sum); }
};

// f(begin, length) for consecutive blocks of kSumBlock vectors.
template <class F, class Body>
ENTRGI_INLINE void for_sum_blocks(int64_t n, const Body& body) {
  constexpr int64_t kBlock = kSumBlock * kLanesOf<F>;
  for (int64_t begin = 0; begin < n; begin += kBlock) body(begin, n - begin < kBlock ? n - begin : kBlock);
}

// a * m for 32-bit factors; the upper halves of a's lanes are ignored.
ENTRGI_INLINE U64 multiply_low32(U64 a, uint32_t m) {
#if ENTRGI_SIMD == 512
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif ENTRGI_SIMD == 256
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}

// ---- exp --------------------------------------------------------------------------------------------------

// e^x within about one unit in the last place (Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]). Below 2^-126 it
// is 0: such a weight stands beside one of at least 1. NaN stays NaN.
ENTRGI_INLINE F32 exponential(F32 x) {
  constexpr float kLow = -87.33f, kHigh = 88.722839f, kMagic = 12582912.0f;  // 1.5 * 2^23
  const I32 underflow = x < kLow;
  const I32 overflow = x > kHigh;
  F32 y = underflow ? splat(kLow) : x;
  y = overflow ? splat(kHigh) : y;
  const F32 shifted = y * 1.44269504088896341f + kMagic;  // round(x / ln 2) in the low bits
  const F32 n = shifted - kMagic;
  F32 r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const F32 scaled = (F32)((U32)p + ((U32)shifted << 23));
  const F32 result = overflow ? splat(std::numeric_limits<float>::infinity()) : scaled;
  return underflow ? splat(0.0f) : (x == x ? result : x);
}
ENTRGI_INLINE F64 exponential(F64 x) {
  for (int i = 0; i < kLanesOf<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// ---- log --------------------------------------------------------------------------------------------------

// 32-bit words in the lower halves of the lanes, the upper halves 0.
ENTRGI_INLINE F64 to_double(U64 words) {  // 2^52 + x holds x in its mantissa
  return (F64)(words | 0x4330000000000000u) - splat(0x1p52);
}

// log x of positive normal numbers, within about one unit in the last place. x = 2^k m with m within sqrt(2)
// of 1, s = (m - 1) / (m + 1), log m = 2 atanh s; the polynomial in s^2 is the minimax one with the constant
// term 2 (2^-59).
ENTRGI_INLINE F64 logarithm(F64 x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000;
  const U64 shifted = (U64)x + (kOne - kSqrtHalf);
  const F64 k = to_double(shifted >> 52) - 1023.0;
  const F64 f = (F64)((shifted & 0x000fffffffffffffu) + kSqrtHalf) - 1.0;
  const F64 s = f / (f + 2.0), z = s * s;
  F64 p = z * 0x1.2f056395f5a67p-3 + 0x1.39a1bab2e7e3cp-3;
  p = p * z + 0x1.74663ee8bc916p-3;
  p = p * z + 0x1.c71c52095abb5p-3;
  p = p * z + 0x1.24924941f1295p-2;
  p = p * z + 0x1.999999997fdb7p-2;
  p = p * z + 0x1.5555555555592p-1;
  p = p * z;
  return k * 0x1.62e42fefa39efp-1 + (s * p + s * 2.0);
}

}  // namespace
}  // namespace entrgi::cpu
