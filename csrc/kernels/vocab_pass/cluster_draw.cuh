// The draw from a row in the slices of a cluster.
//
//   guess     a logit with little mass below it, from the samples of all CTAs
//   list      all ids from there up, and their mass. If that is more than the limit, or they are k or more,
//             nothing below can be kept
//   pool      a few go to one CTA, which does the rest while the others make room
//   search    threshold_search.cuh over pool or lists, by counting once it is about few
//   draw      survivors compute their noise (draw.cuh)
//
// A guess that fails (seen exactly, from integer masses) sends the cluster into a search over all ids. Where
// more ids are met than a list holds, a slice is listed and worked off in blocks, anew for every read: what
// is done for an id is done for full warps, whatever share of the ids is concerned.
//
// The limit of top-p is a share of the row's integer mass, which nobody adds up: the sums of the statistics
// bound it (MassBounds). Almost always the same id crosses both ends' limits, and that settles it; if not,
// the integer mass is added up after all.
#pragma once

#include "cluster_sums.cuh"
#include "draw.cuh"

namespace entrgi {

struct Candidate {
  float z;
  int id;
};

#ifdef ENTRGI_CLUSTERS

constexpr int kClusterBins = 256;         // of the threshold search
constexpr int kGuessBins = 256;           // of the samples, an eighth of tau each
constexpr double kSpare = 0.75;           // of what the filter leaves out, below the guess
constexpr int kListed = 4096;             // ids of one CTA that are listed at a time
constexpr int kOwn = 512;                 // of one CTA that may go to the pool
constexpr int kPooled = 2048;             // of all CTAs
constexpr int kRanked = kClusterThreads;  // candidates of a bin that are ranked by counting
constexpr int kShort = 128;     // of a pool that are ranked at once: more cost more than a histogram
constexpr int kHeldIds = 2048;  // forbidden ids of one CTA that are noted while the row lands

// What a draw goes through, counted in words after error_flag's if the library is built for that
// (benchmarks/draw_statistics.py).
enum Event { kRankedPool = 1, kSearchedPool, kLists, kSearchedBlocks, kAllIds, kUndecided, kEvents };
__device__ __forceinline__ void count_event(const SampleTokensParams& p, const Cluster& cluster,
                                            Event event) {
#ifdef ENTRGI_COUNT_DRAWS
  if (cluster.rank == 0 && threadIdx.x == 0) atomicAdd(p.error_flag + event, 1);
#endif
}

// What lies above the guess. `crowded`: a CTA has more than may go to the pool, and counts nothing.
struct Found {
  uint64_t mass;
  uint32_t count, crowded;
};
__device__ __forceinline__ Found merge(const Found& a, const Found& b) {
  return {a.mass + b.mass, a.count + b.count, a.crowded | b.crowded};
}
__device__ __forceinline__ Found gather(const Found& a) {
  return {sum_across_warp(a.mass), __reduce_add_sync(~0u, a.count), __reduce_or_sync(~0u, a.crowded)};
}

struct DrawShared : ClusterShared {
  union {
    uint16_t list[kListed];  // elements of the slice, or of a block of it
    int32_t forbidden[kHeldIds];
  };
  union {
    SearchShared<kClusterBins, kRanked> search;
    Candidate own[kOwn];
  };
  alignas(16) uint32_t sample[kGuessBins];  // ids in each bin; threads' maxima, times 2^16
  int64_t n;                                // the row
  RowScores scores;
  RowKey key;
  Threshold nucleus;
  uint32_t smallest_key;  // of top-k
  int best;               // see draw.cuh
  int listed;             // ids of the list or of the pool
  int pooled;             // by all CTAs, in that of rank 0
  int offset;
  int guess;                    // bins of the sample to be searched
  uint32_t least;               // key that this leads to
  uint32_t counted_from;        // key of the first counter in `search`, 0 where there are none
  uint64_t limit, limit_bound;  // of the search by mass, and what it is at most
  uint64_t forbidden_mass;
};

// Of the lowest finite logit.
template <typename T>
__device__ __forceinline__ uint32_t lowest_key() {
  return ordered_key<T>(-CUDART_INF_F) + 1;
}

// What no draw waits for: begins to be loaded while the row does.
template <typename T>
__device__ __forceinline__ void begin_draw(const SampleTokensParams& p, int64_t n, DrawShared& shared) {
  if (threadIdx.x == 0) {
    shared.key = load_row_key(p.keys + 4 * n);
    shared.n = n;
    shared.best = kNoBest;
    shared.nucleus = {};
    shared.smallest_key = 0;
    shared.listed = shared.pooled = 0;
    shared.counted_from = 0;
    shared.least = lowest_key<T>();
  }
  shared.sample[threadIdx.x] = 0;
  static_assert(kGuessBins == kClusterThreads);
}

// Bits of bytes that are not 0.
__device__ __forceinline__ uint32_t set_bytes(uint32_t bytes) {
  return __vminu4(bytes, 0x01010101u) * 0x01020408u >> 24;
}

// Ids of a slice, without padding.
template <typename T>
__device__ __forceinline__ bool holds(const RowSlice<T>& slice, int vocab, int id) {
  const int begin = max(slice.first_id, 0);
  const int end = min(slice.first_id + slice.count * slice.kPerUnit, vocab);
  return static_cast<uint32_t>(id - begin) < static_cast<uint32_t>(max(end - begin, 0));
}

// Which of a list of forbidden ids are this slice's; while the row lands.
template <typename T>
__device__ __forceinline__ void hold_forbidden(const RowSlice<T>& slice, const SampleTokensParams& p,
                                               DrawShared& shared) {
  constexpr int kLoads = 2;
  const int count = static_cast<int>(min(p.num_forbidden, static_cast<int64_t>(INT_MAX / 2)));
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kLoads * kClusterThreads) {
    int ids[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int i = first + u * kClusterThreads;
      ids[u] = i < count ? __ldg(p.forbidden_ids + i) : -1;
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (!holds(slice, static_cast<int>(p.vocab), ids[u])) continue;
      const int place = atomicAdd(&shared.listed, 1);
      if (place < kHeldIds) shared.forbidden[place] = ids[u];
    }
  }
}

