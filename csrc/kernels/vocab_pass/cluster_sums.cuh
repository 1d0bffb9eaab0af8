// Statistics of a row in the slices of a cluster: the sums of softmax_state.cuh, with the final
// maximum.
#pragma once

#include "cluster.cuh"
#include "row_slice.cuh"
#include "softmax_state.cuh"
#include "threshold_search.cuh"
#include "vocab_pass.cuh"

#ifdef ENTRGI_CLUSTERS

namespace entrgi {

// Sums over the ids of a thread; see softmax_state.cuh.
struct ThreadSums {
  double sum_tau;
  float sum, weighted, weighted_tau;
};

// Over those of a slice. Masses, e^((z - max) / tau), in units of 2^-40.
struct Sums {
  uint64_t mass;       // of all ids: sum_tau, good to the bounds of MassBounds
  uint64_t forbidden;  // of those that may not be drawn: exact
  float sum, weighted, weighted_tau;
  uint32_t argmax;       // first id of the maximum over all ids
  uint32_t lost_argmax;  // whether an id of the maximum may not be drawn
};

__device__ __forceinline__ Sums merge(Sums a, const Sums& b) {
  a.mass += b.mass;
  a.forbidden += b.forbidden;
  a.sum += b.sum;
  a.weighted += b.weighted;
  a.weighted_tau += b.weighted_tau;
  a.argmax = min(a.argmax, b.argmax);
  a.lost_argmax |= b.lost_argmax;
  return a;
}

// All lanes' together: what a draw needs in every warp, and the rest of what the CTA needs that writes.
__device__ __forceinline__ void gather_forbidden(Sums& s) {
  s.forbidden = sum_across_warp(s.forbidden);
  s.lost_argmax = __reduce_or_sync(~0u, s.lost_argmax);
}
__device__ __forceinline__ void gather_statistics(Sums& s) {
  s.sum = sum_across_warp(s.sum);
  s.weighted = sum_across_warp(s.weighted);
  s.weighted_tau = sum_across_warp(s.weighted_tau);
  s.argmax = __reduce_min_sync(~0u, s.argmax);
}

__device__ __forceinline__ uint64_t to_mass(double sum_tau) {
  return __double2ull_rn(sum_tau * kMassUnit);
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

// Sums of both halves in trees: each addend is rounded tree_levels times.
template <int kCount>
__device__ __forceinline__ void add_in_trees(float (&x)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount / 2; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < kCount; i += 2 * step) x[i] += x[i + step];
  }
}
template <typename T>
constexpr int tree_levels = sizeof(T) == 2 ? 2 : 1;

// As a double, by two integer instructions: the conversion would take a turn of the unit that does the
// exponentials, which bounds the sweep. 0 becomes 2^-127, other numbers themselves; no subnormals, no signs.
__device__ __forceinline__ double widened(float x) {
  const uint32_t bits = __float_as_uint(x);
  return __hiloint2double(static_cast<int>((bits >> 3) + ((1023 - 127) << 20)), static_cast<int>(bits << 29));
}

// One sweep over the slice with the final maximum. -inf spoils the weighted sums unless kInfinities. Units
// are added up on their own first: thousands of equal small terms that join a large one in turn would all
// round the same way. The masses, whose sum decides draws, are rounded least: in a tree, then in fp64.
template <typename T, bool kTempered, bool kInfinities>
__device__ ThreadSums add_up(const RowSlice<T>& slice, float max, float scale) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  ThreadSums s{};
#pragma unroll 1
  for (int unit = threadIdx.x; unit < slice.count; unit += kClusterThreads) {
    float z[kPerUnit], e_tau[kPerUnit];
    slice.load(unit, z);
    float sum = 0.f, weighted = 0.f, weighted_tau = 0.f;
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) {
      const float d = kInfinities ? shifted(z[i], max) : z[i] - max;
      const float e = exp2_approx(d * kLog2e);
      e_tau[i] = kTempered ? exp2_approx(d * scale) : e;
      weighted += d * e;
      if (kTempered) {
        sum += e;
        weighted_tau += d * e_tau[i];
      }
    }
    add_in_trees(e_tau);
    s.sum_tau += widened(e_tau[0]);
    s.sum_tau += widened(e_tau[kPerUnit / 2]);
    s.weighted += weighted;
    if (kTempered) {
      s.sum += sum;
      s.weighted_tau += weighted_tau;
    }
  }
  if (!kTempered) {
    s.sum = static_cast<float>(s.sum_tau);
    s.weighted_tau = s.weighted;
  }
  return s;
}

// Few rows have -inf: the threads that met one start anew.
template <typename T, bool kTempered>
__device__ __forceinline__ ThreadSums add_up(const RowSlice<T>& slice, float max, float scale) {
  const ThreadSums s = add_up<T, kTempered, false>(slice, max, scale);
  return s.weighted == s.weighted ? s : add_up<T, kTempered, true>(slice, max, scale);
}

template <typename T>
__device__ __forceinline__ ThreadSums add_up(const RowSlice<T>& slice, float max, const Scales& scales) {
  return scales.tempered() ? add_up<T, true>(slice, max, scales.scale)
                           : add_up<T, false>(slice, max, scales.scale);
}

// The mass alone, for another maximum.
template <typename T>
__device__ uint64_t mass_again(RowSlice<T> slice, float max, float scale) {
  return to_mass(add_up<T, true, true>(slice, max, scale).sum_tau);
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

}  // namespace entrgi
#endif
