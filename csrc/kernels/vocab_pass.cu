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
// The draw follows in the same CTA while the row is in L2: the threshold search (detail/threshold_search.cuh)
// and one last read in which survivors alone compute Philox. A row of 152k bf16 logits (304 KB) does not fit
// the shared memory of one SM; holding it in a cluster's is for another kernel.
//
// Considered: x e^x sums (cancel catastrophically at large offsets); digits of the key as the first histogram
// level (most of a row shares an exponent, so its atomics queue up); sorting (V log V time, N V scratch).
#include <algorithm>
#include <cmath>

#include "detail/philox.cuh"
#include "detail/softmax_state.cuh"
#include "detail/threshold_search.cuh"
#include "kernels.h"

namespace entrgi {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 2;

struct Scales {
  float tau, inverse;  // 1 / tau
  float scale;         // log2(e) / tau
};

Scales scales_of(double temperature) {
  const auto bounded = [](double x) { return static_cast<float>(std::min<double>(x, FLT_MAX)); };
  return {static_cast<float>(temperature), bounded(1 / temperature), bounded(M_LOG2E / temperature)};
}

template <typename T>
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
      absorb(state, z[u], row.first_id(vector + u * kThreads), scale);
      if (forbidden != nullptr && vector + u * kThreads < row.count) {
        row.mask(vector + u * kThreads, forbidden, z[u]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) state.allowed_max = fmaxf(state.allowed_max, z[u][i]);
      }
    }
  }
  return state;
}

// What the drawing read leaves behind.
struct DrawState {
  float best, token_score;  // perturbed and plain score of the best id so far
  int token;
  float sum, weighted;  // of e^score and score e^score over the kept ids
  float first, second;  // the two largest plain scores
};

__device__ __forceinline__ DrawState merge(DrawState a, const DrawState& b) {
  if (b.best > a.best ||
      (b.best == a.best && static_cast<uint32_t>(b.token) < static_cast<uint32_t>(a.token))) {
    a.best = b.best;
    a.token = b.token;
    a.token_score = b.token_score;
  }
  a.sum += b.sum;
  a.weighted += b.weighted;
  a.second = fmaxf(fminf(a.first, b.first), fmaxf(a.second, b.second));
  a.first = fmaxf(a.first, b.first);
  return a;
}

template <typename T>
__device__ DrawState read_survivors(const RowScores<T>& scores, float tau, const Threshold& nucleus,
                                    uint32_t smallest_key, const RowKey& key) {
  DrawState state{-CUDART_INF_F, 0.f, -1, 0.f, 0.f, -CUDART_INF_F, -CUDART_INF_F};
  const RowVectors<T> row(scores.row, 0, scores.vocab);
  for (int vector = threadIdx.x; vector < row.count; vector += kThreads) {
    float z[kVector];
    row.load(vector, z);
    row.mask(vector, scores.forbidden, z);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t k = ordered_key<T>(z[i] + 0.f);
      const bool in_nucleus = k > nucleus.key || (k == nucleus.key && row.first_id(vector) + i <= nucleus.id);
      if (z[i] > -CUDART_INF_F && in_nucleus && k >= smallest_key) kept |= 1u << i;
    }
    while (kept != 0) {  // survivors are few: no unrolling over the eight
      const int i = __ffs(kept) - 1;
      kept &= kept - 1;
      float value = z[0];
#pragma unroll
      for (int j = 1; j < kVector; ++j) value = i == j ? z[j] : value;
      const int id = row.first_id(vector) + i;
      const float score = (value - scores.max) / tau, weight = expf(score);
      const float perturbed = score + gumbel(key, id);
      if (perturbed > state.best) {
        state.best = perturbed;
        state.token = id;
        state.token_score = score;
      }
      state.sum += weight;
      if (weight > 0) state.weighted += score * weight;
      state.second = fmaxf(state.second, fminf(state.first, score));
      state.first = fmaxf(state.first, score);
    }
  }
  return state;
}

template <typename T>
__device__ void draw(const SampleTokensParams& p, const Scales& scales, int64_t n, float max,
                     SearchShared& search) {
  __shared__ DrawState warp_states[kThreads / 32];
  const RowScores<T> scores{static_cast<const T*>(p.logits) + n * p.logits_stride,
                            static_cast<int>(p.vocab),
                            p.forbidden,
                            max,
                            scales.scale,
                            fminf(64.f * scales.inverse, FLT_MAX)};
  Threshold nucleus;
  uint32_t smallest_key = 0;
  // Two calls, one copy of the code.
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; ++by_mass) {
    if (by_mass ? p.top_p >= 1.0 : p.top_k == 0 || p.top_k >= p.vocab) continue;
    const Threshold found =
        ThresholdSearch<T, kThreads>{scores, search, by_mass != 0}.run(p.top_p, p.top_k - 1);
    if (by_mass) {
      nucleus = found;
    } else {
      smallest_key = found.key;
    }
    __syncthreads();  // the next search writes what this one read
  }

  DrawState state = read_survivors(scores, scales.tau, nucleus, smallest_key, load_row_key(p.keys + 4 * n));
