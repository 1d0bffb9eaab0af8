// Logit update, the product and its epilogue for Hopper:
//
//   acc = G E^T,  gradient = q (acc - inner) / tau,  then stored, or applied to z (and the moments) in place
//
//   G [N, d] gathered (logit_update.cu) and E [V, d], bf16 / fp16, row-major, read by TMA; z [N, V] bf16 /
//   fp16 / fp32, moments fp32 [N, V], read and written by threads
//
// Floor    V d sizeof(E) + z read and written + 8 to 16 bytes of moments per logit; 2 N V d FLOPs.
//          At N = 512, d = 2048 both take about half a millisecond (assumed: an H200's data sheet), so they
//          must overlap: hence the ping-pong.
//
// Tiling   CTA of three warpgroups, one per SM, persistent. One thread of the first fills a ring of stages,
//          each 64 of d; the other two take whole tiles in turn, so that while one updates the logits of its
//          tile, the tensor cores work on the other's:
//
//            producer    G E of tile 0 | G E of tile 1 | G E of tile 2 | ...
//            consumer 0  product of 0  | update 0      | product of 2  | ...
//            consumer 1                | product of 1  | update 1      | ...
//
//            128 x 128   4 stages of 32 KB   N > 64
//             64 x 256   3 stages of 40 KB   N <= 64: E's bytes bind, and G is read half as often
//
//          A consumer holds a tile as two halves of 64 x 128, two of rows (two wgmma m64n128k16) or two of
//          columns (one m64n256k16); both operands in shared memory under the 128-byte swizzle, K contiguous.
//
//          Clusters of up to 2 x 2 CTAs on neighbouring tiles: CTAs of one row of tiles share G, those of one
//          column share E. Each loads its part of what it shares and multicasts it. Tiles of a cluster
//          beyond the matrix are zeros and take part. Row tiles fastest, so E is read from memory once.
//
// Epilogue per warp, without barriers: its 16 rows x 128 columns of a half pass through shared memory, then
//          the warp moves along rows of the logits, a row (512 bytes of each moment) per instruction, four
//          rows in flight. Two rows are applied at a time, without branches: rule and moments are template
//          arguments of that loop, padding is predicates. Rows of accumulators start 8 banks apart: writing
//          and reading them is free of conflicts. Rows of all matrices start at 16-byte boundaries; where V
//          is not a multiple of 4, the last one to three columns follow one by one.
//
// What lost: see docs/kernels/logit_update.md.
#include "../detail/launch.h"
#include "../detail/ring.cuh"
#include "../detail/tensor_map.h"
#include "logit_update_chunk.cuh"

