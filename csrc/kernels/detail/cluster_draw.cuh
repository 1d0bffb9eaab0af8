// The draw from a row in the slices of a cluster.
//
//   guess     a logit g with little mass below it, from the maxima and sums of a sample of threads
//   list      all ids with z >= g, and their mass. If that is more than the limit, or they are k or more,
//             nothing below g can be kept
//   pool      the lists of all CTAs in one, whose 256 threads do the rest while the others make room
//   search    detail/threshold_search.cuh over the pool
//   draw      survivors compute their noise (detail/draw.cuh)
//
// A guess that fails (seen exactly, from integer masses) or a list that does not fit sends the whole cluster
// into search and draw over its slices.
//
// The limit of top-p is a share of the row's integer mass, which nobody adds up: the fp32 sum of the
// statistics bounds it to 2 millionths or so. Almost always the same id crosses both ends' limits, and that
// settles it; if not, the integer mass is read from device memory once more.
#pragma once

#include "cluster_sums.cuh"
#include "draw.cuh"

namespace entrgi {

struct Candidate {
  float z;
  int id;
};

#ifdef ENTRGI_CLUSTERS

constexpr int kClusterBins = 512;  // of the threshold search: more would cost registers
constexpr int kListed = 1024;      // candidates of one CTA
constexpr int kSamples = 64;       // threads whose ids are the sample

// What a sweep found above the guessed threshold.
struct Found {
  uint64_t mass;
  uint32_t count;
};
__device__ __forceinline__ Found merge(const Found& a, const Found& b) {
  return {a.mass + b.mass, a.count + b.count};
}
__device__ __forceinline__ Found gather(const Found& a) {
  return {sum_across_warp(a.mass), __reduce_add_sync(~0u, a.count)};
}

struct Guess {
  uint32_t needed, spare;
};
__device__ __forceinline__ Guess merge(const Guess& a, const Guess& b) {
  return {max(a.needed, b.needed), max(a.spare, b.spare)};
}

struct DrawShared : ClusterShared {
  union {
    SearchShared<kClusterBins> search;
    Candidate list[kListed];  // of this CTA
  };
  float sample_max[kSamples], sample_mass[kSamples];
  float guess[kSamples / 32];
  int listed;  // candidates of this CTA
  int pooled;  // of the row, in the CTA of rank 0
  int offset;
  uint64_t limit, limit_bound;  // of the search by mass, and what it is at most
  bool spare;                   // this slice may be left out as a whole, by its sample
};

// The integer mass of a row's allowed ids, from device memory, by one CTA.
template <typename T>
__device__ __noinline__ uint64_t mass_of_row(const T* row, const bool* forbidden, int vocab,
                                             RowScores scores) {
  const RowVectors<T> vectors(row, 0, vocab);
  uint64_t sum = 0;
#pragma unroll 1
  for (int vector = threadIdx.x; vector < vectors.count; vector += kClusterThreads) {
    float z[kVector];
    vectors.load(vector, z);
    vectors.mask(vector, forbidden, z);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += z[i] > -CUDART_INF_F ? scores.mass(z[i]) : 0;
  }
  return sum;
}

// Where the candidates of a row lie once it is read no more: in place of the slice of rank 0.
template <typename T>
__device__ __forceinline__ Candidate* pool_of(const RowSlice<T>& slice) {
  return reinterpret_cast<Candidate*>(slice.units);
}

// What is left to search: all of a row, by the whole cluster, or its candidates, by one CTA.
template <typename T>
struct SearchRow {
  const RowSlice<T>& slice;
  const Cluster& cluster;
  int pooled;  // candidates, in place of the slice, or -1

