// Exact top-p and top-k thresholds of a row without sorting it.
//
// Ids are ordered by (z descending, id ascending). With a weight for each id and a limit, the search finds
// the one id at which the running sum crosses the limit:
//
//     weight ahead of it <= limit < weight ahead of it + its own
//
//   top-p: weight = round(e^((z - max) / tau) 2^40), limit = the largest integer <= top_p * total. Kept are
//   the
//          ids up to and including the crossing one, so ties at the boundary are settled by id at no cost.
//   top-k: weight = 1, limit = k - 1. Kept are all ids whose z is not below that of the crossing one.
//
// A histogram of 2,048 bins narrows the candidates to one bin per read of the row: first by distance from the
// maximum in steps of tau / 64 (equal bins of the key's leading digits would put most ids of a real row in a
// few bins, and their atomics in a queue), then by digits of the ordered key, then, among exact ties only, by
// id. Sixteen-bit logits need two reads, fp32 three or four, ties one or two more; the second read by id
// touches a 2,048th of the row. Weights are integers, so the sums depend on no order of addition and the
// atomics do no harm.
#pragma once

#include "row_vectors.cuh"

namespace entrgi {

constexpr int kBins = 2048;
constexpr float kMassUnit = 0x1p40f;

struct SearchShared {
  uint32_t low[kBins], high[kBins];  // 64-bit sums in two words: native atomics, the carry added by hand
  uint64_t warp_sum[32];
  uint64_t ahead, crossing_weight;
  int bin;
  uint32_t key_low, key_high;
};

// Up to and including (key, id) in the order; key 0 lies below every finite logit.
struct Threshold {
  uint32_t key = 0;
  int id = INT32_MAX;
};

template <typename T>
struct RowScores {
  const T* row;
  int vocab;
  const bool* forbidden;
  float max;    // over allowed ids
  float scale;  // log2(e) / tau
  float bins_per_logit;

  __device__ __forceinline__ uint64_t mass(float z) const {
    return __float2ull_rn(exp2_approx((z - max) * scale) * kMassUnit);
  }
  // Monotone in z: subtraction, product and truncation round monotonically.
  __device__ __forceinline__ int linear_bin(float z) const {
    return min(__float2int_rz((max - z) * bins_per_logit), kBins - 1);
  }
};

enum class Digit { kLinear, kKey, kId };

// The candidates of one read and how they fall into bins.
struct Level {
  Digit digit = Digit::kLinear;
  uint32_t key_low = 0, key_high = 0;
  int id_low = 0, id_high = 0;
  int shift = 0;
};

// Smallest shift that brings a span of values into the bins.
__device__ __forceinline__ int shift_for(uint32_t span) {
  return max(0, 32 - __clz(span) - 11);
}

template <typename T, int kThreads>
struct ThresholdSearch {
  const RowScores<T>& scores;
  SearchShared& shared;
  bool by_mass;

  __device__ __forceinline__ void add(int bin, uint64_t weight) {
    const uint32_t low = static_cast<uint32_t>(weight);
    const uint32_t before = atomicAdd(&shared.low[bin], low);
    const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) atomicAdd(&shared.high[bin], high);
  }

