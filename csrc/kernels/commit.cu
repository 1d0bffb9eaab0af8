// Commit: of each trajectory's candidates the `counts` most confident are written into its tokens.
//
//   score = confidence; -inf where it is NaN or the candidate is EOS (as asked);
//           / alg_temp + Gumbel(key, id 0) where alg_temp > 0: a draw without replacement
//   committed[n] = rank of n < count, ranked by (score descending, row ascending) among the candidates >= 0
//
// Layout   tokens int64 [P, S]; candidates, positions int64 [N], confidence fp32 [N]; splits int64 [P + 1]
//          groups the rows.
//
// Floor    a few KB: the time of one launch.
//
// Tiling   one CTA per trajectory. Scores go to the workspace, then each row counts the rows before it, 256
//          at a time through shared memory: R^2 / 256 steps of the CTA for R rows. Any R works.
//
// Considered: sorting (more code, more barriers, no faster at a few hundred rows).
#include <math_constants.h>

#include "detail/launch.h"
#include "detail/numeric.cuh"
#include "detail/philox.cuh"
#include "kernels.h"
#include "plan_families.h"

namespace entrgi {
namespace {

constexpr int kThreads = kElementwise.threads;

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t n) {
  return x < 0 ? 0 : x > n ? n : x;
}

__global__ void __launch_bounds__(kThreads) commit_kernel(const CommitParams p) {
  __shared__ float tile_score[kThreads];
  __shared__ bool tile_competes[kThreads];
  float* scores = static_cast<float*>(p.workspace);
  const int64_t trajectory = blockIdx.x;

  // Rows that belong to no trajectory are not committed: the first CTA clears those before, the last those
  // after.
  const int64_t covered_first = p.trajectories == 0 ? p.n : clamped(p.splits[0], p.n);
  const int64_t covered_last = p.trajectories == 0 ? p.n : clamped(p.splits[p.trajectories], p.n);
  if (trajectory == 0) {
    for (int64_t n = threadIdx.x; n < covered_first; n += kThreads) p.committed[n] = false;
  }
  if (trajectory + 1 >= p.trajectories) {
    for (int64_t n = covered_last + threadIdx.x; n < p.n; n += kThreads) p.committed[n] = false;
  }
  if (trajectory >= p.trajectories) return;

  const int64_t first = clamped(p.splits[trajectory], p.n), last = clamped(p.splits[trajectory + 1], p.n);
  for (int64_t n = first + threadIdx.x; n < last; n += kThreads) {
    float score = fp32(p.confidence)[n];
    if (p.has_eos && p.candidates[n] == p.eos_token_id) score = -CUDART_INF_F;
    if (p.alg_temp > 0) {
      score = score / static_cast<float>(p.alg_temp) + gumbel(load_row_key(p.keys + 4 * n), 0);
    }
    scores[n] = isnan(score) ? -CUDART_INF_F : score;  // 0 / 0 too, where alg_temp is 0 in fp32
  }
  __syncthreads();

  for (int64_t chunk = first; chunk < last; chunk += kThreads) {
    const int64_t n = chunk + threadIdx.x;
    const bool competes = n < last && p.candidates[n] >= 0;
    const float score = competes ? scores[n] : 0.f;
    int64_t rank = 0;
    for (int64_t other = first; other < last; other += kThreads) {
      const int64_t m = other + threadIdx.x;
      __syncthreads();  // the previous tile has been read
      tile_competes[threadIdx.x] = m < last && p.candidates[m] >= 0;
      tile_score[threadIdx.x] = m < last ? scores[m] : 0.f;
      __syncthreads();
      const int size = static_cast<int>(min(last - other, int64_t{kThreads}));
      for (int i = 0; i < size; ++i) {
        const bool ahead = tile_score[i] > score || (tile_score[i] == score && other + i < n);
        rank += tile_competes[i] && ahead;
      }
    }
    if (n >= last) continue;
    const bool chosen = competes && rank < p.counts[trajectory];
    p.committed[n] = chosen;
    if (chosen && p.positions[n] >= 0 && p.positions[n] < p.length) {
      p.tokens[trajectory * p.tokens_stride + p.positions[n]] = p.candidates[n];
    }
  }
}

}  // namespace

cudaError_t commit(const CommitParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.kernel != Kernel::kCommit || p.confidence_dtype == DType::kFloat64 ||
      (p.alg_temp > 0 && p.keys == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return launch(&compiled<commit_kernel>, {plan.grid, kThreads}, stream, p);
}

}  // namespace entrgi
