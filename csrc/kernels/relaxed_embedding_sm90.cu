// Relaxed embedding, the matrix product on Hopper: partial[split] = q E over the split's part of the
// vocabulary, with
//
//   q = exp(z / tau - logsumexp)        z [N, V] bf16 / fp16 / fp32, E [V, d] bf16 / fp16, both row-major
//
// in fp32 [splits, N, pitch]; relaxed_embedding.cu sums the splits in order and blends in the hard rows.
//
// Floor    N V sizeof(z) + V d sizeof(E) bytes, 2 N V d FLOPs. N <= 64 is bound by reading E once.
//
// Tiling   One CTA per SM: a producer warpgroup and consumer warpgroups of 64 rows each. A consumer has all
//          columns of the tile, so q is made once per CTA. The vocabulary goes through a ring of stages of 64
//          ids:
//
//            M  64 x N 256   one consumer      N <= 64: all of E's bandwidth, few rows
//            M 128 x N 256   two consumers     128 accumulators a thread
//            M 192 x N 192   three consumers   96 accumulators; for N that tiles of 128 fit badly
//
//            E [64 ids x N]  TMA, boxes of 64 ids x 128 bytes, 128-byte swizzle: operand B, MN-major
//            z [M x 64 ids]  cp.async -> ldmatrix (fp32: 8-byte loads) -> q:     operand A, in registers
//
//          Both complete on the stage's full barrier: one arrival announces E's bytes, and each producer
//          thread arrives when its own copies of z have landed. z goes by cp.async, not by TMA: rows of
//          padding must not be read, and rows may start anywhere. Ends of rows are zero-filled.
//          Consumers work in half steps of 32 ids: while the products of one half run, q of the next is made.
//
//   producer    E, z -> stage 0 | stage 1 | stage 2 | ...     waits for stages that all consumers have left
//   consumer    q(0a) | wgmma 0a | wgmma 0b | wgmma 1a | ...
//                     | q(0b)    | q(1a)    | q(1b)    | ...
//
// Cluster  Two or four CTAs along the rows share E: each fetches a share of the boxes for all. L2 delivers
//          32 KB / cluster + z in a step of 1,024 clocks. Row tiles that fill no cluster share nothing: their
//          clusters lie along the columns. CTAs that share and have only rows of padding end at once.
//
// Grid     CTAs of a cluster, row tiles, tiles of d, splits, so that CTAs that share E run together.
//
// Considered, with numbers in docs/kernels/relaxed_embedding.md: q shared through memory or made by another
// pass; q divided by the row's own sum (the gradient uses the same logsumexp and must see the same q).
#include <math_constants.h>

#include "detail/hopper.cuh"
#include "detail/tile.cuh"
#include "launch.h"
#include "plan_operators.h"
#include "relaxed_embedding.cuh"
#include "tensor_map.h"

namespace entrgi {
namespace {

constexpr int kRows = 64;  // of a consumer warpgroup
constexpr int kStep = 64;  // vocabulary ids per stage
constexpr int kSharedBytes = 227 * 1024;
constexpr int kBoxColumns = kSwizzleBytes / 2, kBoxBytes = kStep * kSwizzleBytes;

// Registers of producer and consumer threads once they part; a lone consumer has enough from the start.
template <int kConsumers>
constexpr uint32_t kProducerRegisters = kConsumers == 3 ? 56 : 88;
template <int kConsumers>
constexpr uint32_t kConsumerRegisters = kConsumers == 3 ? 152 : 208;

template <typename Z, int kConsumers>
struct Layout {
  static constexpr int kM = kConsumers * kRows, kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kColumns = kConsumers == 3 ? 192 : 256, kBoxes = kColumns / kBoxColumns;
  static constexpr int kEmbeddingBytes = kBoxes * kBoxBytes;
  using Logits = Tile<Z, kM, kStep, sizeof(Z) == 4 ? Swizzle::kPairs : Swizzle::kMatrixOf128>;
  static constexpr int kStageBytes = kEmbeddingBytes + Logits::kBytes;

