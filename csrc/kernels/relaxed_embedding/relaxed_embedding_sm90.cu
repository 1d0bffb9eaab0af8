// Relaxed embedding, the matrix product on Hopper: partial[split] = q E over the split's part of the
// vocabulary, with
//
//   q = exp(z / tau - logsumexp)        z [N, V] bf16 / fp16 / fp32, E [V, d] bf16 / fp16, both row-major
//
// in fp32 [splits, N, pitch]; relaxed_embedding.cu sums the splits in order and blends in the hard rows.
//
// Floor    N V sizeof(z) + V d sizeof(E) bytes, 2 N V d FLOPs. N <= 64 is bound by reading E once.
//
// Tiling   One CTA per SM: a producer and consumer warpgroups of 64 rows each. A consumer has all columns of
//          the tile, so q is made once per CTA. The vocabulary goes through a ring of stages of 64 ids:
//
//             64 x 256   one consumer      N <= 64: all of E's bandwidth, few rows
//            128 x 256   two consumers     128 accumulators a thread
//            192 x 192   three consumers   96 accumulators; for N that tiles of 128 fit badly
//
//            E [64 ids x columns]  boxes of 64 ids x 128 bytes: operand B, MN-major, in shared memory
//            z [rows x 64 ids]     boxes of rows x 128 bytes -> ldmatrix (fp32: 8-byte loads) -> q:
//                                  operand A, in registers
//
//          One thread of the producer copies both by TMA under the 128-byte swizzle; what lies outside either
//          matrix reads 0. Rows of padding are read with the others of their tile and count for nothing:
//          their q are 0 (or NaN, where z is), in rows of the partial sums that nobody reads.
//          Consumers work in half steps of 32 ids: while the products of one half run, q of the next is made.
//
//   producer    E, z -> stage 0 | stage 1 | stage 2 | ...     waits for stages that all consumers have left
//   consumer    q(0a) | wgmma 0a | wgmma 0b | wgmma 1a | ...
//                     | q(0b)    | q(1a)    | q(1b)    | ...
//
// Cluster  CTAs of one column of tiles, two or four along the rows, share E: each fetches a part of the boxes
//          for all. Two CTAs of one row share z the same way. Row tiles that fill no cluster have theirs
//          along the columns, in pairs that share z. CTAs that share and have only rows of padding end at
//          once.
//
// Grid     CTAs of a cluster, row tiles, tiles of d, splits, so that CTAs that share E run together.
//
// Considered, with numbers in docs/kernels/relaxed_embedding.md: q shared through memory or made by another
// pass; q divided by the row's own sum (the gradient uses the same logsumexp and must see the same q).
#include <math_constants.h>

#include "../detail/launch.h"
#include "../detail/ring.cuh"
#include "../detail/tensor_map.h"
#include "relaxed_embedding.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace relaxed_embedding_tiles;

constexpr int kRows = 64;                                                          // of a consumer warpgroup
constexpr int kStep = 64;                                                          // vocabulary ids per stage
constexpr int kBoxColumns = kSwizzleBytes / 2, kBoxBytes = kStep * kSwizzleBytes;  // of E

// Registers of producer and consumer threads once they part; a lone consumer has enough from the start.
template <int kConsumers>
constexpr uint32_t kProducerRegisters = kConsumers == 3 ? 32 : 40;
template <int kConsumers>
constexpr uint32_t kConsumerRegisters = kConsumers == 3 ? 160 : 232;

template <typename Z, int kConsumers>
struct Layout {
  static constexpr int kM = kConsumers * kRows, kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kColumns = kConsumers == 3 ? 192 : 256, kBoxes = kColumns / kBoxColumns;
  static constexpr int kEmbeddingBytes = kBoxes * kBoxBytes;
  // z: boxes of all rows and as many ids as fit in 128 bytes.
  static constexpr int kBoxIds = kSwizzleBytes / sizeof(Z), kLogitBoxBytes = kM * kSwizzleBytes;
  static constexpr int kStageBytes = kEmbeddingBytes + kStep / kBoxIds * kLogitBoxBytes;
};

