// A row of logits held by the shared memory of a cluster: each CTA has one slice.
//
//   device memory   ..|x x x z z z z z|z z z z z z z z| ... |z z z z z x x x|..    16-byte units
//   unit            0                 1                     last
//
// Units lie on 16-byte boundaries of device memory; a row that starts or ends inside one is padded with -inf
// (x), which changes nothing here. Whole units arrive by bulk copies, a few chunks to a slice, each on its
// own barrier; the elements of the first and the last unit by ordinary loads. Rows of any alignment so lie in
// shared memory as vectors without edges.
#pragma once

#include "../detail/numeric.cuh"
#include "cluster.cuh"

#ifdef ENTRGI_CLUSTERS
#include <math_constants.h>

namespace entrgi {

constexpr int kChunks = 4;

// A 32-bit word of logits: two of 16 bits or one.
template <typename T>
struct Packed {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  static constexpr int kCount = 2;

  static __device__ __forceinline__ Pair pair(uint32_t word) { return *reinterpret_cast<const Pair*>(&word); }
  static __device__ __forceinline__ uint32_t word(Pair pair) {
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  static __device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b) {
    return word(__hmax2_nan(pair(a), pair(b)));
  }
  static __device__ __forceinline__ float largest_or_nan(uint32_t a) {
    return to_float(__hmax_nan(pair(a).x, pair(a).y));
  }
  static __device__ __forceinline__ uint32_t all(float z) {
    return word({from_float<T>(z), from_float<T>(z)});
  }
  // All bits of half i: element i of `a` lies between those of `low` and `high`.
  static __device__ __forceinline__ uint32_t within(uint32_t a, uint32_t low, uint32_t high) {
    return __hge2_mask(pair(a), pair(low)) & __hle2_mask(pair(a), pair(high));
  }
  static __device__ __forceinline__ float get(uint32_t a, int i) {
    if (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(i == 0 ? a << 16 : a & 0xffff0000u);
    return to_float(i == 0 ? pair(a).x : pair(a).y);
  }
};
template <>
struct Packed<float> {
  static constexpr int kCount = 1;

  static __device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    return __float_as_uint(larger);
  }
  static __device__ __forceinline__ float largest_or_nan(uint32_t a) { return __uint_as_float(a); }
  static __device__ __forceinline__ uint32_t all(float z) { return __float_as_uint(z); }
  static __device__ __forceinline__ uint32_t within(uint32_t a, uint32_t low, uint32_t high) {
    const float z = __uint_as_float(a);
    return z >= __uint_as_float(low) && z <= __uint_as_float(high) ? ~0u : 0;
  }
  static __device__ __forceinline__ float get(uint32_t a, int) { return __uint_as_float(a); }
};

template <typename T>
__device__ __forceinline__ uint32_t unit_max(const uint4& unit) {
  using P = Packed<T>;
  return P::max_or_nan(P::max_or_nan(unit.x, unit.y), P::max_or_nan(unit.z, unit.w));
}

// The elements of unit u of four between `low` and `high`: bit w + 4 u + 16 i is element i of word w.
template <typename T>
__device__ __forceinline__ uint32_t elements_within(const uint4& unit, int u, uint32_t low, uint32_t high) {
  using P = Packed<T>;
  const uint32_t bits = (P::kCount == 2 ? 0x00010001u : 1u) << 4 * u;
  return (P::within(unit.x, low, high) & bits) | (P::within(unit.y, low, high) & bits << 1) |
         (P::within(unit.z, low, high) & bits << 2) | (P::within(unit.w, low, high) & bits << 3);
}
// Its place, where one of the four lies kStride elements after another: w and u are moved by one product.
template <typename T, int kStride>
__device__ __forceinline__ uint32_t element_of_bit(uint32_t bit) {
  constexpr uint32_t kCount = Packed<T>::kCount;
  static_assert((kStride & (kStride - 1)) == 0 && kStride >= 64);
  return bit / 16 + (bit * (kCount + kStride / 4) & (3 * kCount + 3 * kStride));
}

template <typename T>
struct RowSlice {
  static constexpr int kPerUnit = 16 / sizeof(T);