// Makes forbidden ids -inf in the slice and adds up what they had. No thread may still read the slice.
template <typename T>
__device__ void forbid(const RowSlice<T>& slice, const SampleTokensParams& p, const RowScores& scores,
                       DrawShared& shared, Sums& sums) {
  const int vocab = static_cast<int>(p.vocab);
  const auto take = [&](int id) {
    if (!holds(slice, vocab, id)) return;
    const float z = slice.take(id);
    if (z > -CUDART_INF_F) sums.forbidden += scores.mass(z);
    sums.lost_argmax |= z == scores.max;
  };
  const bool held = shared.listed <= kHeldIds;
  const int count = held ? shared.listed : static_cast<int>(p.num_forbidden);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kClusterThreads) {
    take(held ? shared.forbidden[i] : p.forbidden_ids[i]);
  }
  const int begin = max(slice.first_id, 0);
  const int end = min(slice.first_id + slice.count * slice.kPerUnit, vocab);
  if (p.forbidden == nullptr || begin >= end) return;
  // Flags by sixteen, four loads in flight; the first and the last few one at a time.
  constexpr int kFlags = 16, kLoads = 4;
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(p.forbidden + begin) % kFlags);
  const int head = min(begin + (kFlags - misaligned) % kFlags, end);
  const int vectors = (end - head) / kFlags, tail = head + vectors * kFlags;
  const uint4* flags = reinterpret_cast<const uint4*>(p.forbidden + head);
#pragma unroll 1
  for (int first = threadIdx.x; first < vectors; first += kLoads * kClusterThreads) {
    uint64_t set = 0;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int i = first + u * kClusterThreads;
      const uint4 raw = i < vectors ? __ldg(flags + i) : uint4{};
      const uint32_t bits =
          set_bytes(raw.x) | set_bytes(raw.y) << 4 | set_bytes(raw.z) << 8 | set_bytes(raw.w) << 12;
      set |= static_cast<uint64_t>(bits) << kFlags * u;
    }
    for (; set != 0; set &= set - 1) {
      const int bit = __ffsll(static_cast<long long>(set)) - 1;
      take(head + (first + bit / kFlags * kClusterThreads) * kFlags + bit % kFlags);
    }
  }
  const int edge = threadIdx.x % kFlags + (threadIdx.x < kFlags ? begin : tail);
  if (threadIdx.x < 2 * kFlags && edge < (threadIdx.x < kFlags ? head : end) && p.forbidden[edge]) take(edge);
}