// How the grid is laid out. Counted on the host: 64-bit divisions on the device are function calls, and where
// a kernel has one (or an assertion) ptxas runs matrix products one at a time.
struct Schedule {
  int64_t pitch;
  unsigned groups, rest;  // row tiles: whole clusters of them, and how many are left
  unsigned columns;       // tiles of d, a multiple of cluster_n and rest_n
  int steps, steps_per_split;
  int stages, cluster_m, cluster_n, rest_n;
  int logit_parts;  // boxes of z along the rows: 2 where CTAs may share it
};

#ifdef ENTRGI_HOPPER
// What a CTA computes, with how many along the rows it shares the embedding, along the columns the logits,
// and which of these it is.
struct Work {
  unsigned row_tile, column_tile, split;
  Sharing sharing;

  __device__ __forceinline__ explicit Work(const Schedule& s) {
    const unsigned size = s.cluster_m * s.cluster_n;
    const unsigned cluster = blockIdx.x / size, member = blockIdx.x % size;
    const unsigned grouped = s.groups * (s.columns / s.cluster_n);
    const unsigned clusters = grouped + s.rest * ((s.columns + size - 1) / size);
    const unsigned i = cluster % clusters;
    split = cluster / clusters;
    if (i < grouped) {
      sharing = {s.cluster_m, s.cluster_n, static_cast<int>(member % s.cluster_m),
                 static_cast<int>(member / s.cluster_m)};
      row_tile = i % s.groups * s.cluster_m + sharing.rank_m;
      column_tile = i / s.groups * s.cluster_n + sharing.rank_n;
    } else {  // tiles of d side by side; the last cluster may have some that are not there
      sharing = {1, s.rest_n, 0, static_cast<int>(member % s.rest_n)};
      row_tile = s.groups * s.cluster_m + (i - grouped) % s.rest;
      column_tile = (i - grouped) / s.rest * size + member;
    }
  }
};

__device__ __forceinline__ bool present(const RelaxedEmbeddingParams& p, int64_t n) {
  return n < p.n && output_row(p, n) >= 0;
}

// One thread: every stage of this CTA, its part of what it shares.
template <typename L>
__device__ __forceinline__ void produce(const Ring<L::kStageBytes>& ring, const Schedule& s, const Work& work,
                                        int first_step, int steps, uint64_t embedding_hint,
                                        const CUtensorMap& embedding, const CUtensorMap& logits) {
  const Sharing& sharing = work.sharing;
  const uint32_t embedding_mask = sharing.column(), logits_mask = sharing.row();
  const int first_row = static_cast<int>(work.row_tile) * L::kM;
  const int part_rows = s.logit_parts == 2 ? L::kM / 2 : L::kM;
  const int first_column = static_cast<int>(work.column_tile) * L::kColumns;
  RingPlace at;
#pragma unroll 1
  for (int step = first_step; step < first_step + steps; ++step, at.advance(s.stages)) {
    char* stage = ring.stage(at.stage);
    Barrier& full = ring.full[at.stage];
    ring.empty[at.stage].wait(at.phase ^ 1);
    full.arrive_and_expect_tx(L::kStageBytes);
#pragma unroll 1
    for (int box = sharing.rank_m; box < L::kBoxes; box += sharing.m) {
      copy_shared_box(embedding_mask, embedding, full, stage + box * kBoxBytes, step * kStep,
                      first_column + box * kBoxColumns, embedding_hint);
    }
#pragma unroll 1
    for (int part = sharing.rank_n; part < s.logit_parts; part += sharing.n) {
      const int row = part * part_rows;
      for (int id = 0; id < kStep; id += L::kBoxIds) {
        char* to = stage + L::kEmbeddingBytes + id / L::kBoxIds * L::kLogitBoxBytes + row * kSwizzleBytes;
        copy_shared_box(logits_mask, logits, full, to, first_row + row, step * kStep + id, kNormalInL2);
      }
    }
  }
}