  template <typename F>
  __device__ __forceinline__ void for_each(int low, int high, F f) const {
    const int begin = pooled >= 0 ? 0 : max(low - slice.first_id, 0);
    const int end = pooled >= 0 ? pooled : min(high + 1 - slice.first_id, slice.count * slice.kPerUnit);
#pragma unroll 1
    for (int i = begin + threadIdx.x; i < end; i += kClusterThreads) {
      // One call: f is large.
      const Candidate c = pooled >= 0 ? pool_of(slice)[i] : Candidate{slice.get(0, i), slice.first_id + i};
      f(c.z, c.id);
    }
  }
  __device__ __forceinline__ uint64_t weight(const uint32_t* low, int high) const {
    uint64_t sum = 0;
#pragma unroll 1
    for (int cta = 0; cta < cluster.size; ++cta) {
      const uint32_t* words = cluster.in_cta(low, cta);
      sum += static_cast<uint64_t>(words[high]) << 32 | words[0];
    }
    return sum;
  }
  __device__ __forceinline__ void sync() const { cluster.sync(); }
};

// A logit below which the search need not look, or -inf: the largest maximum of a sample (the ids of one
// thread in four) such that
//   by count  as many samples as each CTA has to find reach it
//   by mass   the samples all below it, as a sample of all ids below it, have less mass than may be left out
// The first is certain, the second a guess that is checked.
__device__ float guess_threshold(DrawShared& shared, float thread_max, float thread_mass, float spare_mass,
                                 int wanted) {
  constexpr int kStride = kClusterThreads / kSamples;
  if (threadIdx.x % kStride == 0) {
    shared.sample_max[threadIdx.x / kStride] = thread_max;
    shared.sample_mass[threadIdx.x / kStride] = thread_mass;
  }
  __syncthreads();
  if (threadIdx.x < kSamples) {
    const float mine = shared.sample_max[threadIdx.x];
    float tail = 0.f, all = 0.f;
    int below = 0;
#pragma unroll 8
    for (int i = 0; i < kSamples; ++i) {
      all += shared.sample_mass[i];
      if (shared.sample_max[i] < mine) {
        tail += shared.sample_mass[i];
        ++below;
      }
    }
    const bool enough =
        kSamples - below >= wanted || (below > 0 && tail * kClusterThreads <= spare_mass * below);
    const uint32_t best = __reduce_max_sync(~0u, ordered_key<float>(enough ? mine : -CUDART_INF_F));
    if (threadIdx.x % 32 == 0) shared.guess[threadIdx.x / 32] = from_ordered_key<float>(best);
    if (threadIdx.x == 0) shared.spare = all * kStride <= spare_mass;
  }
  __syncthreads();
  float guess = shared.guess[0];
#pragma unroll
  for (int i = 1; i < kSamples / 32; ++i) guess = fmaxf(guess, shared.guess[i]);
  return guess;
}

// Lists the ids of this slice from `guess` up. A count of kTooMany or more: they did not fit.
constexpr uint32_t kTooMany = 1u << 20;  // 2,048 threads may add it
template <typename T>
__device__ Found list_candidates(const RowSlice<T>& slice, float thread_max, float guess,
                                 const RowScores& scores, DrawShared& shared) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  Found found{};
  if (thread_max < guess) return found;
  bool full = false;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < slice.count; unit += kClusterThreads) {
    if (Packed<T>::largest_or_nan(unit_max<T>(slice.units[unit])) < guess) continue;
    float z[kPerUnit];
    slice.load(unit, z);
    uint32_t reached = 0;
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) reached |= z[i] >= guess ? 1u << i : 0;
    found.count += __popc(reached);
    for (; reached != 0; reached &= reached - 1) {
      const int i = __ffs(reached) - 1;
      const float z = slice.get(unit, i);
      found.mass += scores.mass(z);
      const int place = atomicAdd(&shared.listed, 1);
      full |= place >= kListed;
      if (place < kListed) shared.list[place] = {z, slice.id(unit) + i};
    }
  }
  found.count += full ? kTooMany : 0;
  return found;
}

// Bounds of the integer total of masses whose sum in fp32 is `sum`: each of its roundings, one after the
// other for a thread and in trees after that, errs by at most 2^-24 of it, each mass by half a unit.
struct MassBounds {
  uint64_t low, high;

  __device__ MassBounds(float sum, int vocab, int units_per_thread) {
    const double mass = static_cast<double>(sum) * kMassUnit,
                 error = mass * (32 + units_per_thread) * 0x1p-24 + vocab;
    low = __double2ull_rd(fmax(mass - error, 0.));
    high = __double2ull_ru(mass + error);
  }
};

