// Logit update for fp32 E and many rows: G E^T by the caller's fp32 product, then the epilogue of every
// update.
//
//   for each chunk of ids   products [N, ids] = G E[ids]^T, G the gathered rows      (the caller's)
//                           the gradient of those ids, stored or applied in place   (this kernel)
//
// Layouts  workspace: inner and G (GatheredGrad), products [N, block_n]. z [N, V] bf16 / fp16 / fp32, moments
//          fp32.
//
// Floor    of this kernel: the products, z and the moments read, what the rule changes written: 4 bytes of a
//          logit more than logit_update_simt.cu moves, and the product writes them before.
//
// Tiling   2,048 ids of one row per CTA, two vectors of every matrix in flight for each thread.
//
// Considered: see relaxed_embedding_matmul.cu.
#include "../detail/launch.h"
#include "../detail/matmul_chunk.h"
#include "logit_update.cuh"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace logit_update_tiles;

constexpr int kThreads = MatmulChunk::kThreads, kQuads = MatmulChunk::kIds / 4 / kThreads;

template <typename Z>
__global__ void __launch_bounds__(kThreads)
    logit_update_matmul_kernel(const LogitUpdateParams p, const UpdateScalars scalars, const float* products,
                               int64_t pitch, const MatmulChunk chunk) {
  const UpdateRow row = load_update_row(p, blockIdx.x / chunk.ctas);
  const int64_t begin = int64_t{blockIdx.x % chunk.ctas} * MatmulChunk::kIds + threadIdx.x * 4;
  const auto columns = [&](int quad) {
    const int64_t id = begin + quad * 4 * kThreads;
    return columns_at(p, scalars, id < chunk.ids ? chunk.first + id : p.vocab);  // past the end: none
  };
  FourLogits<Z> logits[kQuads];
  FourBits<float> product[kQuads] = {};
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (row.padding) continue;
    logits[i].load(p, row.n, columns(i));
    columns(i).load(product[i], products + row.n * pitch - chunk.first);
  }
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    logits[i].apply(p, scalars, row, columns(i),
                    {product[i][0], product[i][1], product[i][2], product[i][3]});
  }
}

}  // namespace

cudaError_t logit_update_matmul(const LogitUpdateParams& p, const Plan& plan, Gemm gemm,
                                cudaStream_t stream) {
  if (plan.block_n < 1 || plan.block_n % 4 != 0 || gemm == nullptr) return cudaErrorInvalidValue;
  char* workspace = static_cast<char*>(p.workspace);
  float* grad = reinterpret_cast<float*>(workspace + GatheredGrad::offset(p.n));
  float* products = reinterpret_cast<float*>(workspace + GatheredGrad::end(p.n, p.dim, sizeof(float)));
  const auto kernel = choose([&]<typename Z>() { return &compiled<logit_update_matmul_kernel<Z>>; },
                             any_type(p.logits.dtype));
  for (int64_t first = 0; first < p.vocab; first += plan.block_n) {
    const MatmulChunk chunk = MatmulChunk::at(first, p.vocab, plan);
    float* embedding = static_cast<float*>(p.embedding.data) + first * p.embedding.stride;
    gemm({.a = {grad, GatheredGrad::pitch(p.dim)},
          .b = {embedding, p.embedding.stride},
          .c = {products, plan.block_n},
          .m = p.n,
          .n = chunk.ids,
          .k = p.dim,
          .b_transposed = true,
          .accumulate = false},
         stream);
    const cudaError_t error = launch(kernel, {p.n * chunk.ctas, kThreads}, stream, p, UpdateScalars(p),
                                     products, int64_t{plan.block_n}, chunk);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace entrgi