  // Stages, then where each row of z starts, then a full and an empty barrier per stage.
  static constexpr int bytes(int stages) {
    return stages * (kStageBytes + 2 * static_cast<int>(sizeof(uint64_t))) +
           kM * static_cast<int>(sizeof(int64_t));
  }
};

// How the grid is laid out. Counted on the host: 64-bit divisions on the device are function calls, and where
// a kernel has one (or an assertion) ptxas runs matrix products one at a time.
struct Schedule {
  int64_t pitch;
  unsigned groups, rest;  // row tiles: whole clusters of them, and how many are left
  unsigned columns;       // tiles of d
  int steps, steps_per_split;
  int stages, cluster, logits_granule;
};

#ifdef ENTRGI_HOPPER
constexpr uint64_t kNormalInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

// CUTLASS's waits and arrivals do not tell the compiler that they order memory.
__device__ __forceinline__ void compiler_fence() {
  asm volatile("" ::: "memory");
}

// A place in the ring and how often, modulo two, it has been passed.
struct Stage {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

// What a CTA computes, and with how many it shares the embedding's tiles.
struct Work {
  unsigned row_tile, column_tile, split;
  int sharing, rank;
  __device__ __forceinline__ explicit Work(const Schedule& s) {
    const unsigned shared = s.groups * s.columns, alone = s.rest * ((s.columns + s.cluster - 1) / s.cluster);
    const unsigned cluster = blockIdx.x / s.cluster, member = blockIdx.x % s.cluster;
    const unsigned i = cluster % (shared + alone);
    split = cluster / (shared + alone);
    if (i < shared) {
      row_tile = i % s.groups * s.cluster + member, column_tile = i / s.groups;
      sharing = s.cluster, rank = static_cast<int>(member);
    } else {  // tiles of d side by side; the last cluster may have some that are not there
      row_tile = s.groups * s.cluster + (i - shared) % s.rest;
      column_tile = (i - shared) / s.rest * s.cluster + member;
      sharing = 1, rank = 0;
    }
  }
};

__device__ __forceinline__ bool present(const RelaxedEmbeddingParams& p, int64_t n) {
  return n < p.n && output_row(p, n) >= 0;
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

// What a lane reads of the z tile: operand A's registers i = 0 ... 3 hold row lane / 4 (+ 8 if i is odd) and
// ids 2 (lane % 4) + {0, 1} (+ 8 from i = 2 on) of 16 x 16. Chunks are swizzled by the row alone, so other
// ids of the same rows are an exclusive or away.
template <typename Z>
struct LogitReader {
  uint32_t offset;
  template <typename Logits>
  __device__ __forceinline__ LogitReader(Logits, int warp_row, int lane)
      : offset(Logits::offset(warp_row + lane % 16, lane / 16)) {}
  __device__ __forceinline__ void operator()(float (&z)[4][2], const char* tile, int id) const {
    uint32_t raw[4];
    load_matrices(raw, shared_address(tile) + (offset ^ static_cast<uint32_t>(id * sizeof(Z))));
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack<Z>(z[i], raw[i]);
  }
};
template <>
struct LogitReader<float> {
  uint32_t offset;
  template <typename Logits>
  __device__ __forceinline__ LogitReader(Logits, int warp_row, int lane)
      : offset(Logits::offset(warp_row + lane / 4, lane % 4 / 2) + lane % 2 * 8) {}
  __device__ __forceinline__ void operator()(float (&z)[4][2], const char* tile, int id) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(
          tile + (offset ^ (id + i / 2 * 8) * sizeof(float)) + i % 2 * 8 * kStep * sizeof(float));
      z[i][0] = pair.x, z[i][1] = pair.y;
    }
  }
};

// Operand A for 16 ids from `id` on.
template <typename T, typename Z>
__device__ __forceinline__ void make_operand(uint32_t (&a)[4], const LogitReader<Z>& read, const char* tile,
                                             int id, int ids_left, const float (&lse)[2], float inverse_tau) {
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
struct Product;
template <>
struct Product<__half, 192> {
  using Atom = cute::SM90::GMMA::MMA_64x192x16_F32F16F16_RS<Major::K, Major::MN>;
};
template <>
struct Product<__half, 256> {
  using Atom = cute::SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, Major::MN>;
};
template <>
struct Product<__nv_bfloat16, 192> {
  using Atom = cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Product<__nv_bfloat16, 256> {
  using Atom = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
#endif

template <typename Z, typename T, int kConsumers>
__global__ void __launch_bounds__(Layout<Z, kConsumers>::kThreads, 1)
    relaxed_embedding_sm90_kernel(const RelaxedEmbeddingParams p, const SoftmaxScale scale,
                                  const Schedule schedule, const __grid_constant__ CUtensorMap embedding) {
#ifdef ENTRGI_HOPPER
  using L = Layout<Z, kConsumers>;
  using Atom = typename Product<T, L::kColumns>::Atom;
  constexpr int kHalf = kStep / 2, kBlocks = kHalf / 16;  // products of half a step

  extern __shared__ __align__(1024) char shared[];
  const int stages = schedule.stages;
  int64_t* row_offset = reinterpret_cast<int64_t*>(shared + stages * L::kStageBytes);
  Barrier* full = reinterpret_cast<Barrier*>(row_offset + L::kM);
  Barrier* empty = full + stages;

  const Work work(schedule);
  const int sharing = work.sharing;
  const int64_t first_row = int64_t{work.row_tile} * L::kM;
  const int64_t first_column = int64_t{work.column_tile} * L::kColumns;
  const int first_step = static_cast<int>(work.split) * schedule.steps_per_split;
  const int steps = min(schedule.steps_per_split, schedule.steps - first_step);

  bool any = false;
  for (int r = threadIdx.x; r < sharing * L::kM; r += L::kThreads) {
    any |= present(p, first_row - work.rank * L::kM + r);
  }
  // All CTAs that share find the same.
  if (!__syncthreads_or(any) || first_column >= p.dim) return;

  for (int r = threadIdx.x; r < L::kM; r += L::kThreads) {
    const int64_t n = first_row + r;
    row_offset[r] = present(p, n) ? n * p.logits_stride : -1;
  }
  // Copies inside the matrix leave rows that are not there as they are: zero, from here on.
  for (int i = threadIdx.x; i < L::Logits::kBytes / 16; i += L::kThreads) {
    if (present(p, first_row + i / L::Logits::kChunks)) continue;
    for (int stage = 0; stage < stages; ++stage) {
      char* tile = shared + stage * L::kStageBytes + L::kEmbeddingBytes;
      reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&embedding);
    for (int i = 0; i < stages; ++i) {
      full[i].init(1 + kWarpgroup);
      empty[i].init(sharing * kConsumers * kWarpgroup / 32);
    }
    fence_barrier_init();
  }
  if (sharing > 1) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }

  Stage stage;
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    if constexpr (kConsumers > 1) cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters<kConsumers>>();
    const Z* logits = static_cast<const Z*>(p.logits);
    const uint64_t hint = p.n <= L::kM ? kStreamThroughL2 : kNormalInL2;
    // This thread's share of a step of z: its first unit, the distance to the next, and which rows are there.
    const bool halves = schedule.logits_granule == 2;  // rows start at even and odd elements
    const int granule = halves ? 4 : schedule.logits_granule, units = L::Logits::kRowBytes / granule;
    const int top = static_cast<int>(threadIdx.x) / units, unit = static_cast<int>(threadIdx.x) % units;
    const int64_t apart = kWarpgroup / units * p.logits_stride;
    const Z* first = logits + (first_row + top) * p.logits_stride + unit * granule / sizeof(Z);
    // Rows of a warp are four apart then: all start in the middle of a word, or none does.
    const bool shifted = halves && reinterpret_cast<uintptr_t>(first) % 4 != 0;
    uint32_t rows[L::kM / 32];
#pragma unroll
    for (int i = 0; i < L::kM / 32; ++i) {
      rows[i] = __ballot_sync(~0u, row_offset[i * 32 + threadIdx.x % 32] >= 0) >> top;
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step, stage.advance(stages)) {
      const int64_t id = int64_t{first_step + step} * kStep;
      char* e_tile = shared + stage.index * L::kStageBytes;
      Barrier& landed = full[stage.index];
      empty[stage.index].wait(stage.phase ^ 1);
      if (threadIdx.x == 0) {
        landed.arrive_and_expect_tx(L::kEmbeddingBytes);
        for (int box = work.rank; box < L::kBoxes; box += sharing) {
          char* to = e_tile + box * kBoxBytes;
          const int64_t column = first_column + box * kBoxColumns;
          if (sharing == 1) {
            copy_box(embedding, landed, to, id, column, hint);
          } else {
            copy_box_to(static_cast<uint16_t>((1 << sharing) - 1), embedding, landed, to, id, column, hint);
          }
        }
      }
      const uint32_t z_tile = shared_address(e_tile + L::kEmbeddingBytes);
      const bool inside = id + kStep + (halves ? 1 : 0) <= p.vocab;
      if (!inside) {
        const auto row_of = [&](int r) { return row_offset[r]; };
        L::Logits::template fill_rolled<kWarpgroup>(z_tile, logits, row_of, id, p.vocab,
                                                    schedule.logits_granule);
      } else if (granule == 16) {
        L::Logits::template fill_inside<kWarpgroup, 16>(z_tile, first + id, apart, rows);
      } else if (granule == 8) {
        L::Logits::template fill_inside<kWarpgroup, 8>(z_tile, first + id, apart, rows);
      } else if (!shifted) {
        L::Logits::template fill_inside<kWarpgroup, 4>(z_tile, first + id, apart, rows);
      } else if constexpr (sizeof(Z) == 2) {
        L::Logits::template fill_inside_shifted<kWarpgroup>(z_tile, first + id, apart, rows);
      }
      if (halves && (shifted || !inside)) {
        landed.arrive();  // plain stores
      } else {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(landed.address())
                     : "memory");
      }
    }
    __syncwarp();
    if (sharing > 1) cute::cluster_arrive();
  } else {
    if constexpr (kConsumers > 1) cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters<kConsumers>>();
    const int lane = threadIdx.x % 32;
    const int warp_row = static_cast<int>(threadIdx.x - kWarpgroup) / 32 * 16;
    const int64_t row = first_row + warp_row + lane / 4;
    // Rows that are not there have logsumexp = inf: q = 0.
    float lse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) lse[h] = present(p, row + 8 * h) ? p.logsumexp[row + 8 * h] : CUDART_INF_F;
    const LogitReader<Z> read(typename L::Logits{}, warp_row, lane);

    float accumulator[L::kColumns / 2] = {};
    uint32_t a[2][kBlocks][4];  // q of either half of a step

    const auto make_half = [&](int half, int step) {
      const int ids_left =
          static_cast<int>(min(p.vocab - int64_t{first_step + step} * kStep, int64_t{kStep}));
      const char* tile = shared + stage.index * L::kStageBytes + L::kEmbeddingBytes;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        make_operand<T>(a[half][block], read, tile, half * kHalf + block * 16, ids_left, lse,
                        scale.inverse_tau);
      }
    };
    const auto multiply_half = [&](int half) {
      const uint32_t tile =
          shared_address(shared + stage.index * L::kStageBytes) + half * kHalf * kSwizzleBytes;
      cute::warpgroup_arrive();
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        // Eight ids are 1,024 bytes apart, 64 columns a box.
        wgmma<Atom>(accumulator, a[half][block], operand(tile + block * 16 * kSwizzleBytes, kBoxBytes, 1024),
                    true);
      }
      cute::warpgroup_commit_batch();
    };

