// Logit update, the product and its epilogue for fp32 E: full fp32 on the ordinary cores.
//
//   G [R, d] fp32 gathered by row, E [V, d] fp32, z [N, V] bf16 / fp16 / fp32, moments fp32 [N, V]
//
// Floor    V d 4 bytes + z and the moments read and written once; 2 N V d FLOPs on the ordinary cores.
//
// Tiling   16 x 256, 64 x 128 or 128 x 128 outputs per CTA (detail/simt_gemm.cuh). Row tiles fastest: CTAs
//          sharing rows of E run together. The products then pass through shared memory, which the operands
//          no longer need, half a tile at a time, and the epilogue runs along rows of the logits as in
//          logit_update_sm80.cu.
//
// Considered: see relaxed_embedding_simt.cu.
#include "../detail/launch.h"
#include "../detail/simt_gemm.cuh"
#include "logit_update.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace logit_update_tiles;

// The rows of one group: products [kM / kGroupsM, kN].
template <typename Z, typename Tile>
__device__ __forceinline__ void apply_group(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                            const float* products, int64_t first_row, int64_t first_column) {
  constexpr int kBatch = 4, kQuads = Tile::kN / 4, kRows = Tile::kM / Tile::kGroupsM;
#pragma unroll 1
  for (int first = threadIdx.x; first < kRows * kQuads; first += kBatch * kSimtThreads) {
    UpdateRow rows[kBatch];
    FourLogits<Z> logits[kBatch];
    const auto columns = [&](int index) { return columns_at(p, scalars, first_column + index % kQuads * 4); };
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kSimtThreads;
      rows[i] = load_update_row(p, first_row + index / kQuads);
      if (!rows[i].padding) logits[i].load(p, rows[i].n, columns(index));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kSimtThreads;
      const float4 product =
          *reinterpret_cast<const float4*>(products + index / kQuads * (Tile::kN + 4) + index % kQuads * 4);
      if (rows[i].n < p.n) {
        logits[i].apply(p, scalars, rows[i], columns(index), {product.x, product.y, product.z, product.w});
      }
    }
  }
}

template <typename Z, typename Tile>
__global__ void __launch_bounds__(kSimtThreads, Tile::kCtasPerSm)
    logit_update_simt_kernel(const LogitUpdateParams p, const UpdateScalars scalars) {
  constexpr int kRows = Tile::kM / Tile::kGroupsM, kPitch = Tile::kN + 4;
  static_assert(kRows * Tile::kN / 4 % (4 * kSimtThreads) == 0);
  __shared__ union {
    typename Tile::Shared operands;
    float products[kRows * kPitch];
  } shared;
  __shared__ int64_t row_offset[Tile::kM];
  const int64_t tiles_m = (p.n + Tile::kM - 1) / Tile::kM;
  const int64_t first_row = blockIdx.x % tiles_m * Tile::kM;
  const int64_t first_column = blockIdx.x / tiles_m * Tile::kN;
  if (threadIdx.x < Tile::kM) {
    const int64_t n = first_row + threadIdx.x;
    const int64_t row = n < p.n ? grad_row(p, n) : -1;
    row_offset[threadIdx.x] = row < 0 ? -1 : row * p.grad.stride;
  }
  __syncthreads();

  const float* grad = static_cast<const float*>(p.grad.data);
  const float* embedding = static_cast<const float*>(p.embedding.data) + first_column * p.embedding.stride;
  typename Tile::Accumulator accumulator = {};
  Tile::template product<true>(
      accumulator, p.dim, shared.operands, grad, [&](int row) { return row_offset[row]; }, 0.f,
      [](int, float g) { return g; }, embedding, p.embedding.stride, p.vocab - first_column);

#pragma unroll
  for (int g = 0; g < Tile::kGroupsM; ++g) {
    if (g > 0) __syncthreads();  // the previous group has been applied
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < Tile::kGroupsN; ++h) {
        const float* sums = accumulator[g][i][h];
        *reinterpret_cast<float4*>(shared.products + (Tile::y() * 4 + i) * kPitch + Tile::column(h)) = {
            sums[0], sums[1], sums[2], sums[3]};
      }
    }
    __syncthreads();
    apply_group<Z, Tile>(p, scalars, shared.products, first_row + g * kRows, first_column);
  }
}

}  // namespace

cudaError_t logit_update_simt(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose(
      [&]<typename Z, typename Place>() {
        constexpr auto t = kSimt[Place::value];
        static_assert(is_simt(t), "the product has 256 threads and steps of 16 through two buffers");
        return &compiled<logit_update_simt_kernel<Z, SimtTileOf<t.block_m, t.block_n>>>;
      },
      any_type(p.logits.dtype), tile_of<kSimt>(plan));
  return launch(kernel, {plan.grid, kSimtThreads}, stream, p, UpdateScalars(p));
}

}  // namespace entrgi