  uint4* units;  // in shared memory
  int count;     // units of this slice
  int chunk;     // units of one chunk
  int first_id;  // of the first element of the first unit: negative in padding

  __device__ __forceinline__ int id(int unit) const { return first_id + unit * kPerUnit; }

  __device__ __forceinline__ void load(int unit, float (&z)[kPerUnit]) const {
    constexpr int kCount = Packed<T>::kCount;
    const uint4 raw = units[unit];
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) z[i] = Packed<T>::get(words[i / kCount], i % kCount);
  }

  __device__ __forceinline__ float get(int unit, int i) const {
    return to_float(reinterpret_cast<const T*>(units + unit)[i]);
  }

  // Makes an id -inf and returns what it was; -inf to all but one of those who ask at once.
  __device__ __forceinline__ float take(int id) const {
    constexpr int kPerWord = Packed<T>::kCount, kBits = 32 / kPerWord;
    const uint32_t minus_inf = Packed<T>::all(-CUDART_INF_F);
    const int element = id - first_id, i = element % kPerWord;
    const uint32_t mask = (~0u >> (32 - kBits)) << i * kBits;
    uint32_t* word = reinterpret_cast<uint32_t*>(units) + element / kPerWord;
    uint32_t before = *static_cast<volatile uint32_t*>(word), expected;
    do {
      expected = before;
      before = atomicCAS(word, expected, (expected & ~mask) | (minus_inf & mask));
    } while (before != expected);
    return Packed<T>::get(before, i);
  }
};

// The slice of CTA `rank` of `size`; begins its copies. Chunk c may be read once landed[c] has completed its
// first phase; the caller's barrier has to follow before anyone waits or reads.
template <typename T>
__device__ RowSlice<T> begin_slice(const T* row, int vocab, int rank, int size, uint4* memory,
                                   Barrier* landed) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const T* base = row - lead;
  const int units = (lead + vocab + kPerUnit - 1) / kPerUnit, share = (units + size - 1) / size;
  const int first = min(rank * share, units), last = min(first + share, units), count = last - first;
  const int chunk =
      ((count + kChunks - 1) / kChunks + kClusterThreads - 1) / kClusterThreads * kClusterThreads;
  // Units without padding.
  const int whole_begin = lead > 0 ? 1 : 0, whole_end = (lead + vocab) / kPerUnit;

  if (threadIdx.x == 0) {
    for (int c = 0; c < kChunks; ++c) landed[c].init(1);
    fence_barrier_init();
    for (int c = 0; c * chunk < count; ++c) {
      const int begin = max(first + c * chunk, whole_begin);
      const int end = min(min(first + (c + 1) * chunk, last), whole_end);
      if (begin < end) {
        const int bytes = (end - begin) * 16;
        landed[c].arrive_and_expect_tx(bytes);
        copy_bulk(memory + (begin - first), base + static_cast<int64_t>(begin) * kPerUnit, bytes, landed[c]);
      } else {
        landed[c].arrive();
      }
    }
  }
  if (threadIdx.x < 2 * kPerUnit) {
    const bool head = threadIdx.x < kPerUnit;
    const int unit = head ? 0 : whole_end, i = threadIdx.x % kPerUnit;
    const bool padded = head ? whole_begin > 0 : unit < units && unit >= whole_begin;
    if (padded && first <= unit && unit < last) {
      const int id = unit * kPerUnit + i - lead;
      T* element = reinterpret_cast<T*>(memory + (unit - first)) + i;
      *element = id >= 0 && id < vocab ? row[id] : from_float<T>(-CUDART_INF_F);
    }
  }
  return {memory, count, chunk, first * kPerUnit - lead};
}

}  // namespace entrgi
#endif