namespace entrgi {
namespace {

using namespace logit_update_tiles;

using Shared = UpdateShared;

constexpr int kThreads = 3 * kWarpgroup;

template <int kM, int kN, int kStages>
struct Layout {
  static constexpr int kStageBytes = Shared::stage(kM, kN);
  static constexpr int kChunks = Shared::chunks(kM, kN, kStages);
  static constexpr int kBarriers = Shared::barriers(kM, kN, kStages);
};

// How tiles are dealt out: cluster c of the grid takes cluster tiles c, c + clusters, ... in an order that
// has the rows of tiles fastest.
struct Schedule {
  int cluster_m, cluster_n;
  int steps;                       // of d, in a tile
  uint32_t rows, tiles, clusters;  // cluster tiles along the rows of the logits, and altogether; clusters
};

#ifdef ENTRGI_HOPPER
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 65,536 / 384 = 168 on average
constexpr auto kMajorK = cute::SM90::GMMA::Major::K;
template <typename T>
using Product = std::conditional_t<std::is_same_v<T, __half>,
                                   cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<kMajorK, kMajorK>,
                                   cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<kMajorK, kMajorK>>;
template <typename T>
using WideProduct = std::conditional_t<std::is_same_v<T, __half>,
                                       cute::SM90::GMMA::MMA_64x256x16_F32F16F16_SS<kMajorK, kMajorK>,
                                       cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<kMajorK, kMajorK>>;

__device__ __forceinline__ Sharing place_in_cluster(const Schedule& s) {
  const int rank = Sharing::rank();
  return {s.cluster_m, s.cluster_n, rank % s.cluster_m, rank / s.cluster_m};
}

__device__ __forceinline__ int64_t first_row(const Schedule& s, const Sharing& place, uint32_t tile,
                                             int rows) {
  return (int64_t{tile % s.rows} * s.cluster_m + place.rank_m) * rows;
}
__device__ __forceinline__ int64_t first_column(const Schedule& s, const Sharing& place, uint32_t tile,
                                                int columns) {
  return (int64_t{tile / s.rows} * s.cluster_n + place.rank_n) * columns;
}

// One thread: every stage of every tile of this CTA, its part of what the cluster shares. In 24 registers:
// coordinates are 32 bits wide, as TMA's are.
template <int kM, int kN, int kStages, int kStageBytes>
__device__ __forceinline__ void produce(const Ring<kStageBytes>& ring, const Schedule& schedule,
                                        const CUtensorMap& grad_map, const CUtensorMap& embedding_map) {
  const Sharing place = place_in_cluster(schedule);
  const int grad_part = kM / schedule.cluster_n * place.rank_n,
            embedding_part = kN / schedule.cluster_m * place.rank_m;
  const uint32_t grad_mask = place.row(), embedding_mask = place.column();
  RingPlace at;
#pragma unroll 1
  for (uint32_t tile = cute::cluster_id_in_grid().x; tile < schedule.tiles; tile += schedule.clusters) {
    const int row = static_cast<int>(first_row(schedule, place, tile, kM)) + grad_part;
    const int column = static_cast<int>(first_column(schedule, place, tile, kN)) + embedding_part;
#pragma unroll 1
    for (int step = 0; step < schedule.steps; ++step, at.advance(kStages)) {
      Barrier& full = ring.full[at.stage];
      char* const stage = ring.stage(at.stage);
      ring.empty[at.stage].wait(at.phase ^ 1);
      full.arrive_and_expect_tx(kStageBytes);
      copy_shared_box(grad_mask, grad_map, full, stage + grad_part * kSwizzleBytes, row, step * Shared::kStep,
                      kKeepInL2);
      copy_shared_box(embedding_mask, embedding_map, full, stage + (kM + embedding_part) * kSwizzleBytes,
                      column, step * Shared::kStep, kNormalInL2);
    }
  }
}

// accumulator[h] = half h of the tile at ring position `at`, which moves on by the steps of the tile. `done`
// is told when the last product has been issued.
template <typename T, int kM, int kStages, int kStageBytes>
__device__ __forceinline__ void multiply(float (&accumulator)[2][64], const Ring<kStageBytes>& ring,
                                         RingPlace& at, int steps, const Release& release,
                                         const Barrier& done) {
  uint32_t previous = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ring.full[at.stage].wait(at.phase);
    // Eight rows of 128 bytes are 1024 bytes from the next eight.
    const uint32_t grad = shared_address(ring.stage(at.stage));
    const uint64_t a = operand(grad, 16, 1024), b = operand(grad + kM * kSwizzleBytes, 16, 1024);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < Shared::kStep; k += 16) {
      const bool accumulate = step > 0 || k > 0;
      if constexpr (kM == 128) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          wgmma<Product<T>>(accumulator[h], a + (h * 64 * kSwizzleBytes + k * 2) / 16, b + k * 2 / 16,
                            accumulate);
        }
      } else {  // its first 64 accumulators are those of the first 128 columns
        wgmma<WideProduct<T>>(reinterpret_cast<float (&)[128]>(accumulator), a + k * 2 / 16, b + k * 2 / 16,
                              accumulate);
      }
    }
    cute::warpgroup_commit_batch();
    if (step > 0) {
      cute::warpgroup_wait<1>();
      release(ring.empty[previous]);
    }
    previous = at.stage;
    at.advance(kStages);
  }
  if (threadIdx.x % 32 == 0) done.arrive();
  cute::warpgroup_wait<0>();
  release(ring.empty[previous]);
#pragma unroll
  for (int i = 0; i < 2 * 64; ++i) cute::warpgroup_fence_operand(accumulator[i / 64][i % 64]);
}

// A consuming warpgroup: every second tile of this CTA. `turn` are barriers of each consumer.
template <typename Z, typename T, int kM, int kN, int kStages, int kStageBytes>
__device__ __forceinline__ void consume(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                        const Ring<kStageBytes>& ring, const Barrier* turn,
                                        const Schedule& schedule, int consumer) {
  const int warp = uniform(threadIdx.x % kWarpgroup / 32), lane = threadIdx.x % 32;
  float* products = reinterpret_cast<float*>(ring.stages + Layout<kM, kN, kStages>::kChunks +
                                             (consumer * 4 + warp) * Shared::kChunkBytes);
  RingPlace at;
  at.advance(kStages, consumer * schedule.steps);
  uint32_t other_done = consumer == 0;  // parity; before its first tile, consumer 0 waits for nothing
  for (uint32_t tile = cute::cluster_id_in_grid().x + consumer * schedule.clusters; tile < schedule.tiles;
       tile += 2 * schedule.clusters) {
    const Sharing place = place_in_cluster(schedule);  // found anew, as the update needs its registers
    const Release release(place, lane);
    const WarpRows<kM> rows(p, first_row(schedule, place, tile, kM), warp, lane);
    float accumulator[2][64];
    // A stage's parity tells its latest copy from the one before, not from the one after: nobody may look for
    // a copy before the other consumer has had those of the tile in between.
    turn[consumer].wait(other_done);
    other_done ^= 1;
    multiply<T, kM, kStages>(accumulator, ring, at, schedule.steps, release, turn[1 - consumer]);
    at.advance(kStages, schedule.steps);  // over the other consumer's tile
#pragma unroll 1  // one copy of the update: the second half moves to where the first was
    for (int half = 0; half < 2; ++half) {
      const int64_t column =
          first_column(schedule, place, tile, kN) + (kM == 128 ? 0 : half * Shared::kChunkColumns);
      const int count = static_cast<int>(min(p.n - rows.n(half), int64_t{Shared::kChunkRows}));
      if (count <= 0 || column >= p.vocab) break;
      update_chunk<Z>(p, scalars, rows, half, count, column, accumulator[0], products, lane);
#pragma unroll
      for (int i = 0; i < 64; ++i) accumulator[0][i] = accumulator[1][i];
    }
  }
}
#endif

