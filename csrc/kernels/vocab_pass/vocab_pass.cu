// Vocabulary pass: statistics of logits [N, V], and optionally a drawn token, from one read of device memory.
//
//   logsumexp = log sum e^(z / tau)      entropy = H(softmax z)      tempered_entropy = H(softmax z / tau)
//   argmax    = first id of the maximum
//   token     = argmax over kept ids of (z - max) / tau + Gumbel(key, id), ties to the lowest id
//   probability, margin (top-1 minus top-2), filtered_entropy of softmax over the kept ids
//
// Layout   logits bf16 / fp16 / fp32, any row stride and alignment; results are dense vectors [N].
// Floor    N V sizeof(z) bytes. No matrix product; two exponentials per element.
//
// Tiling   many rows: one CTA of 512 threads per row           row_kernel
//          few rows:  V cut into parts, one CTA per part        partial_kernel
//                     states merged in part order               row_kernel
//
//   z row  |head|.... 8 ids per thread and turn ....|tail|      two vectors in flight per thread
//             thread state -> warp shuffles -> 16 warps         fixed tree: reproducible
//
// The draw follows in the same CTA while the row is in L2: the threshold search (threshold_search.cuh)
// and one last read in which survivors alone compute Philox. A row of 152k bf16 logits (304 KB, counted) does
// not fit the shared memory of one SM; vocab_pass_sm90.cu holds it in that of a cluster.
//
// Considered: x e^x sums (cancel catastrophically at large offsets); digits of the key as the first histogram
// level (most of a row shares an exponent, so its atomics queue up); sorting (V log V time, N V scratch).
#include "../detail/launch.h"
#include "draw.cuh"
#include "softmax_state.cuh"
#include "tiles.h"
#include "vocab_pass.cuh"

