// Vocabulary pass on Hopper: the row stays in the shared memory of a cluster. The formulas are those of
// vocab_pass.cu; this kernel reads z from device memory once, with or without a draw.
#include <cuda_runtime.h>

#include "detail/cluster.cuh"
#include "detail/draw.cuh"
#include "detail/row_slice.cuh"
#include "vocab_pass.cuh"

namespace entrgi {
namespace {

constexpr int kThreads = 256, kBlocksPerSm = 4;
struct Candidate {
  float z;
  int id;
};

#ifdef ENTRGI_HOPPER

constexpr int kBins = 512;       // of the threshold search: more would cost registers
constexpr int kListed = 1024;     // candidates of one CTA
constexpr int kSamples = 64;      // threads whose ids are the sample

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
__device__ __forceinline__ Largest merge(const Largest& a, const Largest& b) { return {max(a.key, b.key)}; }

// What a sweep found above the guessed threshold.
struct Found {
  uint64_t mass;
  uint32_t count;
};
__device__ __forceinline__ Found merge(const Found& a, const Found& b) { return {a.mass + b.mass, a.count + b.count}; }
__device__ __forceinline__ Found gather(const Found& a) {
  return {sum_across_warp(a.mass), __reduce_add_sync(~0u, a.count)};
}

using Cluster = Group<kThreads, 48>;
static_assert(sizeof(Sums) <= 48 && sizeof(DrawState) <= 48);

struct Shared {
  Cluster::Mailbox mailbox;
  uint64_t landed[kChunks];  // barriers
};

struct DrawShared : Shared {
  union {
    SearchShared<kBins> search;
    Candidate list[kListed];  // of this CTA
  };
  float sample_max[kSamples], sample_mass[kSamples];
  float guess[kSamples / 32];
  int listed;  // candidates of this CTA
  int pooled;  // of the row, in the CTA of rank 0
  int offset;
  uint64_t limit, limit_bound;  // of the search by mass, and what it is at most
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
  for (int unit = threadIdx.x; unit < slice.count; unit += kThreads) {
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
    for (int unit = c * slice.chunk + threadIdx.x; unit < end; unit += kThreads) {
      largest = Packed<T>::max_or_nan(largest, unit_max<T>(slice.units[unit]));
    }
  }
  return largest;
}

// One sweep over the slice with the final maximum. -inf spoils the weighted sums unless kInfinities. Units are added up on their own first: thousands of equal
// small terms that join a large one in turn would all round the same way.
template <typename T, bool kTempered, bool kInfinities>
__device__ Sums add_up(const RowSlice<T>& slice, float max, float scale) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  Sums s{};
#pragma unroll 1
  for (int unit = threadIdx.x; unit < slice.count; unit += kThreads) {
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
  return scales.tau == 1.f ? add_up<T, false>(slice, max, scales.scale) : add_up<T, true>(slice, max, scales.scale);
}

// sum_tau alone, where that of the first sweep does not count: after forbidden ids left, or for another maximum.
template <typename T>
__device__ float add_up_again(RowSlice<T> slice, float max, float scale) {
  return add_up<T, true, true>(slice, max, scale).sum_tau;
}

// The first id of the row's maximum in this thread's units; few threads have one.
template <typename T>
__device__ uint32_t first_id_of(const RowSlice<T>& slice, float max) {
  for (int unit = threadIdx.x; unit < slice.count; unit += kThreads) {
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
  for (int unit = threadIdx.x; unit < slice.count; unit += kThreads) {
    const int first = slice.id(unit);
    uint32_t out = 0;  // bits of forbidden elements
    if (first >= 0 && first + kPerUnit <= vocab && reinterpret_cast<uintptr_t>(forbidden + first) % kPerUnit == 0) {
      using Flags = std::conditional_t<kPerUnit == 8, uint64_t, uint32_t>;
      const Flags flags = __ldg(reinterpret_cast<const Flags*>(forbidden + first));
      if (flags == 0) continue;
      // Bytes of 0 and 1 to bits, four at a time.
      out = static_cast<uint32_t>(flags) * 0x01020408u >> 24;
      if (kPerUnit == 8) out |= (static_cast<uint32_t>(static_cast<uint64_t>(flags) >> 32) * 0x01020408u >> 24) << 4;
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

// The integer mass of a row's allowed ids, from device memory, by one CTA.
template <typename T>
__device__ __noinline__ uint64_t mass_of_row(const T* row, const bool* forbidden, int vocab, RowScores scores) {
  const RowVectors<T> vectors(row, 0, vocab);
  uint64_t sum = 0;
#pragma unroll 1
  for (int vector = threadIdx.x; vector < vectors.count; vector += kThreads) {
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
    for (int i = begin + threadIdx.x; i < end; i += kThreads) {
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
  constexpr int kStride = kThreads / kSamples;
  if (threadIdx.x % kStride == 0) {
    shared.sample_max[threadIdx.x / kStride] = thread_max;
    shared.sample_mass[threadIdx.x / kStride] = thread_mass;
  }
  __syncthreads();
  if (threadIdx.x < kSamples) {
    const float mine = shared.sample_max[threadIdx.x];
    float tail = 0.f;
    int below = 0;
#pragma unroll 8
    for (int i = 0; i < kSamples; ++i) {
      if (shared.sample_max[i] < mine) {
        tail += shared.sample_mass[i];
        ++below;
      }
    }
    const bool enough = kSamples - below >= wanted || (below > 0 && tail * kThreads <= spare_mass * below);
    const uint32_t best = __reduce_max_sync(~0u, ordered_key<float>(enough ? mine : -CUDART_INF_F));
    if (threadIdx.x % 32 == 0) shared.guess[threadIdx.x / 32] = from_ordered_key<float>(best);
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
__device__ Found list_candidates(const RowSlice<T>& slice, float thread_max, float guess, const RowScores& scores, DrawShared& shared) {
  constexpr int kPerUnit = RowSlice<T>::kPerUnit;
  Found found{};
  if (thread_max < guess) return found;
  bool full = false;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < slice.count; unit += kThreads) {
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

// Bounds of the integer total of masses whose sum in fp32 is `sum`: each of its roundings, one after the other
// for a thread and in trees after that, errs by at most 2^-24 of it, each mass by half a unit.
struct MassBounds {
  uint64_t low, high;

  __device__ MassBounds(float sum, int vocab, int units_per_thread) {
    const double mass = static_cast<double>(sum) * kMassUnit, error = mass * (32 + units_per_thread) * 0x1p-24 + vocab;
    low = __double2ull_rd(fmax(mass - error, 0.));
    high = __double2ull_ru(mass + error);
  }
};

// The draw of a row that holds its allowed ids alone. `thread_mass` sums up e^((z - max) / tau) over the thread's
// ids, `row_mass` over the row's.
template <typename T>
__device__ void draw(const SampleTokensParams& p, const Scales& scales, int64_t n, const RowSlice<T>& slice, float max,
                     float thread_max, float thread_mass, float row_mass, Cluster cluster, DrawShared& shared,
                     uint32_t room) {
  using Search = ThresholdSearch<T, SearchRow<T>, kThreads, kBins>;
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
    const Largest lowest = cluster.exchange(0, Largest{~ordered_key<float>(guess)}, Largest{0});
    guess = from_ordered_key<float>(~__reduce_max_sync(~0u, lowest.key));
    Found found{};
    if (guess > -CUDART_INF_F) {
      found = gather(cluster.exchange(1, gather(list_candidates(slice, thread_max, guess, scores, shared)), found));
    }
    const MassBounds total(row_mass, vocab, (slice.count + kThreads - 1) / kThreads);
    const uint64_t limit_bound = mass_limit(p.top_p, total.high);
    if (found.count <= room && ((by_mass && found.mass > limit_bound) || (by_count && found.count >= p.top_k))) {
      if (threadIdx.x == 0) {
        shared.offset = atomicAdd(cluster.in_cta(&shared.pooled, 0), shared.listed);
        shared.limit = mass_limit(p.top_p, total.low);
        shared.limit_bound = limit_bound;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < shared.listed; i += kThreads) {
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
      const bool decided =
          row.pooled < 0 || threshold.key == 0 || shared.limit_bound < shared.search.ahead + shared.search.crossing_weight;
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

template <typename T, bool kDraw>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    vocab_pass_sm90_kernel(const __grid_constant__ SampleTokensParams p, const __grid_constant__ Scales scales, int cluster_size, uint32_t room) {
#ifdef ENTRGI_HOPPER
  extern __shared__ uint4 memory[];
  __shared__ std::conditional_t<kDraw, DrawShared, Shared> shared;
  const int64_t n = blockIdx.x / cluster_size;
  const int vocab = static_cast<int>(p.vocab);
  Cluster cluster{shared.mailbox, cluster_size, static_cast<int>(blockIdx.x) % cluster_size};

  Barrier* landed = reinterpret_cast<Barrier*>(shared.landed);
  const T* logits = static_cast<const T*>(p.logits) + n * p.logits_stride;
  const RowSlice<T> slice = begin_slice<T, kThreads>(logits, vocab, cluster.rank, cluster.size, memory, landed);
  if constexpr (kDraw) {
    if (threadIdx.x == 0) shared.listed = shared.pooled = 0;
  }
  cluster.sync();

  float thread_max = Packed<T>::largest_or_nan(largest_as_it_lands(slice, landed));
  const Largest largest = cluster.exchange(0, Largest{__reduce_max_sync(~0u, max_key(thread_max))}, Largest{0});
  const uint32_t row_key = __reduce_max_sync(~0u, largest.key);
  const bool writes = cluster.rank == 0 && threadIdx.x == 0;
  if (!is_finite_key(row_key)) {
    if (writes) {
      refuse_statistics(p, n);
      if constexpr (kDraw) refuse_draw(p, n, 1);
    }
    return;
  }

  const float row_max = from_ordered_key<float>(row_key);
  Sums mine = add_up(slice, row_max, scales);
  mine.argmax = thread_max == row_max ? first_id_of(slice, row_max) : UINT32_MAX;
  float thread_mass = mine.sum_tau;
  if constexpr (kDraw) {
    if (p.forbidden != nullptr && mask(slice, p.forbidden, vocab)) {
      thread_max = Packed<T>::largest_or_nan(largest_of(slice));
      thread_mass = add_up_again(slice, row_max, scales.scale);
    }
    mine.allowed = thread_mass;
    mine.allowed_key = max_key(thread_max);
    gather_allowed(mine);
  }
  gather_statistics(mine);
  Sums sums = cluster.exchange(1, mine, Sums{.argmax = UINT32_MAX});
  if (cluster.rank == 0 && threadIdx.x < 32) {
    gather_statistics(sums);
    if (threadIdx.x == 0) {
      write_statistics(p, scales, n, row_max, sums.sum, sums.weighted, sums.sum_tau, sums.weighted_tau,
                       static_cast<int>(sums.argmax));
    }
  }
  if constexpr (kDraw) {
    gather_allowed(sums);
    if (!is_finite_key(sums.allowed_key)) {
      if (writes) refuse_draw(p, n, 2);
      return;
    }
    const float allowed_max = from_ordered_key<float>(sums.allowed_key);
    if (allowed_max != row_max) {
      thread_mass = add_up_again(slice, allowed_max, scales.scale);
      const Sums again = cluster.exchange(0, Sums{.allowed = sum_across_warp(thread_mass)}, Sums{});
      sums.allowed = sum_across_warp(again.allowed);
      cluster.sync();  // the same slots come next
    }
    draw<T>(p, scales, n, slice, allowed_max, thread_max, thread_mass, sums.allowed, cluster, shared, room);
  }
#endif
}

template <typename T, bool kDraw>
cudaError_t launch(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = vocab_pass_sm90_kernel<T, kDraw>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(plan.shared_bytes));
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster_n), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(plan.grid);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, Scales(p.temperature), plan.cluster_n,
                            static_cast<uint32_t>(plan.shared_bytes / sizeof(Candidate)));
}

}  // namespace

template <bool kDraw>
cudaError_t vocab_pass_sm90(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.threads != kThreads || plan.cluster_n < 1 || plan.cluster_n > 8 || plan.grid != p.n * plan.cluster_n ||
      p.vocab < 1) {
    return cudaErrorInvalidValue;
  }
  if (p.n == 0) return cudaSuccess;
  switch (p.logits_dtype) {
    case DType::kBFloat16:
      return launch<__nv_bfloat16, kDraw>(p, plan, stream);
    case DType::kFloat16:
      return launch<__half, kDraw>(p, plan, stream);
    case DType::kFloat32:
      return launch<float, kDraw>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

template cudaError_t vocab_pass_sm90<false>(const SampleTokensParams&, const Plan&, cudaStream_t);
template cudaError_t vocab_pass_sm90<true>(const SampleTokensParams&, const Plan&, cudaStream_t);

}  // namespace entrgi
