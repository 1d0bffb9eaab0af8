// Relaxed embedding, the matrix product for fp32 E: partial[split] = q E in full fp32.
//
//   q = exp(z / tau - logsumexp)    z [N, V] bf16 / fp16 / fp32, E [V, d] fp32, both row-major
//
// Layout and splits as in relaxed_embedding_sm80.cu.
//
// Floor    V d 4 + N V sizeof(z) bytes; 2 N V d FLOPs on the ordinary cores (67 TFLOP/s on an H100 by its
//          data sheet, which bind from some 40 rows on).
//
// Tiling   16 x 256, 64 x 128 or 128 x 128 outputs per CTA (detail/simt_gemm.cuh), q computed once per CTA on
//          its way to shared memory.
//
// Considered: three TF32 products in place of one in fp32. The models that guide are 16-bit, and fp32 is what
// they are checked against: plain arithmetic is worth more here. A tile of 64 x 64 with 4 x 4 outputs per
// thread and one buffer: a quarter of the instructions were shared-memory loads (counted), and two barriers
// stood in each step.
#include <math_constants.h>

#include "../detail/launch.h"
#include "../detail/numeric.cuh"
#include "../detail/simt_gemm.cuh"
#include "relaxed_embedding.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace relaxed_embedding_tiles;

template <typename Z, typename Tile>
__global__ void __launch_bounds__(kSimtThreads, Tile::kCtasPerSm)
    relaxed_embedding_simt_kernel(const RelaxedEmbeddingParams p, const SoftmaxScale scale, int64_t pitch,
                                  int splits) {
  __shared__ typename Tile::Shared shared;
  __shared__ float lse[Tile::kM];
  __shared__ bool present[Tile::kM];
  const int64_t tiles_m = (p.n + Tile::kM - 1) / Tile::kM, tiles_n = (p.dim + Tile::kN - 1) / Tile::kN;
  const int64_t first_row = blockIdx.x % tiles_m * Tile::kM;
  const int64_t first_column = blockIdx.x / tiles_m % tiles_n * Tile::kN;
  const int64_t split = blockIdx.x / (tiles_m * tiles_n);
  const int64_t steps = (p.vocab + kSimtStep - 1) / kSimtStep,
                steps_per_split = (steps + splits - 1) / splits;
  const int64_t first = split * steps_per_split * kSimtStep;
  const int64_t last = min(first + steps_per_split * kSimtStep, p.vocab);

  if (threadIdx.x < Tile::kM) {
    const int64_t n = first_row + threadIdx.x;
    present[threadIdx.x] = n < p.n && output_row(p, n) >= 0;
    lse[threadIdx.x] = present[threadIdx.x] ? fp32(p.logsumexp)[n] : 0.f;
  }
  __syncthreads();

  const Z* logits = static_cast<const Z*>(p.logits.data) + first_row * p.logits.stride;
  const float* embedding = static_cast<const float*>(p.embedding.data) + first_column;
  typename Tile::Accumulator accumulator = {};
  Tile::template product<false>(
      accumulator, last - first, shared, logits + first,
      [&](int row) { return present[row] ? row * p.logits.stride : -1; }, from_float<Z>(-CUDART_INF_F),
      [&](int row, Z z) { return expf(log_softmax(to_float(z), scale.inverse_tau, lse[row])); },
      embedding + first * p.embedding.stride, p.embedding.stride, p.dim - first_column);

  float* partial = static_cast<float*>(p.workspace) + split * p.n * pitch;
#pragma unroll
  for (int g = 0; g < Tile::kGroupsM; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = first_row + Tile::row(g, i);
      if (n >= p.n) continue;
#pragma unroll
      for (int h = 0; h < Tile::kGroupsN; ++h) {
        const int64_t column = first_column + Tile::column(h);
        if (column >= p.dim) continue;  // the pitch is a multiple of four: four columns never leave the row
        const float* sums = accumulator[g][i][h];
        // As an intrinsic: the compiler stores a float4 of four registers one by one.
        __stcg(reinterpret_cast<float4*>(partial + n * pitch + column),
               make_float4(sums[0], sums[1], sums[2], sums[3]));
      }
    }
  }
}

}  // namespace

cudaError_t relaxed_embedding_simt(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose(
      [&]<typename Z, typename Place>() {
        constexpr auto t = kSimt[Place::value];
        static_assert(is_simt(t), "the product has 256 threads and steps of 16 through two buffers");
        return &compiled<relaxed_embedding_simt_kernel<Z, SimtTileOf<t.block_m, t.block_n>>>;
      },
      any_type(p.logits.dtype), tile_of<kSimt>(plan));
  return launch(kernel, {plan.grid, kSimtThreads}, stream, p, SoftmaxScale(p.temperature), pitch_of(p.dim),
                static_cast<int>(plan.splits));
}

}  // namespace entrgi
