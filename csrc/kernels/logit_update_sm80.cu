// Logit update, the product and its epilogue on tensor cores:
//
//   acc = G E^T,  gradient = q (acc - inner) / tau,  then stored, or applied to z (and the moments) in place
//
//   G [R, d] gathered by row and E [V, d], bf16 / fp16, row-major; z [N, V] bf16 / fp16 / fp32; moments fp32
//   [N, V]
//
// Floor    V d sizeof(E) + z read and written + 8 to 16 bytes of moments per logit; 2 N V d FLOPs.
//          At N = 512, d = 2048 bytes and FLOPs take about the same time.
//
// Tiling   CTA of four warps, d in steps of 32 through a cp.async ring:
//            M 16  x N 256   1 x 4 warps of 16 x 64     N <= 16
//            M 64  x N 128   2 x 2 warps of 32 x 64
//            M 128 x N 128   2 x 2 warps of 64 x 64
//          Row tiles fastest, so the CTAs that share rows of E run together and E is read from memory once.
//
//   G tile [M x 32]  ldmatrix = operand A      E tile [N x 32]  ldmatrix = operand B, K contiguous
//
// Which vocabulary id each column of operand B stands for is free: over 16 columns it is chosen so that a
// thread's four results in a row are consecutive ids. The epilogue then moves whole 32-byte sectors straight
// from registers, and nothing is staged through shared memory.
//
// The rule (gradient, Adam, SGD) and first / last step are run-time values: uniform branches in the epilogue,
// a ninth of the instantiations.
#include "detail/tile.cuh"
#include "logit_update.cuh"

namespace entrgi {
namespace {

constexpr int kThreads = 128;
constexpr int kStep = 32;

template <typename Z, typename T, int kM, int kN, int kWarpsM, int kStages>
__global__ void __launch_bounds__(kThreads)
    logit_update_sm80_kernel(const LogitUpdateParams p, const UpdateScalars scalars, int g_granule,
                             int e_granule) {
  constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  constexpr int kFragmentsM = kM / kWarpsM / 16, kFragmentsN = kN / kWarpsN / 8;
  using GTile = Tile<T, kM, kStep, Swizzle::kMatrixOf64>;
  using ETile = Tile<T, kN, kStep, Swizzle::kPermutedOf64>;
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
    row_offset[r] = row < 0 ? -1 : row * p.grad_stride;
  }
  __syncthreads();

  const auto load_stage = [&](int step) {
    if (step < step_count) {
      const uint32_t stage = ring + step % kStages * kStageBytes;
      GTile::template fill<kThreads>(
          stage, static_cast<const T*>(p.grad), [&](int r) { return row_offset[r]; }, int64_t{step} * kStep,
          p.dim, g_granule);
      ETile::template fill<kThreads>(
          stage + GTile::kBytes, static_cast<const T*>(p.embedding),
          [&](int r) {
            return first_column + r < p.vocab ? (first_column + r) * p.embedding_stride : int64_t{-1};
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
      // Matrices 0, 1: ids {4p, 4p+1} of sixteen, two halves of K; matrices 2, 3: ids {4p+2, 4p+3}.
      const int e_row = warp_column + lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
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

#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = first_row + warp_row + m * 16 + h * 8 + group;
      if (n >= p.n) continue;
      const UpdateRow row = load_update_row(p, n);
#pragma unroll
      for (int f = 0; f < kFragmentsN; f += 2) {
        const float product[4] = {accumulator[m][f][2 * h], accumulator[m][f][2 * h + 1],
                                  accumulator[m][f + 1][2 * h], accumulator[m][f + 1][2 * h + 1]};
        update_four<Z>(p, scalars, row, first_column + warp_column + f * 8 + 4 * pair, product);
      }
    }
  }
}

template <typename Z, typename T, int kM, int kN, int kWarpsM, int kStages>
cudaError_t launch(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kBytes =
      kStages * kStep * (kM + kN) * static_cast<int>(sizeof(T)) + kM * static_cast<int>(sizeof(int64_t));
  if (plan.stages != kStages || plan.shared_bytes != kBytes) return cudaErrorInvalidValue;
  const auto kernel = logit_update_sm80_kernel<Z, T, kM, kN, kWarpsM, kStages>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(plan.grid), kThreads, kBytes, stream>>>(
      p, UpdateScalars(p), copy_granule(p.grad, p.grad_stride, sizeof(T)),
      copy_granule(p.embedding, p.embedding_stride, sizeof(T)));
  return cudaGetLastError();
}

template <typename Z, typename T>
cudaError_t choose_tile(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.block_m == 16 && plan.block_n == 256) return launch<Z, T, 16, 256, 1, 4>(p, plan, stream);
  if (plan.block_m == 64 && plan.block_n == 128) return launch<Z, T, 64, 128, 2, 4>(p, plan, stream);
  if (plan.block_m == 128 && plan.block_n == 128) return launch<Z, T, 128, 128, 2, 4>(p, plan, stream);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t choose_logits(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  switch (p.logits_dtype) {
    case DType::kBFloat16:
      return choose_tile<__nv_bfloat16, T>(p, plan, stream);
    case DType::kFloat16:
      return choose_tile<__half, T>(p, plan, stream);
    case DType::kFloat32:
      return choose_tile<float, T>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t logit_update_sm80(const LogitUpdateParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.threads != kThreads || plan.block_k != kStep) return cudaErrorInvalidValue;
  return p.embedding_dtype == DType::kBFloat16 ? choose_logits<__nv_bfloat16>(p, plan, stream)
                                               : choose_logits<__half>(p, plan, stream);
}

}  // namespace entrgi