// The draw of a row that holds its allowed ids alone. `thread_mass` sums up e^((z - max) / tau) over the
// thread's ids, `row_mass` over the row's.
template <typename T>
__device__ void draw(const SampleTokensParams& p, const Scales& scales, int64_t n, const RowSlice<T>& slice,
                     float max, float thread_max, float thread_mass, float row_mass, Cluster cluster,
                     DrawShared& shared, uint32_t room) {
  using Search = ThresholdSearch<T, SearchRow<T>, kClusterThreads, kClusterBins>;
  const int vocab = static_cast<int>(p.vocab);
  const RowScores scores{max, scales.scale, scales.bins_per_logit};
  DrawRule rule{max, scales.tau, {}, 0, {}};
  const bool by_mass = p.top_p < 1.0, by_count = p.top_k != 0 && p.top_k < p.vocab;
  SearchRow<T> row{slice, cluster, -1};

  if (by_mass || by_count) {
    // Half of what the filter leaves out is spare.
    const float share = static_cast<float>(0.5 * (1 - p.top_p)) / static_cast<float>(cluster.size);
    const int wanted = by_count && p.top_k <= kSamples * cluster.size
                           ? (static_cast<int>(p.top_k) + cluster.size - 1) / cluster.size
                           : INT_MAX;
    float guess = guess_threshold(shared, thread_max, thread_mass, by_mass ? share * row_mass : -1.f, wanted);
    // The smallest guess of all CTAs, as the largest of the negated keys.
    const uint32_t key = ordered_key<float>(guess);
    const Guess guesses = cluster.exchange(0, shared.spare ? Guess{0, key} : Guess{~key, 0}, Guess{0, 0});
    const uint32_t lowest = __reduce_max_sync(~0u, guesses.needed),
                   spare = __reduce_max_sync(~0u, guesses.spare);
    guess = from_ordered_key<float>(lowest != 0 ? ~lowest : spare);
    Found found{};
    if (guess > -CUDART_INF_F) {
      found = gather(
          cluster.exchange(1, gather(list_candidates(slice, thread_max, guess, scores, shared)), found));
    }
    const MassBounds total(row_mass, vocab, vocab / (slice.kPerUnit * kClusterThreads * cluster.size) + 2);
    const uint64_t limit_bound = mass_limit(p.top_p, total.high);
    if (found.count <= room &&
        ((by_mass && found.mass > limit_bound) || (by_count && found.count >= p.top_k))) {
      if (threadIdx.x == 0) {
        shared.offset = atomicAdd(cluster.in_cta(&shared.pooled, 0), shared.listed);
        shared.limit = mass_limit(p.top_p, total.low);
        shared.limit_bound = limit_bound;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < shared.listed; i += kClusterThreads) {
        cluster.in_cta(pool_of(slice), 0)[shared.offset + i] = shared.list[i];
      }
      cluster.sync();
      if (cluster.rank != 0) return;
      cluster.size = 1;
      row.pooled = static_cast<int>(found.count);
    } else {
      if (threadIdx.x == 0) shared.limit = Search::kShareOfTotal;
      __syncthreads();
    }
    // By count, by mass, and once more if the limit is not known exactly enough; one copy of the code.
#pragma unroll 1
    for (int turn = by_count ? 0 : 1; turn < (by_mass ? 3 : 1); ++turn) {
      const Threshold threshold = Search{row, scores, vocab, shared.search, turn > 0}.run(
          turn > 0 ? shared.limit : static_cast<uint64_t>(p.top_k - 1), p.top_p);
      const bool decided = row.pooled < 0 || threshold.key == 0 ||
                           shared.limit_bound < shared.search.ahead + shared.search.crossing_weight;
      __syncthreads();  // the next search writes what this one read
      if (turn == 0) {
        rule.smallest_key = threshold.key;
        continue;
      }
      rule.nucleus = threshold;
      if (decided || turn == 2) break;
      const T* logits = static_cast<const T*>(p.logits) + n * p.logits_stride;
      const uint64_t mass = sum_across_warp(mass_of_row(logits, p.forbidden, vocab, scores));
      const Found exact = gather(cluster.exchange(1, Found{mass, 0}, Found{}));
      if (threadIdx.x == 0) shared.limit = mass_limit(p.top_p, exact.mass);
      __syncthreads();
    }
  }

  rule.key = load_row_key(p.keys + 4 * n);
  DrawState state = empty_draw();
  row.for_each(0, vocab - 1, [&](float z, int id) {
    if (rule.keeps<T>(z, id)) rule.add(state, z, id);
  });
  state = cluster.exchange(0, merge_across_warp(state), empty_draw());
  if (cluster.rank == 0 && threadIdx.x < 32) {
    state = merge_across_warp(state);
    if (threadIdx.x == 0) write_draw(p, n, state);
  }
}

#endif

}  // namespace entrgi