// Where the candidates of a row lie once it is read no more: in place of the slice of rank 0.
template <typename T>
__device__ __forceinline__ Candidate* pool_of(const RowSlice<T>& slice) {
  return reinterpret_cast<Candidate*>(slice.units);
}

// Lists the elements of units [begin, end) with keys of [low, high], counted from the first of them; nothing
// where the list is too short, but their number.
template <typename T>
__device__ void list_units(const RowSlice<T>& slice, int begin, int end, uint32_t low, uint32_t high,
                           DrawShared& shared) {
  const uint32_t lows = Packed<T>::all(from_ordered_key<T>(low)),
                 highs = Packed<T>::all(from_ordered_key<T>(high));
  constexpr int kUnits = 4;
  const int thread = this_thread(), lane = thread % 32;
#pragma unroll 1
  for (int first = begin + thread; first - lane < end; first += kUnits * kClusterThreads) {
    uint32_t met = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = first + u * kClusterThreads;
      if (unit < end) met |= elements_within<T>(slice.units[unit], u, lows, highs);
    }
    if (!__any_sync(~0u, met != 0)) continue;
    const int own = __popc(met);
    int place = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, place, delta);
      if (lane >= delta) place += other;
    }
    int base = 0;
    if (lane == 31) base = atomicAdd(&shared.listed, place);
    place += __shfl_sync(~0u, base, 31) - own;
    if (place + own > kListed) continue;
    const int element = (first - begin) * slice.kPerUnit;
    uint16_t* next = shared.list + place;
#pragma unroll 1
    for (; met != 0; met &= met - 1) {
      const uint32_t bit = __clz(__brev(met));
      *next++ = static_cast<uint16_t>(element + element_of_bit<T, kClusterThreads * slice.kPerUnit>(bit));
    }
  }
}

// All lanes' states, as `merge` makes them one; -0 is +0.
__device__ __forceinline__ DrawState gather(const DrawState& mine) {
  const auto key = [](float x) { return signed_key(__float_as_int(x + 0.f)); };
  const auto largest = [](int k) { return __reduce_max_sync(~0u, k); };
  const auto value = [](int k) { return __int_as_float(signed_key(k)); };
  DrawState all;
  all.sum = sum_across_warp(mine.sum);
  all.weighted = static_cast<int64_t>(sum_across_warp(static_cast<uint64_t>(mine.weighted)));
  const int best = largest(key(mine.best));
  const uint32_t token = key(mine.best) == best ? mine.token : UINT32_MAX;
  all.best = value(best);
  all.token = static_cast<int>(__reduce_min_sync(~0u, token));
  const uint32_t winners = __ballot_sync(~0u, static_cast<int>(token) == all.token);
  all.token_score = __shfl_sync(~0u, mine.token_score, __ffs(winners) - 1);
  const int first = largest(key(mine.first));
  const uint32_t firsts = __ballot_sync(~0u, key(mine.first) == first);
  const bool owner = threadIdx.x % 32 == __ffs(firsts) - 1;
  all.first = value(first);
  all.second = value(largest(key(owner ? mine.second : mine.first)));
  return all;
}

// What is left to search, and where.
template <typename T>
struct SearchRow {
  static constexpr int kBlock = kListed / RowSlice<T>::kPerUnit;
  static_assert(kBlock % kClusterThreads == 0);
  enum Place {
    kBlocks,  // in the slices, which are listed in blocks for every read
    kList,    // in the slices, listed
    kPool     // in the pool of the CTA that is left
  };

  const RowSlice<T>& slice;
  const Cluster& cluster;
  DrawShared& shared;
  Place place = kBlocks;

