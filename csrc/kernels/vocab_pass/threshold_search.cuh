// Exact top-p and top-k thresholds of a row without sorting it.
//
// Ids are ordered by (z descending, id ascending). With a weight for each id and a limit, the search finds
// the one id at which the running sum crosses the limit:
//
//     weight ahead of it <= limit < weight ahead of it + its own
//
//   top-p: weight = round(e^((z - max) / tau) 2^40), limit = the largest integer <= top_p * total. Kept
//          are the ids up to and including the crossing one, so ties at the boundary are settled by id at no
//          cost.
//   top-k: weight = 1, limit = k - 1. Kept are all ids whose z is not below that of the crossing one.
//
// A histogram narrows the candidates to one bin per read of the row: first by distance from the maximum, in
// steps of tau / 32 (equal bins of the key's leading digits would put most ids of a real row in a few bins,
// and their atomics in a queue), then by digits of the ordered key, then, among exact ties only, by id.
// Sixteen-bit logits need two reads, fp32 three or four, ties one or two more; the second read by id touches
// a small part of the row. Weights are integers, so the sums depend on no order of addition and the atomics
// do no harm.
//
// Where the row lies is a parameter:
//
//   row.for_each(level, f)   calls f(z, id) for the candidates of a level, and perhaps for others; by all
//                            threads, each id once; -inf may be left out
//   row.weight(bin)          the sum of a bin of all CTAs that hold a part of the row
//   row.sync()               a barrier for all of them; each arrives at the same threshold
//
// With kRanked, what a linear bin holds is ranked by counting where it is few. Sixteen-bit logits that have
// few keys from the guess up are not weighed but counted, by key: all ids of a key weigh the same, and the
// draw takes its sums from these counters, too.
//
//   row.is_short()           whether the whole row is that few, with one CTA on it
//   row.is_first()           of the CTA that ranks; row.in_first(p): the address there of what is at p here
//   row.tell(shared, ...)    writes the result into all CTAs
//   row.searches_all()       whether nothing was guessed; row.least_key(): the least key of the guess
//   row.counted_from()       key of the first counter in `bins`, 0 where there are none
#pragma once

#include <climits>

#include "row_vectors.cuh"

namespace entrgi {

constexpr float kMassUnit = 0x1p40f;

// kRanked: candidates that are ranked by counting, 0 for none.
template <int kBins, int kRanked = 0>
struct SearchShared {
  uint64_t bins[kBins];
  uint64_t weights[kRanked > 0 ? kRanked : 1];  // of the candidates whose order is in `bins`
  uint64_t warp_sum[32];
  uint64_t ahead, crossing_weight;
  int bin;
  uint32_t key_low, key_high;
  int ranked;
};

// Up to and including (key, id) in the order; key 0 lies below every finite logit.
struct Threshold {
  uint32_t key = 0;
  int id = INT32_MAX;

  __device__ __forceinline__ bool keeps(uint32_t other, int other_id) const {
    return other > key || (other == key && other_id <= id);
  }
};

struct RowScores {
  float max;             // over allowed ids
  float scale;           // log2(e) / tau
  float bins_per_logit;  // of the first level

  __device__ __forceinline__ uint64_t mass(float z) const {
    return __float2ull_rn(exp2_approx((z - max) * scale) * kMassUnit);
  }
  // Monotone in z: subtraction, product and truncation round monotonically.
  __device__ __forceinline__ int linear_bin(float z) const {
    return __float2int_rz((max - z) * bins_per_logit);
  }
};

// Largest integer whose value as a double is <= top_p * total: integer comparisons then decide as the
// comparison (double)ahead <= top_p * (double)total does.
__device__ __forceinline__ uint64_t mass_limit(double top_p, uint64_t total) {
  const double limit = top_p * __ull2double_rn(total);
  uint64_t largest = __double2ull_rd(limit);
  if (limit >= 0x1p53) {  // integers up to half a unit in the last place above round down to the limit
    const uint64_t half = 1ull << (ilogb(limit) - 53);
    largest += __ull2double_rn(largest + half) <= limit ? half : half - 1;
  }
  return largest < total ? largest : total;
}

enum class Digit { kLinear, kKey, kId };

// The candidates of one read and how they fall into bins.
struct Level {
  Digit digit = Digit::kLinear;
  uint32_t key_low = 0, key_high = UINT32_MAX;
  int id_low = 0, id_high = INT32_MAX;
  int shift = 0;
};

// T is the logits' type, whose values alone can be a threshold.
template <typename T, typename Row, int kThreads, int kBins, int kRanked = 0>
struct ThresholdSearch {
  static constexpr int kPerThread = kBins / kThreads, kWarps = kThreads / 32;
  // Logits of 16 bits whose candidates have no more keys than these are counted by key.
  static constexpr int kKeys = kRanked > 0 && sizeof(T) == 2 ? 2 * kBins : 0;
  static constexpr int kTies = 2 * kRanked;  // that fit into `weights`
  static_assert(kKeys == 0 || kPerThread == 1);
  static_assert(kBins % kThreads == 0 && kWarps <= 32 && kRanked <= kBins && kRanked <= kThreads);

