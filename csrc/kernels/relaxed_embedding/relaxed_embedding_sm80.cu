// Relaxed embedding, the matrix product: partial[split] = q E over the split's part of the vocabulary, with
//
//   q = exp(z / tau - logsumexp)        z [N, V] bf16 / fp16 / fp32, E [V, d] bf16 / fp16, both row-major
//
// in fp32 [splits, N, pitch]; relaxed_embedding.cu sums the splits in order and blends in the hard rows.
//
// Floor    N V sizeof(z) + V d sizeof(E) bytes, 2 N V d FLOPs. N <= 64 is bound by reading E once.
//
// Tiling   CTA of four warps, output tile rows x columns, vocabulary in steps of 32 through a cp.async ring:
//             16 x 256   warps side by side, 16 x 64 each      N <= 16: all of E's bandwidth, few rows
//             64 x 128   warps stacked, 16 x 128 each
//            128 x 128   warps stacked, 32 x 128 each: each exponential is computed once per CTA
//          Grid: row tiles fastest, then tiles of d, then splits, so CTAs that share E or z run together.
//
//   z tile [rows x 32 ids]  shared -> registers -> q, rounded to E's type = operand A, never in memory
//   E tile [32 ids x columns]  shared -> ldmatrix.trans                      = operand B
//
// A thread's share of operand A is columns {2p, 2p+1, 2p+8, 2p+9}. The order of the vocabulary within a step
// is free as long as A and B agree, so it is permuted to {4p ... 4p+3}: z is read in one 8- or 16-byte load,
// and the permutation costs B nothing, as ldmatrix takes an address for each row.
//
// Considered: q written to shared memory once per CTA for wider tiles (another barrier in each step; with
// stacked warps nothing is computed twice); online rescaling (logsumexp is known from the vocabulary pass).
#include <math_constants.h>

#include "../detail/launch.h"
#include "../detail/tile.cuh"
#include "relaxed_embedding.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace relaxed_embedding_tiles;

constexpr int kThreads = 128;
constexpr int kStep = 32;  // vocabulary ids per stage

// Four consecutive logits from shared memory.
__device__ __forceinline__ void load4(float (&z)[4], const char* from, float) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  z[0] = v.x, z[1] = v.y, z[2] = v.z, z[3] = v.w;
}
template <typename Z>
__device__ __forceinline__ void load4(float (&z)[4], const char* from, Z) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  const Z* elements = reinterpret_cast<const Z*>(&v);
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = to_float(elements[i]);
}

