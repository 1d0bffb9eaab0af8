// Statistics of a row in the slices of a cluster: the sums of detail/softmax_state.cuh, with the final
// maximum.
#pragma once

#include "../vocab_pass.cuh"
#include "cluster.cuh"
#include "row_slice.cuh"
#include "softmax_state.cuh"

#ifdef ENTRGI_CLUSTERS

namespace entrgi {

// Sums over the ids of a slice; see detail/softmax_state.cuh.
struct Sums {
  float sum, weighted, sum_tau, weighted_tau;
  float allowed;         // sum_tau over the ids that may be drawn
  uint32_t allowed_key;  // their maximum
  uint32_t argmax;       // first id of the maximum over all ids
};

__device__ __forceinline__ Sums merge(Sums a, const Sums& b) {
  a.sum += b.sum;
  a.weighted += b.weighted;
  a.sum_tau += b.sum_tau;
  a.weighted_tau += b.weighted_tau;
  a.allowed += b.allowed;
  a.allowed_key = max(a.allowed_key, b.allowed_key);
  a.argmax = min(a.argmax, b.argmax);
  return a;
}

// All lanes' together: what every warp needs to know, and what the CTA that writes needs besides.
__device__ __forceinline__ void gather_allowed(Sums& s) {
  s.allowed = sum_across_warp(s.allowed);
  s.allowed_key = __reduce_max_sync(~0u, s.allowed_key);
}
__device__ __forceinline__ void gather_statistics(Sums& s) {
  s.sum = sum_across_warp(s.sum);
  s.weighted = sum_across_warp(s.weighted);
  s.sum_tau = sum_across_warp(s.sum_tau);
  s.weighted_tau = sum_across_warp(s.weighted_tau);
  s.argmax = __reduce_min_sync(~0u, s.argmax);
}

// A key of an fp32 number; the largest counts.
struct Largest {
  uint32_t key;
};
__device__ __forceinline__ Largest merge(const Largest& a, const Largest& b) {
  return {max(a.key, b.key)};
}

struct ClusterShared {
  Cluster::Mailbox mailbox;
  uint64_t landed[kChunks];  // barriers
};

// Keys of fp32 maxima; NaN above all numbers.
__device__ __forceinline__ uint32_t max_key(float z) {
  return z == z ? ordered_key<float>(z + 0.f) : UINT32_MAX;
}
__device__ __forceinline__ bool is_finite_key(uint32_t key) {
  return key > ordered_key<float>(-CUDART_INF_F) && key < ordered_key<float>(CUDART_INF_F);
}

template <typename T>
__device__ uint32_t largest_of(const RowSlice<T>& slice) {
  uint32_t largest = Packed<T>::all(-CUDART_INF_F);
  for (int unit = threadIdx.x; unit < slice.count; unit += kClusterThreads) {
    largest = Packed<T>::max_or_nan(largest, unit_max<T>(slice.units[unit]));
  }
  return largest;
}

// The same while the slice lands.
template <typename T>
__device__ uint32_t largest_as_it_lands(const RowSlice<T>& slice, Barrier* landed) {
  uint32_t largest = Packed<T>::all(-CUDART_INF_F);
  for (int c = 0; c * slice.chunk < slice.count; ++c) {
    landed[c].wait(0);
    const int end = min((c + 1) * slice.chunk, slice.count);
    for (int unit = c * slice.chunk + threadIdx.x; unit < end; unit += kClusterThreads) {
      largest = Packed<T>::max_or_nan(largest, unit_max<T>(slice.units[unit]));
    }
  }
  return largest;
}

// One sweep over the slice with the final maximum. -inf spoils the weighted sums unless kInfinities. Units
// are added up on their own first: thousands of equal small terms that join a large one in turn would all
// round the same way.
template <typename T, bool kTempered, bool kInfinities>
__device__ Sums add_up(const RowSlice<T>& slice, float max, float scale) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  Sums s{};
#pragma unroll 1
  for (int unit = threadIdx.x; unit < slice.count; unit += kClusterThreads) {
    float z[kPerUnit];
    slice.load(unit, z);
    float sum = 0.f, weighted = 0.f, sum_tau = 0.f, weighted_tau = 0.f;
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) {
      const float d = kInfinities ? shifted(z[i], max) : z[i] - max;
      const float e = exp2_approx(d * kLog2e);
      sum += e;
      weighted += d * e;
      const float e_tau = kTempered ? exp2_approx(d * scale) : e;
      if (kTempered) {
        sum_tau += e_tau;
        weighted_tau += d * e_tau;
      }
    }
    s.sum += sum;
    s.weighted += weighted;
    s.sum_tau += kTempered ? sum_tau : sum;
    s.weighted_tau += kTempered ? weighted_tau : weighted;
  }
  return s;
}