    full[0].wait(0);
    compiler_fence();
    make_half(0, 0);
    // One lane for each CTA that sends to this one.
    const uint32_t receiver = sharing > 1 ? lane : cute::block_rank_in_cluster();
    int previous = -1;
#pragma unroll 1
    for (int step = 0;;) {
      multiply_half(0);
      cute::warpgroup_wait<1>();  // the previous step is done, its stage free in every CTA that sends to it
      compiler_fence();
      if (previous >= 0 && lane < sharing) empty[previous].arrive(receiver);
      make_half(1, step);
      multiply_half(1);
      if (++step == steps) break;
      previous = stage.index;
      stage.advance(stages);
      full[stage.index].wait(stage.phase);
      compiler_fence();
      cute::warpgroup_wait<1>();  // the first half is done, its registers free
      make_half(0, step);
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (float& sum : accumulator) cute::warpgroup_fence_operand(sum);
    compiler_fence();
    if (sharing > 1) cute::cluster_arrive();

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
  if (sharing > 1) cute::cluster_wait();  // no CTA ends while another may still arrive on its barriers
#endif
}

template <typename Z, typename T, int kConsumers>
cudaError_t launch(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  using L = Layout<Z, kConsumers>;
  if (plan.threads != L::kThreads || plan.block_n != L::kColumns || plan.stages < 2 ||
      plan.shared_bytes != L::bytes(plan.stages)) {
    return cudaErrorInvalidValue;
  }
  CUtensorMap embedding;
  if (const cudaError_t error = make_tensor_map(&embedding, p.embedding_dtype, p.embedding, p.vocab, p.dim,
                                                p.embedding_stride, kStep);
      error != cudaSuccess) {
    return error;
  }
  const int64_t row_tiles = ceil_div(p.n, L::kM), steps = ceil_div(p.vocab, kStep);
  const Schedule schedule{pitch_of(p.dim),
                          static_cast<unsigned>(row_tiles / plan.cluster_m),
                          static_cast<unsigned>(row_tiles % plan.cluster_m),
                          static_cast<unsigned>(ceil_div(p.dim, L::kColumns)),
                          static_cast<int>(steps),
                          static_cast<int>(ceil_div(steps, plan.splits)),
                          plan.stages,
                          plan.cluster_m,
                          copy_granule(p.logits, p.logits_stride, sizeof(Z))};
  return launch_kernel<relaxed_embedding_sm90_kernel<Z, T, kConsumers>, kSharedBytes>(
      {plan.grid, L::kThreads, plan.shared_bytes, plan.cluster_m}, stream, p, SoftmaxScale(p.temperature),
      schedule, embedding);
}

template <typename Z, typename T>
cudaError_t choose_tile(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.block_m == kRows) return launch<Z, T, 1>(p, plan, stream);
  if (plan.block_m == 2 * kRows) return launch<Z, T, 2>(p, plan, stream);
  if (plan.block_m == 3 * kRows) return launch<Z, T, 3>(p, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t relaxed_embedding_sm90(const RelaxedEmbeddingParams& p, const Plan& plan, cudaStream_t stream) {
  const bool cluster_built = plan.cluster_m == 1 || plan.cluster_m == 2 || plan.cluster_m == 4;
  if (!cluster_built || plan.cluster_n != 1 || plan.block_k != kStep) {
    return cudaErrorInvalidValue;
  }
  return with_16_bit_type(p.embedding_dtype, [&]<typename T>() {
    return with_type(p.logits_dtype, [&]<typename Z>() { return choose_tile<Z, T>(p, plan, stream); });
  });
}

}  // namespace entrgi