// Two 16-bit logits in one instruction each.
template <typename Z>
__device__ __forceinline__ void unpack(float (&z)[2], uint32_t pair) {
  if constexpr (std::is_same_v<Z, __nv_bfloat16>) {
    z[0] = __uint_as_float(pair << 16), z[1] = __uint_as_float(pair & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    z[0] = both.x, z[1] = both.y;
  }
}

// What a lane reads of the z tile: operand A's registers i = 0 ... 3 hold row row_of(lane) (+ 8 if i is odd)
// of a warp's 16 and ids 2 (lane % 4) + {0, 1} (+ 8 from i = 2 on) of 16. The swizzle exchanges 16-byte
// chunks by the row alone, so other ids of the same rows are an exclusive or away.
template <typename Z, int kLogitBoxBytes>
struct LogitReader {
  uint32_t offset;

  __device__ static __forceinline__ int row_of(int lane) { return lane / 4; }
  __device__ __forceinline__ LogitReader(int warp_row, int lane)
      : offset((warp_row + lane % 16) * kSwizzleBytes + (lane / 16 ^ lane % 8) * 16) {}
  __device__ __forceinline__ void operator()(float (&z)[4][2], const char* tile, int id) const {
    uint32_t raw[4];
    load_matrices(raw, shared_address(tile) + (offset ^ static_cast<uint32_t>(id * sizeof(Z))));
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack<Z>(z[i], raw[i]);
  }
};
template <int kLogitBoxBytes>
struct LogitReader<float, kLogitBoxBytes> {
  uint32_t offset;

  // Half a warp reads 32 bytes of four rows at once. Of two neighbouring rows the swizzle leaves those in the
  // same banks: the rows of a half are two apart. The order of rows in operand A is free.
  __device__ static __forceinline__ int row_of(int lane) { return lane / 4 % 4 * 2 + lane / 16; }
  __device__ __forceinline__ LogitReader(int warp_row, int lane)
      : offset((warp_row + row_of(lane)) * kSwizzleBytes + (lane % 4 / 2 ^ row_of(lane)) * 16 +
               lane % 2 * 8) {}
  __device__ __forceinline__ void operator()(float (&z)[4][2], const char* tile, int id) const {
    constexpr int kIds = kSwizzleBytes / sizeof(float);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(tile + (offset ^ (id % kIds + i / 2 * 8) * sizeof(float)) +
                                           id / kIds * kLogitBoxBytes + i % 2 * 8 * kSwizzleBytes);
      z[i][0] = pair.x, z[i][1] = pair.y;
    }
  }
};

// Operand A for 16 ids from `id` on.
template <typename T, typename Reader>
__device__ __forceinline__ void make_operand(uint32_t (&a)[4], const Reader& read, const char* tile, int id,
                                             int ids_left, const float (&lse)[2], float inverse_tau) {
  float z[4][2];
  read(z, tile, id);
  // Past the end of the vocabulary z reads 0, where q could be anything, inf included.
  if (id + 16 > ids_left) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (id + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= ids_left) z[i / 2][i % 2] = -CUDART_INF_F;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float q[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      q[j] = exp2_approx(fmaf(log_softmax(z[i][j], inverse_tau, lse[i % 2]), kLog2e, kLog2Scale<T>));
    }
    a[i] = pack<T>(q[0], q[1]);
  }
}

using cute::SM90::GMMA::Major;

// 64 rows by kColumns by 16 ids.
template <typename T, int kColumns>
using Product = std::conditional_t<
    std::is_same_v<T, __half>,
    std::conditional_t<kColumns == 192, cute::SM90::GMMA::MMA_64x192x16_F32F16F16_RS<Major::K, Major::MN>,
                       cute::SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, Major::MN>>,
    std::conditional_t<kColumns == 192, cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_RS<Major::K, Major::MN>,
                       cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, Major::MN>>>;