  __device__ void histogram(const Level& level) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    const bool all = level.digit != Digit::kId;
    const RowVectors<T> row(scores.row, all ? 0 : level.id_low, all ? scores.vocab : level.id_high + 1);
    for (int vector = threadIdx.x; vector < row.count; vector += kThreads) {
      float z[kVector];
      row.load(vector, z);
      row.mask(vector, scores.forbidden, z);
      const int first = row.first_id(vector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (z[i] == -CUDART_INF_F) continue;
        const uint32_t key = ordered_key<T>(z[i] + 0.f);  // + 0: one key for both zeros
        int bin;
        if (level.digit == Digit::kLinear) {
          bin = scores.linear_bin(z[i]);
        } else {
          if (key < level.key_low || key > level.key_high) continue;
          bin = level.digit == Digit::kKey ? (level.key_high - key) >> level.shift
                                           : (first + i - level.id_low) >> level.shift;
        }
        const uint64_t weight = by_mass ? scores.mass(z[i]) : 1;
        if (weight != 0) add(bin, weight);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ uint64_t bin_weight(int bin) const {
    return static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin];
  }

  // Weight of all bins before this thread's own, and of all bins.
  __device__ uint64_t prefix(uint64_t* total) {
    constexpr int kWarps = kThreads / 32, kPerThread = kBins / kThreads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) own += bin_weight(threadIdx.x * kPerThread + i);
    uint64_t inclusive = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, inclusive, delta);
      if (lane >= delta) inclusive += other;
    }
    if (lane == 31) shared.warp_sum[warp] = inclusive;
    __syncthreads();
    uint64_t before = inclusive - own;
    *total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += shared.warp_sum[w];
      *total += shared.warp_sum[w];
    }
    return before;
  }

  // Exactly one bin crosses the limit: ahead + total > limit.
  __device__ void locate(uint64_t before, uint64_t limit) {
    constexpr int kPerThread = kBins / kThreads;
    for (int i = 0; i < kPerThread; ++i) {
      const int bin = threadIdx.x * kPerThread + i;
      const uint64_t weight = bin_weight(bin);
      if (before <= limit && limit < before + weight) {
        shared.bin = bin;
        shared.ahead = before;
        shared.crossing_weight = weight;
      }
      before += weight;
    }
    __syncthreads();
  }

  // The keys of a linear bin: its function is monotone, so two threads bisect for its ends.
  __device__ void invert_linear(Level& level) {
    if (threadIdx.x < 2) {
      const bool want_low = threadIdx.x == 0;
      uint32_t low = ordered_key<T>(-FLT_MAX), high = ordered_key<T>(scores.max + 0.f);
      while (low < high) {  // smallest key with bin <= shared.bin, or largest with bin >= shared.bin
        const uint32_t middle = want_low ? low + (high - low) / 2 : high - (high - low) / 2;
        const int bin = scores.linear_bin(from_ordered_key<T>(middle));
        if (want_low) {
          (bin <= shared.bin ? high : low) = bin <= shared.bin ? middle : middle + 1;
        } else {
          (bin >= shared.bin ? low : high) = bin >= shared.bin ? middle : middle - 1;
        }
      }
      (want_low ? shared.key_low : shared.key_high) = low;
    }
    __syncthreads();
    level.key_low = shared.key_low;
    level.key_high = shared.key_high;
  }

  // Largest integer whose value as a double is <= top_p * total: integer comparisons then decide as the
  // comparison (double)ahead <= top_p * (double)total does.
  __device__ uint64_t mass_limit(double top_p, uint64_t total) const {
    const double limit = top_p * __ull2double_rn(total);
    uint64_t largest = __double2ull_rd(limit);
    if (limit >= 0x1p53) {  // integers up to half a unit in the last place above round down to the limit
      const uint64_t half = 1ull << (ilogb(limit) - 53);
      largest += __ull2double_rn(largest + half) <= limit ? half : half - 1;
    }
    return largest < total ? largest : total;
  }

  // Called by all threads of the CTA, whose shared memory must not be in use.
  __device__ Threshold run(double top_p, uint64_t count_limit) {
    Level level;
    uint64_t ahead = 0, limit = count_limit;
    while (true) {
      histogram(level);
      uint64_t total;
      const uint64_t before = ahead + prefix(&total);
      if (level.digit == Digit::kLinear) {
        if (by_mass) limit = mass_limit(top_p, total);
        if (limit >= total) return {};
      }
      locate(before, limit);
      const int bin = shared.bin;
      ahead = shared.ahead;
      if (level.digit == Digit::kId) {
        level.id_low += bin << level.shift;
        level.id_high = min(level.id_high, level.id_low + (1 << level.shift) - 1);
        if (level.id_low == level.id_high) return {level.key_low, level.id_low};
      } else {
        if (level.digit == Digit::kLinear) {
          invert_linear(level);
          level.digit = Digit::kKey;
        } else {
          level.key_high -= static_cast<uint32_t>(bin) << level.shift;
          // No underflow: the keys of finite numbers are larger than any bin is wide.
          level.key_low = max(level.key_low, level.key_high - ((1u << level.shift) - 1));
        }
        level.shift = shift_for(level.key_high - level.key_low);
        if (level.key_low == level.key_high) {
          const uint64_t last = by_mass ? scores.mass(from_ordered_key<T>(level.key_low)) : 1;
          if (!by_mass || ahead + shared.crossing_weight - last <= limit) return {level.key_low};
          level.digit = Digit::kId;
          level.id_low = 0;
          level.id_high = scores.vocab - 1;
        }
      }
      if (level.digit == Digit::kId) level.shift = shift_for(level.id_high - level.id_low);
    }
  }
};

}  // namespace entrgi