namespace entrgi {

namespace {

constexpr int kThreads = kSplitThreads;
constexpr int kUnroll = 2;
constexpr int kBins = 2048;

template <typename T, bool kTempered>
__device__ SoftmaxState read_part(const RowVectors<T>& row, const bool* forbidden, float scale) {
  SoftmaxState state = empty_state();
  for (int vector = threadIdx.x; vector < row.count; vector += kThreads * kUnroll) {
    float z[kUnroll][kVector];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (vector + u * kThreads < row.count) {
        row.load(vector + u * kThreads, z[u]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[u][i] = -CUDART_INF_F;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      absorb<kTempered>(state, z[u], row.first_id(vector + u * kThreads), scale);
      if (forbidden != nullptr && vector + u * kThreads < row.count) {
        row.mask(vector + u * kThreads, forbidden, z[u]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) state.allowed_max = fmaxf(state.allowed_max, z[u][i]);
      }
    }
  }
  return state;
}

template <typename T>
__device__ __forceinline__ SoftmaxState read_part(const RowVectors<T>& row, const bool* forbidden,
                                                  const Scales& scales) {
  return scales.tempered() ? read_part<T, true>(row, forbidden, scales.scale)
                           : read_part<T, false>(row, forbidden, scales.scale);
}

// A row in device memory (or, the second time, in L2), read by one CTA.
template <typename T>
struct GlobalRow {
  const T* row;
  const bool* forbidden;
  int vocab;

  template <typename F>
  __device__ __forceinline__ void for_each(const Level& level, F f) const {
    const RowVectors<T> vectors(row, level.id_low, min(level.id_high, vocab - 1) + 1);
    for (int vector = threadIdx.x; vector < vectors.count; vector += kThreads) {
      float z[kVector];
      vectors.load(vector, z);
      vectors.mask(vector, forbidden, z);
#pragma unroll
      for (int i = 0; i < kVector; ++i) f(z[i], vectors.first_id(vector) + i);
    }
  }

  __device__ __forceinline__ uint64_t weight(const uint64_t* bin) const { return *bin; }

  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

template <typename T>
__device__ DrawState read_survivors(const RowVectors<T>& row, const bool* forbidden, const DrawRule& rule,
                                    int* best) {
  DrawState state = empty_draw();
  for (int vector = threadIdx.x; vector < row.count; vector += kThreads) {
    float z[kVector];
    row.load(vector, z);
    row.mask(vector, forbidden, z);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (rule.keeps<T>(z[i], row.first_id(vector) + i)) kept |= 1u << i;
    }
    while (kept != 0) {  // survivors are few: no unrolling over the eight
      const int i = __ffs(kept) - 1;
      kept &= kept - 1;
      float value = z[0];
#pragma unroll
      for (int j = 1; j < kVector; ++j) value = i == j ? z[j] : value;
      rule.add(state, value, row.first_id(vector) + i, best);
    }
  }
  return state;
}

template <typename T>
__device__ void draw(const SampleTokensParams& p, const Scales& scales, int64_t n, float max,
                     SearchShared<kBins>& search) {
  __shared__ DrawState warp_states[kThreads / 32];
  __shared__ int best;
  if (threadIdx.x == 0) best = kNoBest;
  __syncthreads();
  const int vocab = static_cast<int>(p.vocab);
  const RowScores scores{max, scales.scale, scales.bins_per_logit};
  const GlobalRow<T> row{static_cast<const T*>(p.logits.data) + n * p.logits.stride, p.forbidden, vocab};
  DrawRule rule{max, scales.tau, {}, 0, load_row_key(p.keys + 4 * n)};
  // Two calls, one copy of the code.
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; ++by_mass) {
    if (by_mass ? p.top_p >= 1.0 : p.top_k == 0 || p.top_k >= p.vocab) continue;
    using Search = ThresholdSearch<T, GlobalRow<T>, kThreads, kBins>;
    const uint64_t limit = by_mass ? Search::kShareOfTotal : p.top_k - 1;
    const Threshold found = Search{row, scores, vocab, search, by_mass != 0}.run(limit, p.top_p);
    if (by_mass) {
      rule.nucleus = found;
    } else {
      rule.smallest_key = found.key;
    }
    __syncthreads();  // the next search writes what this one read
  }

  const DrawState state =
      merge_across_warp(read_survivors(RowVectors<T>(row.row, 0, vocab), p.forbidden, rule, &best));
  if (threadIdx.x % 32 == 0) warp_states[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x != 0) return;
  DrawState all = empty_draw();
  for (int warp = 0; warp < kThreads / 32; ++warp) all = merge(all, warp_states[warp]);
  write_draw(p, n, all);
}

// Forbidden ids as a list become a bool [V], by one CTA.
__global__ void __launch_bounds__(kThreads)
    forbidden_kernel(const int32_t* ids, int64_t count, int vocab, bool* forbidden) {
  for (int id = threadIdx.x; id < vocab; id += kThreads) forbidden[id] = false;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int id = ids[i];
    if (id >= 0 && id < vocab) forbidden[id] = true;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    partial_kernel(const SampleTokensParams p, const Scales scales, int splits) {
  __shared__ SoftmaxState shared[kThreads / 32];
  const int64_t n = blockIdx.x / splits;
  const int split = blockIdx.x % splits, vocab = static_cast<int>(p.vocab);
  const int part = (vocab + splits - 1) / splits;
  const RowVectors<T> row(static_cast<const T*>(p.logits.data) + n * p.logits.stride,
                          min(split * part, vocab), min((split + 1) * part, vocab));
  const SoftmaxState state =
      merge_across_block<kThreads>(read_part(row, p.forbidden, scales), shared, scales.scale);
  if (threadIdx.x == 0) static_cast<SoftmaxState*>(p.workspace)[blockIdx.x] = state;
}

template <typename T, bool kDraw>
__global__ void __launch_bounds__(kThreads, 2)
    row_kernel(const SampleTokensParams p, const Scales scales, int splits) {
  __shared__ SoftmaxState shared[kThreads / 32];
  __shared__ SearchShared<kBins> search;
  const int64_t n = blockIdx.x;
  const bool* forbidden = kDraw ? p.forbidden : nullptr;
  SoftmaxState state = empty_state();
  if (splits == 1) {
    const RowVectors<T> row(static_cast<const T*>(p.logits.data) + n * p.logits.stride, 0,
                            static_cast<int>(p.vocab));
    state = read_part(row, forbidden, scales);
  } else if (threadIdx.x < splits) {
    state = static_cast<const SoftmaxState*>(p.workspace)[n * splits + threadIdx.x];
  }
  state = merge_across_block<kThreads>(state, shared, scales.scale);

  const bool bad = state.bad || !(state.max > -CUDART_INF_F);
  const float allowed_max = forbidden == nullptr ? state.max : state.allowed_max;
  const bool drawn = kDraw && !bad && allowed_max > -CUDART_INF_F;
  if (threadIdx.x == 0) {
    if (bad) {
      refuse_statistics(p, n);
    } else {
      write_statistics(p, scales, n, state.max, state.sum, state.weighted, state.sum_tau, state.weighted_tau,
                       state.argmax);
    }
    if (kDraw && !drawn) refuse_draw(p, n, bad ? 1 : 2);
  }
  if constexpr (kDraw) {
    if (drawn) draw<T>(p, scales, n, allowed_max, search);
  }
}

// The states of all parts, where a row has several, then each row.
template <bool kDraw>
cudaError_t launch_rows(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  static_assert(sizeof(SoftmaxState) == kPartialStateBytes,
                "the plan leaves room for the states of all parts");
  if (plan.kernel == Kernel::kVocabPassSm90) return vocab_pass_sm90<kDraw>(p, plan, stream);
  if (plan.kernel != Kernel::kVocabPass || plan.splits < 1 || plan.splits > kThreads || p.vocab < 1) {
    return cudaErrorInvalidValue;
  }
  if (p.n == 0) return cudaSuccess;
  const Scales scales(p.temperature);
  const int splits = static_cast<int>(plan.splits);
  if (splits > 1) {
    const auto kernel =
        choose([&]<typename T>() { return &compiled<partial_kernel<T>>; }, any_type(p.logits.dtype));
    const cudaError_t error = launch(kernel, {p.n * splits, kThreads}, stream, p, scales, splits);
    if (error != cudaSuccess) return error;
  }
  const auto kernel =
      choose([&]<typename T>() { return &compiled<row_kernel<T, kDraw>>; }, any_type(p.logits.dtype));
  return launch(kernel, {p.n, kThreads}, stream, p, scales, splits);
}

}  // namespace

cudaError_t logit_statistics(const LogitStatisticsParams& params, const Plan& plan, cudaStream_t stream) {
  SampleTokensParams p{};
  static_cast<LogitStatisticsParams&>(p) = params;
  return launch_rows<false>(p, plan, stream);
}

cudaError_t sample_tokens(const SampleTokensParams& params, const Plan& plan, cudaStream_t stream) {
  SampleTokensParams p = params;
  if (p.num_forbidden < 0 || p.num_forbidden > INT32_MAX / 2 ||
      (p.num_forbidden > 0 && (p.forbidden != nullptr || p.forbidden_ids == nullptr))) {
    return cudaErrorInvalidValue;
  }
  if (plan.kernel == Kernel::kVocabPass && p.num_forbidden > 0 && p.n > 0) {
    bool* forbidden = static_cast<bool*>(p.workspace) + state_bytes(plan);
    const cudaError_t error = launch(&compiled<forbidden_kernel>, {1, kThreads}, stream, p.forbidden_ids,
                                     p.num_forbidden, static_cast<int>(p.vocab), forbidden);
    if (error != cudaSuccess) return error;
    p.forbidden = forbidden;
    p.num_forbidden = 0;
  }
  return launch_rows<true>(p, plan, stream);
}

}  // namespace entrgi