template <typename Z, typename T, int kM, int kN, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    logit_update_sm90_kernel(const LogitUpdateParams p, const UpdateScalars scalars, const Schedule schedule,
                             const __grid_constant__ CUtensorMap grad_map,
                             const __grid_constant__ CUtensorMap embedding_map) {
#ifdef ENTRGI_HOPPER
  using L = Layout<kM, kN, kStages>;
  extern __shared__ __align__(1024) char shared[];
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared + L::kBarriers);
  Barrier* const turn = barriers + 2 * kStages;
  const Ring<L::kStageBytes> ring{shared, barriers, barriers + kStages};
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&grad_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&embedding_map));
    const int receivers = schedule.cluster_m + schedule.cluster_n - 1;  // CTAs of its row and column
    ring.init(kStages, receivers * (kWarpgroup / 32));
    for (int consumer = 0; consumer < 2; ++consumer) turn[consumer].init(kWarpgroup / 32);
    fence_barrier_init();
  }
  cute::cluster_sync();  // nobody copies into a CTA, or arrives there, before its barriers are there

  const int warpgroup = uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (uniform(threadIdx.x / 32) == 0 && cute::elect_one_sync())
      produce<kM, kN, kStages>(ring, schedule, grad_map, embedding_map);
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume<Z, T, kM, kN, kStages>(p, scalars, ring, turn, schedule, warpgroup - 1);
  }
  cute::cluster_sync();  // nor leaves while others still arrive there
#endif
}

}  // namespace

// Of z in E's dtype or fp32, in aligned rows.
cudaError_t logit_update_sm90(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  const auto one_or_two = [](int size) { return size == 1 || size == 2; };
  if (!one_or_two(plan.cluster_m) || !one_or_two(plan.cluster_n) || !shape_of(p).logits_aligned) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = choose(
      [&]<typename T, typename Logits, typename Place>() {
        constexpr auto t = kSm90[Place::value];
        static_assert(t.threads == kThreads, "the kernel has one warpgroup that loads and two that multiply");
        return &compiled<logit_update_sm90_kernel<SameOrFloat<Logits, T>, T, t.block_m, t.block_n, t.stages>,
                         UpdateShared::bytes(t)>;
      },
      type_of_16_bits(p.embedding.dtype), same_or_float(p.logits.dtype, p.embedding.dtype),
      tile_of<kSm90>(plan));
  if (kernel == nullptr || plan.cluster_m < 1 || plan.cluster_n < 1) return cudaErrorInvalidValue;
  const int64_t cluster = plan.cluster_m * plan.cluster_n;
  const int64_t rows = ceil_div(p.n, int64_t{plan.block_m} * plan.cluster_m);
  const int64_t tiles = rows * ceil_div(p.vocab, int64_t{plan.block_n} * plan.cluster_n);
  if (std::max({tiles, p.n, p.vocab, p.dim}) > INT32_MAX) return cudaErrorInvalidValue;  // TMA's coordinates

  CUtensorMap grad_map, embedding_map;
  const char* gathered = static_cast<const char*>(p.workspace) + GatheredGrad::offset(p.n);
  cudaError_t error = make_tensor_map(&grad_map, p.embedding.dtype, gathered, p.n, p.dim,
                                      GatheredGrad::pitch(p.dim), plan.block_m / plan.cluster_n);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&embedding_map, p.embedding.dtype, p.embedding.data, p.vocab, p.dim,
                          p.embedding.stride, plan.block_n / plan.cluster_m);
  if (error != cudaSuccess) return error;
  const Schedule schedule{plan.cluster_m,
                          plan.cluster_n,
                          static_cast<int>(ceil_div(p.dim, Shared::kStep)),
                          static_cast<uint32_t>(rows),
                          static_cast<uint32_t>(tiles),
                          static_cast<uint32_t>(plan.grid / cluster)};
  return launch(kernel, {plan.grid, kThreads, plan.shared_bytes, cluster}, stream, p, UpdateScalars(p),
                schedule, grad_map, embedding_map);
}

}  // namespace entrgi
