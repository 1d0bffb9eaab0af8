// Every launcher of the CUDA kernels. Their parameters: csrc/params.h.
//
// Nothing is allocated, nothing synchronises, every launch can be captured in a CUDA graph, and results do
// not depend on scheduling. `workspace` is 16-byte aligned scratch of plan.workspace_bytes, whose contents
// need not survive and need no initialisation. A launch error is returned; an unknown plan and float64 give
// cudaErrorInvalidValue.
#pragma once

#include <driver_types.h>

#include "params.h"
#include "plan.h"

namespace entrgi {

// The current device. It is asked once; later calls remember.
cudaError_t current_device(Device* device);

// Loads every kernel on the current device and sets its attributes, which its first launch does otherwise:
// before a graph is captured, or where the first call must not be the slow one.
cudaError_t warm_up();

// The caller's product of fp32 matrices, which the kernels called matmul use: this layer links no BLAS. It
// queues the product on the stream, allocates and waits as little as the launchers do, and throws where it
// fails.
using Gemm = void (*)(const MatrixProduct& product, cudaStream_t stream);

cudaError_t logit_statistics(const LogitStatisticsParams& params, const Plan& plan, cudaStream_t stream);
cudaError_t sample_tokens(const SampleTokensParams& params, const Plan& plan, cudaStream_t stream);
cudaError_t gumbel_perturb(const GumbelPerturbParams& params, const Plan& plan, cudaStream_t stream);
cudaError_t logit_statistics_backward(const LogitStatisticsBackwardParams& params, const Plan& plan,
                                      cudaStream_t stream);
cudaError_t relaxed_embedding(const RelaxedEmbeddingParams& params, const Plan& plan, Gemm gemm,
                              cudaStream_t stream);
cudaError_t logit_update(const LogitUpdateParams& params, const Plan& plan, Gemm gemm, cudaStream_t stream);
cudaError_t commit(const CommitParams& params, const Plan& plan, cudaStream_t stream);

inline bool rows_aligned(const Matrix& matrix) {
  return rows_aligned(matrix.data, matrix.stride, matrix.dtype);
}

// The shape that the plan of a launch is made for.
inline Shape shape_of(const LogitsParams& p) {
  return {p.n, p.vocab, 1, 0, p.logits.dtype, p.logits.dtype, rows_aligned(p.logits)};
}
inline Shape shape_of(const RelaxationParams& p) {
  return {p.n,
          p.vocab,
          p.dim,
          0,
          p.logits.dtype,
          p.embedding.dtype,
          rows_aligned(p.logits),
          rows_aligned(p.embedding)};
}
inline Shape shape_of(const LogitUpdateParams& p) {
  Shape shape = shape_of(static_cast<const RelaxationParams&>(p));
  for (const Matrix* m : {&p.gradient, &p.exp_avg, &p.exp_avg_sq}) {
    shape.logits_aligned = shape.logits_aligned && (m->data == nullptr || rows_aligned(*m));
  }
  return shape;
}
inline Shape shape_of(const CommitParams& p) {
  return {p.n, 1, 1, p.trajectories, DType::kFloat32, DType::kFloat32};
}

}  // namespace entrgi