  const Row& row;
  const RowScores& scores;
  int vocab;
  SearchShared<kBins, kRanked>& shared;
  bool by_mass;

  // Smallest shift that brings a span of values into the bins.
  static __device__ __forceinline__ int shift_for(uint32_t span) {
    return max(0, 32 - __clz(span) - (31 - __clz(kBins)));
  }

  __device__ __forceinline__ int linear_bin(float z) const { return min(scores.linear_bin(z), kBins - 1); }

  // In two words, with native atomics and the carry added by hand.
  __device__ __forceinline__ void add(int bin, uint64_t weight) {
    uint32_t* words = reinterpret_cast<uint32_t*>(&shared.bins[bin]);
    const uint32_t low = static_cast<uint32_t>(weight);
    const uint32_t before = atomicAdd(&words[0], low);
    const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) atomicAdd(&words[1], high);
  }

  __device__ void histogram(const Level& level) {
    for (int i = this_thread(); i < kBins; i += kThreads) shared.bins[i] = 0;
    if (this_thread() == 0) shared.ranked = 0;
    __syncthreads();
    const bool by_id = level.digit == Digit::kId;
    const RowScores scores = this->scores;
    row.for_each(level, [&](float z, int id) {
      if (z == -CUDART_INF_F) return;
      const uint32_t key = ordered_key<T>(z + 0.f);  // + 0: one key for both zeros
      int bin;
      if (level.digit == Digit::kLinear) {
        bin = min(scores.linear_bin(z), kBins - 1);
      } else {
        if (key < level.key_low || key > level.key_high) return;
        if (by_id && (id < level.id_low || id > level.id_high)) return;
        bin = by_id ? (id - level.id_low) >> level.shift : (level.key_high - key) >> level.shift;
      }
      const uint64_t weight = by_mass ? scores.mass(z) : 1;
      if (weight != 0) add(bin, weight);
    });
    row.sync();
  }