  // Also passed: the number of an id in list or pool.
  template <typename F>
  __device__ __forceinline__ void for_each_numbered(const Level& level, F f) const {
    const uint32_t low = max(level.key_low, shared.least),
                   high = min(level.key_high, ordered_key<T>(FLT_MAX));
    const bool all = place == kBlocks && low == lowest_key<T>() && high == ordered_key<T>(FLT_MAX);
    const int blocks = place == kBlocks ? slice.count : 1;
#pragma unroll 1
    for (int first = 0; first < blocks; first += kBlock) {
      const int end = min(first + kBlock, slice.count);
      int listed = shared.listed;
      if (all) {
        listed = (end - first) * slice.kPerUnit;
      } else if (place == kBlocks) {
        __syncthreads();  // the list is read no more
        if (threadIdx.x == 0) shared.listed = 0;
        __syncthreads();
        list_units(slice, first, end, low, high, shared);
        __syncthreads();
        listed = shared.listed;
      }
      if (place == kPool) {
#pragma unroll 1
        for (int i = this_thread(); i < listed; i += kClusterThreads) {
          const Candidate c = pool_of(slice)[i];
          f(c.z, c.id, i);
        }
        return;
      }
      const int first_id = slice.first_id + first * slice.kPerUnit;
#pragma unroll 1
      for (int i = this_thread(); i < listed; i += kClusterThreads) {
        const int element = all ? i : shared.list[i];
        f(slice.get(first, element), first_id + element, i);
      }
    }
  }
  template <typename F>
  __device__ __forceinline__ void for_each(const Level& level, F f) const {
    for_each_numbered(level, [&](float z, int id, int) { f(z, id); });
  }
  __device__ __forceinline__ uint64_t weight(const uint64_t* bin) const {
    uint64_t sum = 0;
#pragma unroll 1
    for (int cta = 0; cta < cluster.size; ++cta) sum += *cluster.in_cta(bin, cta);
    return sum;
  }
  __device__ __forceinline__ void sync() const { cluster.sync(); }

  // Whether nothing was guessed.
  __device__ __forceinline__ bool searches_all() const { return shared.least == lowest_key<T>(); }

  __device__ __forceinline__ bool is_short() const { return place == kPool && shared.listed <= kShort; }
  __device__ __forceinline__ uint32_t least_key() const { return shared.least; }
  __device__ __forceinline__ uint32_t& counted_from() const { return shared.counted_from; }
  __device__ __forceinline__ bool is_first() const { return cluster.rank == 0; }
  template <typename U>
  __device__ __forceinline__ U* in_first(U* here) const {
    int first = 0;
    asm volatile("" : "+r"(first));  // found where it is needed, which is rare: loops keep no addresses
    return cluster.in_cta(here, first);
  }
  template <typename S>
  __device__ void tell(S& search, uint64_t ahead, uint64_t weight, uint32_t key, int id) const {
#pragma unroll 1
    for (int cta = 0; cta < cluster.size; ++cta) {
      S& there = *cluster.in_cta(&search, cta);
      there.ahead = ahead;
      there.crossing_weight = weight;
      there.key_low = key;
      there.bin = id;
    }
  }
};

// The row's integer mass, forbidden ids included, from device memory by one CTA: several loads in flight.
template <typename T>
__device__ __noinline__ uint64_t mass_of_row(const T* row, int vocab, RowScores scores) {
  constexpr int kLoads = 4;
  const RowVectors<T> vectors(row, 0, vocab);
  uint64_t sum = 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < vectors.count; first += kLoads * kClusterThreads) {
    float z[kLoads][kVector];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int vector = first + u * kClusterThreads;
      if (vector < vectors.count) {
        vectors.load(vector, z[u]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[u][i] = -CUDART_INF_F;
      }
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += z[u][i] > -CUDART_INF_F ? scores.mass(z[u][i]) : 0;
    }
  }
  return sum;
}

// The same of what the slice holds.
template <typename T>
__device__ uint64_t mass_of_slice(const RowSlice<T>& slice, const RowScores& scores) {
  uint64_t sum = 0;
#pragma unroll 1
  for (int unit = this_thread(); unit < slice.count; unit += kClusterThreads) {
    float z[RowSlice<T>::kPerUnit];
    slice.load(unit, z);
#pragma unroll
    for (int i = 0; i < slice.kPerUnit; ++i) sum += scores.mass(z[i]);  // 0 for -inf
  }
  return sum;
}

