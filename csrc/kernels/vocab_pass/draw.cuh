// The draw among the ids that survive the filters: the largest score + Gumbel noise, and what the kept ids
// sum up to. Its sums are integers (units of 2^-40), its maxima have one winner (ties go to the lowest id),
// so the order in which survivors are met changes no bit: kernels, splits and clusters agree.
#pragma once

#include <climits>

#include "../detail/philox.cuh"
#include "../kernels.h"
#include "threshold_search.cuh"

namespace entrgi {

struct DrawState {
  uint64_t sum;         // of e^score over the kept ids
  int64_t weighted;     // of score e^score
  float best;           // score + noise of the best id so far
  float token_score;    // its score
  int token;            // its id
  float first, second;  // the two largest scores
};

__device__ __forceinline__ DrawState empty_draw() {
  return {0, 0, -CUDART_INF_F, 0.f, -1, -CUDART_INF_F, -CUDART_INF_F};
}

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

// All lanes' states, in every lane.
__device__ __forceinline__ DrawState merge_across_warp(DrawState state) {
#pragma unroll 1
  for (int delta = 16; delta > 0; delta /= 2) {
    const auto other = [&](auto x) { return __shfl_xor_sync(~0u, x, delta); };
    state =
        merge(state, {other(state.sum), other(state.weighted), other(state.best), other(state.token_score),
                      other(state.token), other(state.first), other(state.second)});
  }
  return state;
}

// The largest score + noise that a CTA has met, to spare others their logarithms: an integer in the order of
// floats, at first NaN, which nothing is less than. Whoever reads an old value spares itself less, that is
// all.
constexpr int kNoBest = INT_MIN;
__device__ __forceinline__ int signed_key(int bits) {  // and back
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// What decides whether an id is kept, and its score.
struct DrawRule {
  float max;  // over allowed ids
  float tau;
  Threshold nucleus;
  uint32_t smallest_key;  // of top-k
  RowKey key;

  template <typename T>
  __device__ __forceinline__ bool keeps(float z, int id) const {
    const uint32_t k = ordered_key<T>(z + 0.f);
    return z > -CUDART_INF_F && nucleus.keeps(k, id) && k >= smallest_key;
  }

  __device__ __forceinline__ float score(float z) const { return (z - max) / tau; }

  // `best` is shared by the CTA. An id that provably stays below it takes no logarithms: rounding is
  // monotone, so the sum with the noise is not above the sum with its bound, and a tie is no loss.
  __device__ __forceinline__ void contend(DrawState& state, float score, int id, int* best) const {
    const uint64_t bits = philox(key, id);
    const float to_beat = __int_as_float(signed_key(*static_cast<volatile int*>(best)));
    if (!(score + gumbel_bound(bits) < to_beat)) {
      const float perturbed = score + gumbel(bits);
      if (perturbed > state.best || (perturbed == state.best && id < state.token)) {
        if (perturbed > to_beat || to_beat != to_beat) atomicMax(best, signed_key(__float_as_int(perturbed)));
        state.best = perturbed;
        state.token = id;
        state.token_score = score;
      }
    }
  }

  // `count` ids of one score: what they add to the sums, which are of integers.
  __device__ __forceinline__ void weigh(DrawState& state, float score, uint32_t count) const {
    const float weight = expf(score);
    state.sum += count * __float2ull_rn(weight * kMassUnit);
    if (weight > 0) state.weighted += count * __float2ll_rn(score * weight * kMassUnit);
    state.second = fmaxf(state.second, count > 1 ? score : fminf(state.first, score));
    state.first = fmaxf(state.first, score);
  }

  __device__ __forceinline__ void add(DrawState& state, float z, int id, int* best) const {
    const float s = score(z);
    weigh(state, s, 1);
    contend(state, s, id, best);
  }
};

__device__ __forceinline__ void write_draw(const SampleTokensParams& p, int64_t n, const DrawState& s) {
  const float sum = __ull2float_rn(s.sum) / kMassUnit;
  p.token[n] = s.token;
  fp32(p.probability)[n] = expf(s.token_score) / sum;
  fp32(p.margin)[n] = (1.f - expf(s.second)) / sum;  // the largest score is 0, or -inf where there is none
  fp32(p.filtered_entropy)[n] = logf(sum) - __ll2float_rn(s.weighted) / kMassUnit / sum;
}

__device__ __forceinline__ void refuse_draw(const SampleTokensParams& p, int64_t n, int flag) {
  p.token[n] = -1;
  fp32(p.probability)[n] = fp32(p.margin)[n] = fp32(p.filtered_entropy)[n] = CUDART_NAN_F;
  if (p.error_flag != nullptr) atomicOr(p.error_flag, flag);
}

}  // namespace entrgi