  // Counts the candidates of each key down from `key_high`: two counters in the place of a bin.
  __device__ void count_keys(uint32_t key_high) {
    for (int i = this_thread(); i < kBins; i += kThreads) shared.bins[i] = 0;
    __syncthreads();
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared.bins);
    row.for_each({}, [&](float z, int) {
      atomicAdd(&counts[key_high - ordered_key<T>(z + 0.f)], 1u);  // + 0: one key for both zeros
    });
    row.sync();
    if (this_thread() == 0) row.counted_from() = key_high;
  }

  // Adds up for a draw what was counted of keys above `lowest`, by one CTA for all.
  template <typename Rule, typename State>
  static __device__ void weigh_counted(const Row& row, const SearchShared<kBins, kRanked>& shared,
                                       uint32_t lowest, const Rule& rule, State& state) {
    const int thread = this_thread();
    uint64_t counts = row.weight(&shared.bins[thread]);
#pragma unroll 1
    for (uint32_t key = row.counted_from() - 2 * thread; counts != 0; --key, counts >>= 32) {
      const uint32_t count = static_cast<uint32_t>(counts);
      if (count != 0 && key > lowest) rule.weigh(state, rule.score(from_ordered_key<T>(key)), count);
    }
  }

  __device__ __forceinline__ void weights_of_bins(uint64_t (&own)[kPerThread]) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) own[i] = row.weight(&shared.bins[this_thread() * kPerThread + i]);
  }

  // Weight of all bins before this thread's own, and of all bins.
  template <int kOwn, typename Sync>
  __device__ uint64_t prefix(const uint64_t (&own)[kOwn], uint64_t* total, Sync sync) {
    const int thread = this_thread(), lane = thread % 32, warp = thread / 32;
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += own[i];
    uint64_t inclusive = sum;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, inclusive, delta);
      if (lane >= delta) inclusive += other;
    }
    if (lane == 31) shared.warp_sum[warp] = inclusive;
    sync();  // also: no CTA clears its bins while another reads them
    uint64_t before = inclusive - sum;
    *total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += shared.warp_sum[w];
      *total += shared.warp_sum[w];
    }
    return before;
  }

  // Exactly one bin crosses the limit: ahead + total > limit.
  __device__ void locate(const uint64_t (&own)[kPerThread], uint64_t before, uint64_t limit) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (before <= limit && limit < before + own[i]) {
        shared.bin = this_thread() * kPerThread + i;
        shared.ahead = before;
        shared.crossing_weight = own[i];
      }
      before += own[i];
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
        const int bin = linear_bin(from_ordered_key<T>(middle));
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

  // Whether what crosses the limit is few enough to be ranked, where nothing in it weighs less than `least`.
  __device__ __forceinline__ bool can_rank(uint64_t least) const {
    return kRanked > 0 && shared.crossing_weight <= kRanked * least;
  }

  // The least weight in a linear bin and, in `level`, keys that enclose it; 0 for the last one, which has no
  // end. A thousandth of a bin is far more than its ends are rounded, and a 64th more than its mass is.
  __device__ __forceinline__ uint64_t enclose(int bin, Level& level) const {
    const float low = (static_cast<float>(bin) + 1.001f) / scores.bins_per_logit,
                high = (static_cast<float>(bin) - 0.001f) / scores.bins_per_logit;
    level.key_low = ordered_key<T>(scores.max - low) - 1;
    level.key_high = ordered_key<T>(scores.max - high) + 1;
    if (bin == kBins - 1) return 0;
    return by_mass ? __float2ull_rd(exp2_approx(-low * scores.scale) * (kMassUnit * 63 / 64)) : 1;
  }

  // The threshold by counting among the candidates of a level, or of one linear bin of it if that is not -1:
  // what is ahead of one is the sum of those before it. One CTA does it for all.
  __device__ Threshold rank(const Level& level, int bin, uint64_t ahead, uint64_t limit) {
    const RowScores scores = this->scores;
    row.for_each(level, [&](float z, int id) {
      const uint32_t key = ordered_key<T>(z + 0.f);
      if (z == -CUDART_INF_F || key < level.key_low || key > level.key_high) return;
      if (bin >= 0 && scores.linear_bin(z) != bin) return;
      const int place = atomicAdd(row.in_first(&shared.ranked), 1);
      // The larger, the earlier.
      row.in_first(shared.bins)[place] = static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(id);
      row.in_first(shared.weights)[place] = by_mass ? scores.mass(z) : 1;
    });
    row.sync();
    const int thread = this_thread();
    if (row.is_first() && thread < shared.ranked) {
      const uint64_t order = shared.bins[thread], weight = shared.weights[thread];
#pragma unroll 4
      for (int i = 0; i < shared.ranked; ++i) {
        if (shared.bins[i] > order) ahead += shared.weights[i];
      }
      if (ahead <= limit && limit < ahead + weight) {  // of one alone
        row.tell(shared, ahead, weight, static_cast<uint32_t>(order >> 32),
                 static_cast<int>(~static_cast<uint32_t>(order)));
      }
    }
    row.sync();
    return {shared.key_low, shared.bin};
  }

  __device__ __forceinline__ uint64_t weight_of_key(uint32_t key) const {
    return by_mass ? scores.mass(from_ordered_key<T>(key)) : 1;
  }

  // The key that crosses the limit, by counts; 0 if none does. One CTA finds it for all.
  __device__ Threshold find_key(uint64_t limit) {
    const uint32_t key_high = ordered_key<T>(scores.max + 0.f);
    if (row.counted_from() == 0) {
      count_keys(key_high);
    } else {
      row.sync();  // the last result was read
    }
    const int thread = this_thread();
    if (thread == 0) shared.ranked = 0;
    if (row.is_first()) {
      const uint64_t counts = row.weight(&shared.bins[thread]);
      const uint32_t key = key_high - 2 * thread;
      const uint64_t own[2] = {static_cast<uint32_t>(counts) * weight_of_key(key),
                               (counts >> 32) * weight_of_key(key - 1)};
      uint64_t total, before = prefix<2>(own, &total, [] { __syncthreads(); });
      if (limit >= total && thread == 0) row.tell(shared, 0, 0, 0, INT32_MAX);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (before <= limit && limit < before + own[i]) row.tell(shared, before, own[i], key - i, INT32_MAX);
        before += own[i];
      }
    }
    row.sync();
    return {shared.key_low, shared.bin};
  }

  // The threshold among the ids of the key that was found, by bisection. `bins` stay as they are.
  __device__ Threshold rank_ties(uint64_t limit) {
    int* ids = reinterpret_cast<int*>(shared.weights);
    const uint32_t key = shared.key_low;
    const float tie = from_ordered_key<T>(key);
    row.for_each({.key_low = key, .key_high = key}, [&](float z, int id) {
      if (z == tie) row.in_first(ids)[atomicAdd(row.in_first(&shared.ranked), 1)] = id;
    });
    row.sync();
    if (row.is_first()) {
      const uint64_t ahead = shared.ahead, weight = weight_of_key(shared.key_low);
      const auto ahead_with = [&](int last) {  // of the ids up to `last`
        int count = 0;
#pragma unroll 1
        for (int first = 0; first < shared.ranked; first += kThreads) {
          const int i = first + this_thread();
          count += __syncthreads_count(i < shared.ranked && ids[i] <= last);
        }
        return ahead + count * weight;
      };
      int low = 0, high = vocab - 1;
      while (low < high) {
        const int middle = low + (high - low) / 2;
        const bool crosses = ahead_with(middle) > limit;
        (crosses ? high : low) = crosses ? middle : middle + 1;
      }
      const uint64_t before = ahead_with(low - 1);
      if (this_thread() == 0) row.tell(shared, before, weight, shared.key_low, low);
    }
    row.sync();
    return {shared.key_low, shared.bin};
  }

  // The threshold for a limit, or for the share top_p of the row's mass where `limit` is kShareOfTotal.
  // Called by all threads, while nothing else is in `shared`; what was read of it is past at the next
  // barrier.
  static constexpr uint64_t kShareOfTotal = ~0ull;
  __device__ Threshold run(uint64_t limit, double top_p) {
    Level level;
    uint64_t ahead = 0;
    int linear_bin_left = -1;
    bool few = false;
    if constexpr (kRanked > 0) {
      few = row.is_short();
      if (few && this_thread() == 0) {
        shared.ranked = 0;
        shared.key_low = 0;  // where nothing crosses the limit
        shared.bin = INT32_MAX;
      }
      if (few) __syncthreads();
    }
    if constexpr (kKeys > 0) {
      if (!few && !row.searches_all() && ordered_key<T>(scores.max + 0.f) - row.least_key() < kKeys) {
        const Threshold whole = find_key(limit);
        const uint64_t weight = weight_of_key(whole.key);
        if (whole.key == 0 || !by_mass || shared.ahead + shared.crossing_weight - weight <= limit)
          return whole;
        if (shared.crossing_weight <= kTies * weight) return rank_ties(limit);
        if (this_thread() == 0) row.counted_from() = 0;
        ahead = shared.ahead;
        level = {Digit::kId, whole.key, whole.key, 0, vocab - 1, shift_for(vocab - 1)};
      }
    }
    while (!few) {
      histogram(level);
      uint64_t own[kPerThread], total;
      weights_of_bins(own);
      const uint64_t before = ahead + prefix(own, &total, [&] { row.sync(); });
      if (level.digit == Digit::kLinear) {
        if (limit == kShareOfTotal) limit = mass_limit(top_p, total);
        if (limit >= total) return {};
      }
      locate(own, before, limit);
      const int bin = shared.bin;
      ahead = shared.ahead;
      if (level.digit == Digit::kId) {
        level.id_low += bin << level.shift;
        level.id_high = min(level.id_high, level.id_low + (1 << level.shift) - 1);
        if (level.id_low == level.id_high) return {level.key_low, level.id_low};
      } else {
        if (level.digit == Digit::kLinear) {
          if constexpr (kRanked > 0) {
            few = can_rank(enclose(bin, level));
            linear_bin_left = bin;
            if (few) break;
            linear_bin_left = -1;
          }
          invert_linear(level);
          level.digit = Digit::kKey;
        } else {
          level.key_high -= static_cast<uint32_t>(bin) << level.shift;
          // No underflow: the keys of finite numbers are larger than any bin is wide.
          level.key_low = max(level.key_low, level.key_high - ((1u << level.shift) - 1));
        }
        const uint64_t least = by_mass ? scores.mass(from_ordered_key<T>(level.key_low)) : 1;
        few = can_rank(least);
        level.shift = shift_for(level.key_high - level.key_low);
        if (level.key_low == level.key_high) {
          if (!by_mass || ahead + shared.crossing_weight - least <= limit) return {level.key_low};
          level.digit = Digit::kId;
          level.id_low = 0;
          level.id_high = vocab - 1;
        }
      }
      if (level.digit == Digit::kId) level.shift = shift_for(level.id_high - level.id_low);
    }
    if constexpr (kRanked > 0) {
      return rank(level, linear_bin_left, ahead, limit);
    } else {
      return {};
    }
  }
};

}  // namespace entrgi