// Samples the slice: one unit of each thread by mass, and what each thread has as its maximum by count.
template <typename T>
__device__ void take_sample(const RowSlice<T>& slice, const RowScores& scores, float thread_max, bool by_mass,
                            bool by_count, DrawShared& shared) {
  if (by_mass && threadIdx.x < slice.count) {
    float z[RowSlice<T>::kPerUnit];
    slice.load(slice.count > kClusterThreads
                   ? static_cast<int>(threadIdx.x * static_cast<uint32_t>(slice.count) / kClusterThreads)
                   : threadIdx.x,
               z);
#pragma unroll
    for (int i = 0; i < RowSlice<T>::kPerUnit; ++i) {
      const int b = scores.linear_bin(z[i]);
      if (b < kGuessBins - 1) atomicAdd(&shared.sample[b], 1);  // the last one would weigh nothing
    }
  }
  if (by_count) {
    const int b = max(scores.linear_bin(thread_max), 0);
    if (b < kGuessBins - 1) atomicAdd(&shared.sample[b], 1 << 16);
  }
}

// How many bins of the cluster's samples have to be searched, by one warp: as few as leave so much of their
// mass below, or as hold so many threads' maxima; kGuessBins if there are none. `spare` is what may be left
// out, in e^((z - max) / tau) of the samples; negative: not by mass. By count it is certain; by mass it is a
// guess that is checked, and empty bins below it, of which the samples say nothing, are added.
__device__ __forceinline__ int guess_bins(const Cluster& cluster, DrawShared& shared, float spare,
                                          int64_t wanted) {
  constexpr int kPerLane = kGuessBins / 32;
  constexpr float kStep = kLog2e / 8;  // of a bin, as a power of 2
  const int lane = threadIdx.x % 32, begin = lane * kPerLane;
  uint32_t bins[kPerLane] = {};
#pragma unroll 1
  for (int cta = 0; cta < cluster.size; ++cta) {
    const uint4* sample = reinterpret_cast<const uint4*>(cluster.in_cta(shared.sample + begin, cta));
    const uint4 a = sample[0], b = sample[1];
    const uint32_t words[kPerLane] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) bins[i] += words[i];
  }
  float mass[kPerLane], weight = exp2_approx((begin + 0.5f) * -kStep), all = 0.f;
  uint32_t met = 0;
  int maxima = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t ids = bins[i] & 0xffff;
    mass[i] = static_cast<float>(ids) * weight;
    all += mass[i];
    met |= ids != 0 ? 1u << i : 0;
    maxima += static_cast<int>(bins[i] >> 16);
    weight *= 0.88249690f;  // e^(-1/8)
  }
  float below = all;  // of this lane's bins and all after them
  int above = maxima;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const float later = __shfl_down_sync(~0u, below, delta);
    const int earlier = __shfl_up_sync(~0u, above, delta);
    if (lane + delta < 32) below += later;
    if (lane >= delta) above += earlier;
  }
  const float next = __shfl_down_sync(~0u, below, 1);
  float tail = lane < 31 ? next : 0.f;
  above -= maxima;
  int by_mass = kGuessBins, by_count = kGuessBins;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) {
    tail += mass[i];
    if (tail <= spare) by_mass = begin + i;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    above += static_cast<int>(bins[i] >> 16);
    if (above >= wanted) by_count = min(by_count, begin + i + 1);
  }
  by_mass = __reduce_min_sync(~0u, by_mass);
  by_count = __reduce_min_sync(~0u, by_count);
  if (by_mass < kGuessBins) {
    const uint32_t rest = met & (~0u << min(max(by_mass - begin, 0), kPerLane));
    by_mass = __reduce_min_sync(~0u, rest != 0 ? begin + __ffs(rest) - 1 : kGuessBins - 1);
  }
  return min(by_mass, by_count);
}

// Bounds of the integer mass of a row's allowed ids. `sums.mass` adds up the same e^((z - max) / tau) as the
// integer masses do, with the same final maximum, and that is what makes the bounds rigorous: with a running
// maximum, as in vocab_pass, or sums that were rescaled, they would not be. Its roundings: the sum of half a
// unit, a tree in fp32, errs by 2^-24 a level, relative, for all terms are positive; sums of these in fp64 by
// 2^-53 each, which a hundredth of a level covers; each thread's total, and each integer mass, by half a
// unit. What is forbidden is subtracted exactly.
struct MassBounds {
  uint64_t low, high;