#pragma unroll 1
  for (int delta = 16; delta > 0; delta /= 2) {
    const auto down = [&](auto x) { return __shfl_down_sync(~0u, x, delta); };
    state = merge(state, {down(state.best), down(state.token_score), down(state.token), down(state.sum),
                          down(state.weighted), down(state.first), down(state.second)});
  }
  if (threadIdx.x % 32 == 0) warp_states[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) state = merge(state, warp_states[warp]);
  p.token[n] = state.token;
  p.probability[n] = expf(state.token_score) / state.sum;
  p.margin[n] =
      (1.f - expf(state.second)) / state.sum;  // the largest score is 0, or -inf where there is none
  p.filtered_entropy[n] = logf(state.sum) - state.weighted / state.sum;
}

__device__ void refuse(const SampleTokensParams& p, int64_t n, int flag) {
  p.token[n] = -1;
  p.probability[n] = p.margin[n] = p.filtered_entropy[n] = CUDART_NAN_F;
  if (p.error_flag != nullptr) atomicOr(p.error_flag, flag);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    partial_kernel(const T* logits, int64_t stride, int vocab, const bool* forbidden, float scale, int splits,
                   SoftmaxState* partial) {
  __shared__ SoftmaxState shared[kThreads / 32];
  const int64_t n = blockIdx.x / splits;
  const int split = blockIdx.x % splits;
  const int part = (vocab + splits - 1) / splits;
  const RowVectors<T> row(logits + n * stride, min(split * part, vocab), min((split + 1) * part, vocab));
  const SoftmaxState state = merge_across_block<kThreads>(read_part(row, forbidden, scale), shared, scale);
  if (threadIdx.x == 0) partial[blockIdx.x] = state;
}

template <typename T, bool kDraw>
__global__ void __launch_bounds__(kThreads, 2)
    row_kernel(const SampleTokensParams p, const Scales scales, int splits) {
  __shared__ SoftmaxState shared[kThreads / 32];
  __shared__ SearchShared search;
  const int64_t n = blockIdx.x;
  const bool* forbidden = kDraw ? p.forbidden : nullptr;
  SoftmaxState state = empty_state();
  if (splits == 1) {
    const RowVectors<T> row(static_cast<const T*>(p.logits) + n * p.logits_stride, 0,
                            static_cast<int>(p.vocab));
    state = read_part(row, forbidden, scales.scale);
  } else if (threadIdx.x < splits) {
    state = static_cast<const SoftmaxState*>(p.workspace)[n * splits + threadIdx.x];
  }
  state = merge_across_block<kThreads>(state, shared, scales.scale);

  const bool bad = state.bad || !(state.max > -CUDART_INF_F);
  const float allowed_max = forbidden == nullptr ? state.max : state.allowed_max;
  if (threadIdx.x == 0) {
    p.logsumexp[n] = bad ? CUDART_NAN_F : log_softmax(state.max, scales.inverse, -logf(state.sum_tau));
    p.entropy[n] = bad ? CUDART_NAN_F : logf(state.sum) - state.weighted / state.sum;
    p.tempered_entropy[n] =
        bad ? CUDART_NAN_F : logf(state.sum_tau) - state.weighted_tau / state.sum_tau * scales.inverse;
    p.argmax[n] = bad ? -1 : state.argmax;
    if (kDraw && bad) refuse(p, n, 1);
    if (kDraw && !bad && allowed_max == -CUDART_INF_F) refuse(p, n, 2);
  }
  if constexpr (kDraw) {
    if (!bad && allowed_max > -CUDART_INF_F) draw<T>(p, scales, n, allowed_max, search);
  }
}

template <typename T, bool kDraw>
cudaError_t launch(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  const Scales scales = scales_of(p.temperature);
  const int splits = static_cast<int>(plan.splits);
  if (splits > 1) {
    partial_kernel<T><<<static_cast<unsigned>(p.n * splits), kThreads, 0, stream>>>(
        static_cast<const T*>(p.logits), p.logits_stride, static_cast<int>(p.vocab),
        kDraw ? p.forbidden : nullptr, scales.scale, splits, static_cast<SoftmaxState*>(p.workspace));
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  row_kernel<T, kDraw><<<static_cast<unsigned>(p.n), kThreads, 0, stream>>>(p, scales, splits);
  return cudaGetLastError();
}

template <bool kDraw>
cudaError_t dispatch(const SampleTokensParams& p, const Plan& plan, cudaStream_t stream) {
  static_assert(sizeof(SoftmaxState) == kPartialStateBytes);
  if (plan.kernel != Kernel::kVocabPass || plan.threads != kThreads || plan.splits < 1 ||
      plan.splits > kThreads || p.vocab < 1) {
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

}  // namespace

cudaError_t logit_statistics(const LogitStatisticsParams& params, const Plan& plan, cudaStream_t stream) {
  SampleTokensParams p{};
  static_cast<LogitStatisticsParams&>(p) = params;
  return dispatch<false>(p, plan, stream);
}

cudaError_t sample_tokens(const SampleTokensParams& params, const Plan& plan, cudaStream_t stream) {
  return dispatch<true>(params, plan, stream);
}

}  // namespace entrgi