// A consuming warpgroup, of which `warp` is one: its 64 rows of the tile.
template <typename Z, typename T, int kConsumers>
__device__ __forceinline__ void consume(const RelaxedEmbeddingParams& p, const SoftmaxScale& scale,
                                        const Schedule& schedule, const Work& work,
                                        const Ring<Layout<Z, kConsumers>::kStageBytes>& ring, int first_step,
                                        int steps, int warp) {
  using L = Layout<Z, kConsumers>;
  using Atom = Product<T, L::kColumns>;
  using Reader = LogitReader<Z, L::kLogitBoxBytes>;
  constexpr int kHalf = kStep / 2, kBlocks = kHalf / 16;  // products of half a step

  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{work.row_tile} * L::kM + warp * 16 + Reader::row_of(lane);
  // Rows that are not there have logsumexp = inf: q = 0.
  float lse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    lse[h] = present(p, row + 8 * h) ? fp32(p.logsumexp)[row + 8 * h] : CUDART_INF_F;
  const Reader read(warp * 16, lane);
  const Release release(work.sharing, lane);

  float accumulator[L::kColumns / 2] = {};
  uint32_t a[2][kBlocks][4];  // q of either half of a step
  RingPlace at;

  const auto make_half = [&](int half, int step) {
    const int ids_left = static_cast<int>(p.vocab) - (first_step + step) * kStep;
    const char* tile = ring.stage(at.stage) + L::kEmbeddingBytes;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      make_operand<T>(a[half][block], read, tile, half * kHalf + block * 16, ids_left, lse,
                      scale.inverse_tau);
    }
  };
  const auto multiply_half = [&](int half) {
    const uint32_t tile = shared_address(ring.stage(at.stage)) + half * kHalf * kSwizzleBytes;
    cute::warpgroup_arrive();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      // Eight ids are 1,024 bytes apart, 64 columns a box.
      wgmma<Atom>(accumulator, a[half][block], operand(tile + block * 16 * kSwizzleBytes, kBoxBytes, 1024),
                  true);
    }
    cute::warpgroup_commit_batch();
  };

  ring.full[0].wait(0);
  make_half(0, 0);
  int previous = -1;
#pragma unroll 1
  for (int step = 0;;) {
    multiply_half(0);
    cute::warpgroup_wait<1>();  // the previous step is done, its stage free in every CTA that sends to it
    if (previous >= 0) release(ring.empty[previous]);
    make_half(1, step);
    multiply_half(1);
    if (++step == steps) break;
    previous = static_cast<int>(at.stage);
    at.advance(schedule.stages);
    ring.full[at.stage].wait(at.phase);
    cute::warpgroup_wait<1>();  // the first half is done, its registers free
    make_half(0, step);
  }
  cute::warpgroup_wait<0>();
#pragma unroll
  for (float& sum : accumulator) cute::warpgroup_fence_operand(sum);
  cute::cluster_arrive();

  const int64_t first_column = int64_t{work.column_tile} * L::kColumns;
  float* partial = static_cast<float*>(p.workspace) + int64_t{work.split} * p.n * schedule.pitch;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row + 8 * h >= p.n) continue;
    float* to = partial + (row + 8 * h) * schedule.pitch;
#pragma unroll
    for (int f = 0; f < L::kColumns / 8; ++f) {
      const int64_t column = first_column + f * 8 + lane % 4 * 2;
      if (column < p.dim) {  // the pitch is even: a pair never leaves the row
        *reinterpret_cast<float2*>(to + column) = {accumulator[4 * f + 2 * h] * kUnscale<T>,
                                                   accumulator[4 * f + 2 * h + 1] * kUnscale<T>};
      }
    }
  }
}
#endif