template <typename Z, typename T, int kM, int kN, int kWarpsM, int kStages>
__global__ void __launch_bounds__(kThreads)
    relaxed_embedding_sm80_kernel(const RelaxedEmbeddingParams p, const SoftmaxScale scale, int64_t pitch,
                                  int splits, int z_granule, int e_granule) {
  constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  constexpr int kFragmentsM = kM / kWarpsM / 16, kFragmentsN = kN / kWarpsN / 8;
  using ZTile = Tile<Z, kM, kStep, Swizzle::kFourElements>;
  using ETile = Tile<T, kStep, kN, Swizzle::kPermuted>;
  constexpr int kStageBytes = ZTile::kBytes + ETile::kBytes;

  extern __shared__ __align__(128) char shared[];
  int64_t* row_offset = reinterpret_cast<int64_t*>(shared + kStages * kStageBytes);
  const uint32_t ring = shared_address(shared);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, pair = lane % 4;
  const int64_t tiles_m = (p.n + kM - 1) / kM, tiles_n = (p.dim + kN - 1) / kN;
  const int64_t first_row = blockIdx.x % tiles_m * kM;
  const int64_t first_column = blockIdx.x / tiles_m % tiles_n * kN;
  const int64_t split = blockIdx.x / (tiles_m * tiles_n);
  const int64_t steps = (p.vocab + kStep - 1) / kStep, steps_per_split = (steps + splits - 1) / splits;
  const int64_t first_step = split * steps_per_split;
  const int step_count = static_cast<int>(min(steps_per_split, steps - first_step));

  for (int r = threadIdx.x; r < kM; r += kThreads) {
    const int64_t n = first_row + r;
    row_offset[r] = n < p.n && output_row(p, n) >= 0 ? n * p.logits.stride : -1;
  }
  // Rows that are not there have logsumexp = inf: q = 0.
  float lse[kFragmentsM][2];
  const int warp_row = warp / kWarpsN * (kM / kWarpsM), warp_column = warp % kWarpsN * (kN / kWarpsN);
#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = first_row + warp_row + m * 16 + h * 8 + group;
      lse[m][h] = n < p.n && output_row(p, n) >= 0 ? fp32(p.logsumexp)[n] : CUDART_INF_F;
    }
  }
  __syncthreads();

  const auto load_stage = [&](int step) {
    if (step < step_count) {
      const int64_t id = (first_step + step) * kStep;
      const uint32_t stage = ring + step % kStages * kStageBytes;
      ZTile::template fill<kThreads>(
          stage, static_cast<const Z*>(p.logits.data), [&](int r) { return row_offset[r]; }, id, p.vocab,
          z_granule);
      ETile::template fill<kThreads>(
          stage + ZTile::kBytes, static_cast<const T*>(p.embedding.data),
          [&](int r) { return id + r < p.vocab ? (id + r) * p.embedding.stride : int64_t{-1}; }, first_column,
          p.dim, e_granule);
    }
    commit_copies();
  };

  float accumulator[kFragmentsM][kFragmentsN][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load_stage(stage);

#pragma unroll 1
  for (int step = 0; step < step_count; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the stage has landed, and every warp is done with the one refilled next
    load_stage(step + kStages - 1);

    const char* z_tile = shared + step % kStages * kStageBytes;
    const uint32_t e_tile = ring + step % kStages * kStageBytes + ZTile::kBytes;
    const int ids_left = static_cast<int>(min(p.vocab - (first_step + step) * kStep, int64_t{kStep}));
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kFragmentsM][4];
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp_row + m * 16 + h * 8 + group, column = k + 4 * pair;
          float q[4];
          load4(q, z_tile + ZTile::offset(row, column / ZTile::kChunk) + column % ZTile::kChunk * sizeof(Z),
                Z{});
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float log_q = log_softmax(q[i], scale.inverse_tau, lse[m][h]);
            // Past the end of the vocabulary z reads 0 and q could be anything, inf included.
            q[i] = column + i < ids_left ? exp2_approx(fmaf(log_q, kLog2e, kLog2Scale<T>)) : 0.f;
          }
          a[m][h] = pack<T>(q[0], q[1]);
          a[m][h + 2] = pack<T>(q[2], q[3]);
        }
      }
      // Matrices 0, 1 are rows {4p, 4p+1}, {4p+2, 4p+3} of eight columns, 2 and 3 those of the next eight.
      const int e_row = k + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2;
#pragma unroll
      for (int f = 0; f < kFragmentsN; f += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, e_tile + ETile::offset(e_row, warp_column / 8 + f + lane / 16));
#pragma unroll
        for (int m = 0; m < kFragmentsM; ++m) {
          mma<T>(accumulator[m][f], a[m], b[0], b[1]);
          mma<T>(accumulator[m][f + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  wait_for_copies<0>();

  float* partial = static_cast<float*>(p.workspace) + split * p.n * pitch;
#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = first_row + warp_row + m * 16 + h * 8 + group;
      if (n >= p.n) continue;
      float* row = partial + n * pitch;
#pragma unroll
      for (int f = 0; f < kFragmentsN; ++f) {
        const int64_t column = first_column + warp_column + f * 8 + 2 * pair;
        if (column < p.dim) {  // the pitch is even: a pair never leaves the row
          *reinterpret_cast<float2*>(row + column) = {accumulator[m][f][2 * h] * kUnscale<T>,
                                                      accumulator[m][f][2 * h + 1] * kUnscale<T>};
        }
      }
    }
  }
}

}  // namespace

cudaError_t relaxed_embedding_sm80(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose(
      [&]<typename Z, typename T, typename Place>() {
        constexpr auto t = kSm80[Place::value];
        static_assert(t.block_k == kStep && t.threads == kThreads, "the kernel has one step and four warps");
        constexpr int64_t kStage = stage_bytes(t.block_m, t.block_n, t.block_k, sizeof(Z), sizeof(T));
        return &compiled<relaxed_embedding_sm80_kernel<Z, T, t.block_m, t.block_n, t.warps_m, t.stages>,
                         sm80_bytes(kStage, t.stages, t.block_m)>;
      },
      any_type(p.logits.dtype), type_of_16_bits(p.embedding.dtype), tile_of<kSm80>(plan));
  return launch(kernel, {plan.grid, kThreads, plan.shared_bytes}, stream, p, SoftmaxScale(p.temperature),
                pitch_of(p.dim), static_cast<int>(plan.splits),
                copy_granule(p.logits.data, p.logits.stride, size_of(p.logits.dtype)),
                copy_granule(p.embedding.data, p.embedding.stride, size_of(p.embedding.dtype)));
}

}  // namespace entrgi
