// Every launcher of the CUDA kernels and its parameters. The formulas are those of entrgi_ext/reference.py.
//
// Rules for all of them: pointers are device memory; strides are in elements, of rows whose last dimension is
// contiguous; vectors are dense. Nothing is allocated, nothing synchronises, every launch can be captured in
// a CUDA graph, and results do not depend on scheduling. What is written overlaps nothing else that is passed
// (the operators check it: csrc/ops/checks.h). `workspace` is 16-byte aligned scratch of
// plan.workspace_bytes, whose contents need not survive and need no initialisation. N = 0 is fine.
// A launch error is returned; an unknown plan gives cudaErrorInvalidValue.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "plan.h"

namespace entrgi {

// The current device. It is asked once; later calls remember.
cudaError_t current_device(Device* device);

// Loads every kernel on the current device and sets its attributes, which its first launch does otherwise:
// before a graph is captured, or where the first call must not be the slow one.
cudaError_t warm_up();

// Rows with NaN, +inf or nothing finite: statistics NaN, argmax -1.
struct LogitStatisticsParams {
  const void* logits;  // [N, V]
  DType logits_dtype;
  int64_t n, vocab, logits_stride;
  double temperature;
  float* logsumexp;         // [N] of z / temperature
  float* entropy;           // [N] nats, of softmax(z)
  float* tempered_entropy;  // [N] nats, of softmax(z / temperature)
  int64_t* argmax;          // [N]
  void* workspace;
};
cudaError_t logit_statistics(const LogitStatisticsParams& params, const Plan& plan, cudaStream_t stream);

struct SampleTokensParams : LogitStatisticsParams {
  const int64_t* keys;  // [N, 4] dense: seed, step, iteration, position
  double top_p;
  int64_t top_k;                 // 0: off
  const bool* forbidden;         // [V] or null; or as a list:
  const int32_t* forbidden_ids;  // null where num_forbidden is 0; in any order, ids outside [0, V) do nothing
  int64_t num_forbidden;
  int32_t* error_flag;  // or null; |= 1 bad row, |= 2 nothing to draw
  int64_t* token;       // [N]
  float* probability;   // [N]
  float* margin;        // [N]
  float* filtered_entropy;
};
cudaError_t sample_tokens(const SampleTokensParams& params, const Plan& plan, cudaStream_t stream);

// Elementwise: NaN, +inf and -inf stay what they are.
struct GumbelPerturbParams {
  const void* logits;  // [N, V]
  DType logits_dtype;
  int64_t n, vocab, logits_stride;
  const int64_t* keys;  // [N, 4] dense, as above
  double scale;
  float* output;  // [N, V]
  int64_t output_stride;
  void* workspace;  // none is used
};
cudaError_t gumbel_perturb(const GumbelPerturbParams& params, const Plan& plan, cudaStream_t stream);

struct LogitStatisticsBackwardParams {
  const float* grad_logsumexp;         // [N] or null
  const float* grad_entropy;           // [N] or null
  const float* grad_tempered_entropy;  // [N] or null
  const void* logits;
  DType logits_dtype;
  int64_t n, vocab, logits_stride;
  const float *logsumexp, *unit_logsumexp, *entropy, *tempered_entropy;  // [N]
  double temperature;
  void* gradient;   // [N, V] dense, in the logits' dtype
  void* workspace;  // none is used
};
cudaError_t logit_statistics_backward(const LogitStatisticsBackwardParams& params, const Plan& plan,
                                      cudaStream_t stream);

// c [m, n] = a [m, k] b, plus c itself where `accumulate`; b is [k, n], or [n, k] where `b_transposed`. All
// fp32.
struct Fp32Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t m, n, k;
  bool b_transposed, accumulate;
};
// The caller's matrix product, which the kernels called matmul use: this layer links no BLAS. It queues the
// product on the stream, allocates and waits as little as the launchers do, and throws where it fails.
using Fp32Gemm = void (*)(const Fp32Product& product, cudaStream_t stream);

struct RelaxedEmbeddingParams {
  const void* logits;  // [N, V]
  DType logits_dtype;
  int64_t n, vocab, logits_stride;
  const float* logsumexp;  // [N] of z / temperature
  const void* embedding;   // [V, d]
  DType embedding_dtype;
  int64_t dim, embedding_stride;
  double temperature;
  const int64_t* hard_tokens;  // [N] or null: the expectation
  const float* weight;         // [N] or null: 1
  // [N] or null: identity. Outside [0, R): padding; nothing of it is written. Its logits must be memory of
  // the matrix, whatever they hold: they may be read with their neighbours', and count for nothing.
  const int64_t* rows;
  int64_t num_output_rows;  // R
  void* output;             // [R, d] in the embedding's dtype
  int64_t output_stride;
  float* soft;  // [N, d]
  int64_t soft_stride;
  void* workspace;
};
cudaError_t relaxed_embedding(const RelaxedEmbeddingParams& params, const Plan& plan, Fp32Gemm gemm,
                              cudaStream_t stream);

enum class UpdateRule { kGradient, kAdam, kSgd };

struct LogitUpdateParams {
  UpdateRule rule;
  void* logits;  // [N, V]; written by kAdam and kSgd
  DType logits_dtype;
  int64_t n, vocab, logits_stride;
  const float* logsumexp;  // [N]
  const void* grad;        // [R, d] in the embedding's dtype
  int64_t num_grad_rows;   // R
  int64_t grad_stride;
  const void* embedding;  // [V, d]
  DType embedding_dtype;
  int64_t dim, embedding_stride;
  const float* soft;  // [N, d]
  int64_t soft_stride;
  const int64_t* rows;  // as above; the gradient of a padding row is 0
  double temperature;
  float* gradient;  // [N, V], kGradient
  int64_t gradient_stride;
  float* exp_avg;     // [N, V], kAdam; may be null where step == 1 and last
  float* exp_avg_sq;  // likewise
  int64_t exp_avg_stride, exp_avg_sq_stride;
  double lr, beta1, beta2, eps;
  int64_t step;  // from 1; step 1 does not read the moments
  bool last;     // does not write them
  void* workspace;
};
// Shape::logits_aligned of an update: of every [N, V] matrix, where it is there.
inline bool rows_aligned(const LogitUpdateParams& p) {
  const auto absent_or_aligned = [](const float* base, int64_t stride) {
    return base == nullptr || rows_aligned(base, stride, DType::kFloat32);
  };
  return rows_aligned(p.logits, p.logits_stride, p.logits_dtype) &&
         absent_or_aligned(p.gradient, p.gradient_stride) && absent_or_aligned(p.exp_avg, p.exp_avg_stride) &&
         absent_or_aligned(p.exp_avg_sq, p.exp_avg_sq_stride);
}
cudaError_t logit_update(const LogitUpdateParams& params, const Plan& plan, Fp32Gemm gemm,
                         cudaStream_t stream);

struct CommitParams {
  int64_t* tokens;  // [P, S]
  int64_t trajectories, length, tokens_stride;
  bool* committed;            // [N], all of it written
  const int64_t* candidates;  // [N]; -1 is never committed
  const float* confidence;    // [N]
  const int64_t* positions;   // [N] column in tokens
  int64_t n;
  const int64_t* splits;  // [P + 1]
  const int64_t* counts;  // [P]
  const int64_t* keys;    // [N, 4] dense or null; needed where alg_temp > 0
  bool has_eos;
  int64_t eos_token_id;
  double alg_temp;
  void* workspace;
};
cudaError_t commit(const CommitParams& params, const Plan& plan, cudaStream_t stream);

}  // namespace entrgi