  __device__ MassBounds(const Sums& sums, int levels, int vocab, int threads) {
    const double mass = __ull2double_rn(sums.mass) - __ull2double_rn(sums.forbidden),
                 error = __ull2double_rn(sums.mass) * (levels + 0.01) * 0x1p-24 + 0.5 * (vocab + threads);
    low = __double2ull_rd(fmax(mass - error, 0.));
    high = __double2ull_ru(mass + error);
  }
};

// The draw of a row that holds its allowed ids alone. `sums` are gathered; `may_pool`: their forbidden mass
// is exact.
template <typename T>
__device__ void draw(const SampleTokensParams& p, const Scales& scales, const RowSlice<T>& slice, float max,
                     float thread_max, const Sums& sums, bool may_pool, Cluster cluster, DrawShared& shared,
                     uint32_t room) {
  using Search = ThresholdSearch<T, SearchRow<T>, kClusterThreads, kClusterBins, kRanked>;
  const int vocab = static_cast<int>(p.vocab);
  const RowScores scores{max, scales.scale, scales.bins_per_logit / 4};
  const bool by_mass = p.top_p < 1.0, by_count = p.top_k != 0 && p.top_k < p.vocab;
  if (threadIdx.x == 0) {
    shared.scores = scores;
    shared.listed = 0;
  }
  SearchRow<T> row{slice, cluster, shared};
  const auto search_all = [&] {
    __syncthreads();
    if (this_thread() == 0) {
      shared.least = lowest_key<T>();
      shared.counted_from = 0;
      shared.scores.bins_per_logit = scales.bins_per_logit / 4;
    }
    __syncthreads();
    row.place = row.kBlocks;
    count_event(p, cluster, kAllIds);
  };

  if (by_mass || by_count) {
    take_sample(slice, scores, thread_max, by_mass, by_count, shared);
    cluster.sync();
    if (threadIdx.x < 32) {
      const float allowed = __ull2float_rn(sums.mass - sums.forbidden) / kMassUnit,
                  ids = static_cast<float>(cluster.size * kClusterThreads * slice.kPerUnit),
                  spare = static_cast<float>(kSpare * (1 - p.top_p)) * allowed * fminf(ids / vocab, 1.f);
      const int guess = guess_bins(cluster, shared, by_mass ? spare : -1.f, by_count ? p.top_k : INT64_MAX);
      if (threadIdx.x == 0) {
        shared.guess = guess;
        const MassBounds total(sums, tree_levels<T>, vocab, cluster.size * kClusterThreads);
        shared.limit = mass_limit(p.top_p, total.low);
        shared.limit_bound = mass_limit(p.top_p, total.high);
        shared.forbidden_mass = sums.forbidden;
      }
    }
    __syncthreads();
    if (shared.guess < kGuessBins) {
      const float bins = static_cast<float>(shared.guess) * 1.00001f;
      const uint32_t least = ::max(ordered_key<T>(max - bins / scores.bins_per_logit), lowest_key<T>());
      const float depth = max - from_ordered_key<T>(least);
      if (threadIdx.x == 0) {
        shared.least = least;
        shared.scores.bins_per_logit = fminf((kClusterBins - 1) / depth, FLT_MAX);
      }
      // Each thread meets the units of its maximum.
      if (__any_sync(~0u, max - thread_max <= depth)) {
        list_units(slice, 0, slice.count, least, ordered_key<T>(FLT_MAX), shared);
      }
      __syncthreads();
      if (shared.listed <= kListed && slice.count * slice.kPerUnit <= 1 << 16) row.place = row.kList;
      Found found{0, 0, row.place != row.kList || shared.listed > kOwn};
      if (!found.crowded) {
        row.for_each_numbered({}, [&](float z, int id, int i) {
          found.mass += scores.mass(z);
          ++found.count;
          shared.own[i] = {z, id};
        });
      }
      found = gather(cluster.exchange(1, gather(found), Found{}));
      // Where there is no count, the search will tell.
      const bool holds = found.crowded || (by_mass && found.mass > shared.limit_bound) ||
                         (by_count && found.count >= p.top_k);
      if (!holds) {
        search_all();
      } else if (may_pool && !found.crowded && found.count <= min(room, kPooled)) {
        if (threadIdx.x == 0) shared.offset = atomicAdd(cluster.in_cta(&shared.pooled, 0), shared.listed);
        __syncthreads();
        for (int i = threadIdx.x; i < shared.listed; i += kClusterThreads) {
          cluster.in_cta(pool_of(slice), 0)[shared.offset + i] = shared.own[i];
        }
        cluster.sync();
        if (cluster.rank != 0) return;
        cluster.size = 1;
        row.place = row.kPool;
        if (threadIdx.x == 0) shared.listed = static_cast<int>(found.count);
        count_event(p, cluster, found.count <= kShort ? kRankedPool : kSearchedPool);
      } else {
        count_event(p, cluster, row.place == row.kList ? kLists : kSearchedBlocks);
      }
      __syncthreads();
    } else {
      count_event(p, cluster, kAllIds);
    }
    // By count, by mass, and once more if the limit is not known exactly enough; all of it again, over all
    // ids, if nothing above the guess crosses a limit. One copy of the code.
#pragma unroll 1
    for (int turn = by_count ? 0 : 1;; ++turn) {
      const uint64_t limit = turn == 0            ? static_cast<uint64_t>(p.top_k - 1)
                             : row.searches_all() ? Search::kShareOfTotal
                                                  : shared.limit;
      const Threshold threshold =
          Search{row, shared.scores, vocab, shared.search, turn > 0}.run(limit, p.top_p);
      const bool decided = row.searches_all() || threshold.key == 0 ||
                           shared.limit_bound < shared.search.ahead + shared.search.crossing_weight;
      if (this_thread() == 0) {
        (turn == 0 ? shared.smallest_key : shared.nucleus.key) = threshold.key;
        if (turn > 0) shared.nucleus.id = threshold.id;
      }
      __syncthreads();  // the next search writes what this one read
      if (turn == 0 && by_mass) continue;
      if (shared.smallest_key == 0 && threshold.key == 0 && !row.searches_all()) {
        search_all();
        turn = by_count ? -1 : 0;
        continue;
      }
      if (turn == 0 || turn == 2 || decided) break;
      count_event(p, cluster, kUndecided);
      const T* logits = static_cast<const T*>(p.logits.data) + shared.n * p.logits.stride;
      const bool pooled = row.place == row.kPool;
      const uint64_t mass =
          pooled ? mass_of_row(logits, vocab, shared.scores) : mass_of_slice(slice, shared.scores);
      const Found exact = gather(cluster.exchange(1, Found{sum_across_warp(mass), 0, 0}, Found{}));
      if (this_thread() == 0) {
        shared.limit = mass_limit(p.top_p, exact.mass - (pooled ? shared.forbidden_mass : 0));
      }
      __syncthreads();
    }
  }

  __syncthreads();
  const DrawRule rule{shared.scores.max, scales.tau, shared.nucleus, shared.smallest_key, shared.key};
  DrawState state = empty_draw();
  // Kept are `lowest` up to id `last`, and what is larger.
  const uint32_t lowest_kept = ::max(::max(rule.nucleus.key, rule.smallest_key), lowest_key<T>());
  const float lowest = from_ordered_key<T>(lowest_kept);
  const int last = rule.nucleus.key >= rule.smallest_key ? rule.nucleus.id : INT32_MAX;
  const uint32_t counted_from = shared.counted_from;
  if (counted_from != 0 && cluster.rank == 0) {
    Search::weigh_counted(row, shared.search, lowest_kept, rule, state);
  }
  row.for_each({.key_low = lowest_kept}, [&](float z, int id) {
    if (!(z > lowest || (z == lowest && id <= last))) return;
    const float score = rule.score(z);
    rule.contend(state, score, id, &shared.best);
    if (counted_from == 0 || z == lowest) rule.weigh(state, score, 1);
  });
  cluster.send(0, gather(state), 1);
  if (cluster.rank == 0 && threadIdx.x < 32) {
    state = gather(cluster.received(0, empty_draw()));
    if (threadIdx.x == 0) write_draw(p, shared.n, state);
  }
}

#endif

}  // namespace entrgi