// Few rows have -inf: the threads that met one start anew.
template <typename T, bool kTempered>
__device__ __forceinline__ Sums add_up(const RowSlice<T>& slice, float max, float scale) {
  const Sums s = add_up<T, kTempered, false>(slice, max, scale);
  return s.weighted == s.weighted ? s : add_up<T, kTempered, true>(slice, max, scale);
}

template <typename T>
__device__ __forceinline__ Sums add_up(const RowSlice<T>& slice, float max, const Scales& scales) {
  return scales.tempered() ? add_up<T, true>(slice, max, scales.scale)
                           : add_up<T, false>(slice, max, scales.scale);
}

// sum_tau alone, where that of the first sweep does not count: after forbidden ids left, or for another
// maximum.
template <typename T>
__device__ float add_up_again(RowSlice<T> slice, float max, float scale) {
  return add_up<T, true, true>(slice, max, scale).sum_tau;
}

// The first id of the row's maximum in this thread's units; few threads have one.
template <typename T>
__device__ uint32_t first_id_of(const RowSlice<T>& slice, float max) {
  for (int unit = threadIdx.x; unit < slice.count; unit += kClusterThreads) {
    float z[RowSlice<T>::kPerUnit];
    slice.load(unit, z);
#pragma unroll
    for (int i = 0; i < RowSlice<T>::kPerUnit; ++i) {
      if (z[i] == max) return slice.id(unit) + i;
    }
  }
  return UINT32_MAX;
}

// Makes forbidden ids -inf in the slice; returns whether this thread had any.
template <typename T>
__device__ bool mask(const RowSlice<T>& slice, const bool* forbidden, int vocab) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  bool any = false;
  for (int unit = threadIdx.x; unit < slice.count; unit += kClusterThreads) {
    const int first = slice.id(unit);
    uint32_t out = 0;  // bits of forbidden elements
    if (first >= 0 && first + kPerUnit <= vocab &&
        reinterpret_cast<uintptr_t>(forbidden + first) % kPerUnit == 0) {
      using Flags = std::conditional_t<kPerUnit == 8, uint64_t, uint32_t>;
      const Flags flags = __ldg(reinterpret_cast<const Flags*>(forbidden + first));
      if (flags == 0) continue;
      // Bytes to bits, four at a time; true is whatever is not 0.
      const auto bits = [](uint32_t bytes) { return __vminu4(bytes, 0x01010101u) * 0x01020408u >> 24; };
      out = bits(static_cast<uint32_t>(flags));
      if (kPerUnit == 8) out |= bits(static_cast<uint32_t>(static_cast<uint64_t>(flags) >> 32)) << 4;
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerUnit; ++i) {
        if (first + i >= 0 && first + i < vocab && forbidden[first + i]) out |= 1u << i;
      }
    }
    any |= out != 0;
    for (; out != 0; out &= out - 1) slice.set(unit, __ffs(out) - 1, -CUDART_INF_F);
  }
  return any;
}

}  // namespace entrgi
#endif