template <typename Z, typename T, int kConsumers>
__global__ void __launch_bounds__(Layout<Z, kConsumers>::kThreads, 1)
    relaxed_embedding_sm90_kernel(const RelaxedEmbeddingParams p, const SoftmaxScale scale,
                                  const Schedule schedule, const __grid_constant__ CUtensorMap embedding,
                                  const __grid_constant__ CUtensorMap logits) {
#ifdef ENTRGI_HOPPER
  using L = Layout<Z, kConsumers>;
  extern __shared__ __align__(1024) char shared[];
  Barrier* barriers = reinterpret_cast<Barrier*>(shared + schedule.stages * L::kStageBytes);
  const Ring<L::kStageBytes> ring{shared, barriers, barriers + schedule.stages};

  const Work work(schedule);
  const int first_step = static_cast<int>(work.split) * schedule.steps_per_split;
  const int steps = min(schedule.steps_per_split, schedule.steps - first_step);

  bool any = false;  // row is there, of those that share: all of them find the same
  for (int r = threadIdx.x; r < work.sharing.m * L::kM; r += L::kThreads) {
    any |= present(p, int64_t{work.row_tile - work.sharing.rank_m} * L::kM + r);
  }
  if (!__syncthreads_or(any) || work.column_tile >= schedule.columns) return;

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&embedding);
    cute::prefetch_tma_descriptor(&logits);
    ring.init(schedule.stages, (work.sharing.m + work.sharing.n - 1) * kConsumers * kWarpgroup / 32);
    fence_barrier_init();
  }
  cute::cluster_sync();  // nobody copies into a CTA, or arrives there, before its barriers are there

  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  if (warp < kWarpgroup / 32) {
    if constexpr (kConsumers > 1) cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters<kConsumers>>();
    if (warp == 0 && cute::elect_one_sync()) {  // of threadIdx.x == 0 it is not known to be one thread
      // Read once, E leaves L2 to z and the partial sums.
      const uint64_t hint = schedule.groups + schedule.rest == 1 ? kStreamThroughL2 : kNormalInL2;
      produce<L>(ring, schedule, work, first_step, steps, hint, embedding, logits);
    }
    __syncwarp();
    cute::cluster_arrive();
  } else {
    if constexpr (kConsumers > 1) cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters<kConsumers>>();
    consume<Z, T, kConsumers>(p, scale, schedule, work, ring, first_step, steps, warp - kWarpgroup / 32);
    __syncwarp();
  }
  cute::cluster_wait();  // no CTA ends while another may still arrive on its barriers
#endif
}

}  // namespace

cudaError_t relaxed_embedding_sm90(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  const int cluster = plan.cluster_m * plan.cluster_n;
  if (plan.block_m < 1 || plan.block_n < 1 || cluster < 1) return cudaErrorInvalidValue;
  const Dealt tiles(p.n, p.dim, plan);
  if ((cluster != 1 && cluster != 2 && cluster != 4) || plan.cluster_n > 2 ||
      tiles.columns % plan.cluster_n != 0) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = choose(
      [&]<typename T, typename Logits, typename Place>() {
        using Z = SameOrFloat<Logits, T>;
        constexpr auto t = kSm90[Place::value];
        using L = Layout<Z, t.block_m / kRows>;
        static_assert(L::kM == t.block_m && L::kColumns == t.block_n && L::kThreads == t.threads,
                      "the tile is one of a warpgroup of consumers for every 64 rows");
        static_assert(L::kStageBytes == stage_bytes(t.block_m, t.block_n, kStep, sizeof(Z), sizeof(T)),
                      "the plan counts a stage as the kernel lays it out");
        return &compiled<relaxed_embedding_sm90_kernel<Z, T, t.block_m / kRows>, kHopperSharedBytes>;
      },
      type_of_16_bits(p.embedding.dtype), same_or_float(p.logits.dtype, p.embedding.dtype),
      tile_of<kSm90>(plan));
  const int64_t steps = ceil_div(p.vocab, kStep);
  const int logit_parts = std::max(plan.cluster_n, tiles.rest_n);
  CUtensorMap embedding, logits;
  cudaError_t error = make_tensor_map(&embedding, p.embedding.dtype, p.embedding.data, p.vocab, p.dim,
                                      p.embedding.stride, kStep);
  if (error == cudaSuccess) {
    error = make_tensor_map(&logits, p.logits.dtype, p.logits.data, p.n, p.vocab, p.logits.stride,
                            plan.block_m / logit_parts);
  }
  if (error != cudaSuccess) return error;
  const Schedule schedule{pitch_of(p.dim),
                          static_cast<unsigned>(tiles.groups),
                          static_cast<unsigned>(tiles.rest),
                          static_cast<unsigned>(tiles.columns),
                          static_cast<int>(steps),
                          static_cast<int>(ceil_div(steps, plan.splits)),
                          plan.stages,
                          plan.cluster_m,
                          plan.cluster_n,
                          tiles.rest_n,
                          logit_parts};
  return launch(kernel, {plan.grid, plan.threads, plan.shared_bytes, cluster}, stream, p,
                SoftmaxScale(p.temperature), schedule, embedding, logits);
}

}  // namespace entrgi
