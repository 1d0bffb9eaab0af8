// Logit update, the product and its epilogue on tensor cores:
//
//   acc = G E^T,  gradient = q (acc - inner) / tau,  then stored, or applied to z (and the moments) in place
//
//   G [R, d] gathered by row and E [V, d], bf16 / fp16, row-major; z [N, V] bf16 / fp16 / fp32;
//   moments fp32 [N, V]
//
// Floor    V d sizeof(E) + z read and written + 8 to 16 bytes of moments per logit; 2 N V d FLOPs.
//          At N = 512, d = 2048 bytes and FLOPs take about the same time (assumed: an A100's data sheet).
//
// Tiling   CTA of four warps, d in steps of 32 through a cp.async ring:
//             16 x 256   1 x 4 warps of 16 x 64     N <= 16
//             64 x 128   2 x 2 warps of 32 x 64
//            128 x 128   2 x 2 warps of 64 x 64
//          Row tiles fastest, so the CTAs that share rows of E run together and E is read from memory once.
//
//   G tile [rows x 32]  ldmatrix = operand A      E tile [ids x 32]  ldmatrix = operand B, K contiguous
//
// The accumulators then pass through shared memory, which the ring no longer needs, so that the epilogue runs
// along rows of the logits: whole 128-byte lines, four consecutive ids and four loads in flight per thread,
// in a loop of a few hundred instructions. Applying them from registers was tried first: each thread's
// accesses are ordered by the stores between them, and the unrolled code of 18 kernels took 85 s to compile
// (measured).
//
// The rule (gradient, Adam, SGD) and first / last step are run-time values: uniform branches in the epilogue,
// a ninth of the instantiations.
#include "../detail/launch.h"
#include "../detail/tile.cuh"
#include "logit_update.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace logit_update_tiles;

constexpr int kThreads = 128;
constexpr int kStep = 32;
template <int kN>
constexpr int kPitch = Sm80Shared::pitch(kN);

template <typename Z, typename T, int kM, int kN, int kWarpsM, int kStages>
__global__ void __launch_bounds__(kThreads)
    logit_update_sm80_kernel(const LogitUpdateParams p, const UpdateScalars scalars, int g_granule,
                             int e_granule) {
  constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  constexpr int kFragmentsM = kM / kWarpsM / 16, kFragmentsN = kN / kWarpsN / 8;
  using GTile = Tile<T, kM, kStep, Swizzle::kMatrixOf64>;
  using ETile = Tile<T, kN, kStep, Swizzle::kMatrixOf64>;
  constexpr int kStageBytes = GTile::kBytes + ETile::kBytes;

  extern __shared__ __align__(128) char shared[];
  int64_t* row_offset = reinterpret_cast<int64_t*>(shared + kStages * kStageBytes);
  const uint32_t ring = shared_address(shared);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, pair = lane % 4;
  const int warp_row = warp / kWarpsN * (kM / kWarpsM), warp_column = warp % kWarpsN * (kN / kWarpsN);
  const int64_t tiles_m = (p.n + kM - 1) / kM;
  const int64_t first_row = blockIdx.x % tiles_m * kM, first_column = blockIdx.x / tiles_m * kN;
  const int step_count = static_cast<int>((p.dim + kStep - 1) / kStep);

  for (int r = threadIdx.x; r < kM; r += kThreads) {
    const int64_t row = first_row + r < p.n ? grad_row(p, first_row + r) : -1;
    row_offset[r] = row < 0 ? -1 : row * p.grad.stride;
  }
  __syncthreads();

  const auto load_stage = [&](int step) {
    if (step < step_count) {
      const uint32_t stage = ring + step % kStages * kStageBytes;
      GTile::template fill<kThreads>(
          stage, static_cast<const T*>(p.grad.data), [&](int r) { return row_offset[r]; },
          int64_t{step} * kStep, p.dim, g_granule);
      ETile::template fill<kThreads>(
          stage + GTile::kBytes, static_cast<const T*>(p.embedding.data),
          [&](int r) {
            return first_column + r < p.vocab ? (first_column + r) * p.embedding.stride : int64_t{-1};
          },
          int64_t{step} * kStep, p.dim, e_granule);
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

    const uint32_t g_tile = ring + step % kStages * kStageBytes, e_tile = g_tile + GTile::kBytes;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kFragmentsM][4];
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
        load_matrices(a[m], g_tile + GTile::offset(warp_row + m * 16 + lane % 16, k / 8 + lane / 16));
      }
      // Matrices 0, 1: eight ids, two halves of K; matrices 2, 3: the next eight ids.
      const int e_row = warp_column + lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int f = 0; f < kFragmentsN; f += 2) {
        uint32_t b[4];
        load_matrices(b, e_tile + ETile::offset(e_row + f * 8, k / 8 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kFragmentsM; ++m) {
          mma<T>(accumulator[m][f], a[m], b[0], b[1]);
          mma<T>(accumulator[m][f + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();  // every warp is done with the ring

  float* products = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int f = 0; f < kFragmentsN; ++f) {
      float* to = products + (warp_row + m * 16 + group) * kPitch<kN> + warp_column + f * 8 + 2 * pair;
      *reinterpret_cast<float2*>(to) = {accumulator[m][f][0], accumulator[m][f][1]};
      *reinterpret_cast<float2*>(to + 8 * kPitch<kN>) = {accumulator[m][f][2], accumulator[m][f][3]};
    }
  }
  __syncthreads();

  constexpr int kBatch = 4, kQuads = kN / 4;
#pragma unroll 1
  for (int first = threadIdx.x; first < kM * kQuads; first += kBatch * kThreads) {
    UpdateRow rows[kBatch];
    FourLogits<Z> logits[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kThreads;
      rows[i] = load_update_row(p, first_row + index / kQuads);
      if (!rows[i].padding) {
        logits[i].load(p, rows[i].n, columns_at(p, scalars, first_column + index % kQuads * 4));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kThreads;
      const float4 product =
          *reinterpret_cast<const float4*>(products + index / kQuads * kPitch<kN> + index % kQuads * 4);
      if (rows[i].n < p.n) {
        logits[i].apply(p, scalars, rows[i], columns_at(p, scalars, first_column + index % kQuads * 4),
                        {product.x, product.y, product.z, product.w});
      }
    }
  }
}

}  // namespace

cudaError_t logit_update_sm80(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto kernel = choose(
      [&]<typename Z, typename T, typename Place>() {
        constexpr auto t = kSm80[Place::value];
        static_assert(t.block_k == kStep && t.threads == kThreads, "the kernel has one step and four warps");
        return &compiled<logit_update_sm80_kernel<Z, T, t.block_m, t.block_n, t.warps_m, t.stages>,
                         Sm80Shared::bytes(t.block_m, t.block_n, t.block_k, t.stages)>;
      },
      any_type(p.logits.dtype), type_of_16_bits(p.embedding.dtype), tile_of<kSm80>(plan));
  const int64_t element = size_of(p.embedding.dtype);
  return launch(kernel, {plan.grid, kThreads, plan.shared_bytes}, stream, p, UpdateScalars(p),
                copy_granule(p.grad.data, p.grad.stride, element),
                copy_granule(p.embedding.data, p.embedding.stride, element));
}

}  // namespace entrgi
