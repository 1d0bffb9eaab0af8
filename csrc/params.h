// The parameters of every operator, as the CPU and the CUDA kernels take them. The formulas are those of
// entrgi_ext/reference.py.
//
// Pointers are memory of the backend's device, strides are in elements, vectors are dense. What is written
// overlaps nothing else that is passed (csrc/ops/checks.h sees to it), and N = 0 is fine.
//
// "acc" is the dtype of statistics, soft embeddings, moments and all arithmetic: float, and double where the
// logits are double, which only the CPU takes. Memory in acc stands behind void pointers.
#pragma once

#include <cstdint>

namespace entrgi {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Rows `stride` elements apart, the last dimension dense.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;

  char* at(int64_t row, int64_t column = 0) const {
    return static_cast<char*>(data) + (row * stride + column) * size_of(dtype);
  }
};

// c [m, n] = a [m, k] b, plus c itself where `accumulate`; b is [k, n], or [n, k] where `b_transposed`. Float
// or, on the CPU, double.
struct MatrixProduct {
  Matrix a, b, c;
  int64_t m, n, k;
  bool b_transposed, accumulate;
};

// What all operators on logits begin with.
struct LogitsParams {
  Matrix logits;  // [N, V]; written by the steps
  int64_t n, vocab;
  void* workspace;  // CUDA: 16-byte aligned scratch of the plan's size, contents arbitrary
};

// Rows with NaN, +inf or nothing finite: statistics NaN, argmax -1.
struct LogitStatisticsParams : LogitsParams {
  double temperature;
  void* logsumexp;         // acc [N] of z / temperature
  void* entropy;           // acc [N] nats, of softmax(z)
  void* tempered_entropy;  // acc [N] nats, of softmax(z / temperature)
  int64_t* argmax;         // [N]
};

struct SampleTokensParams : LogitStatisticsParams {
  const int64_t* keys;  // [N, 4] dense: seed, step, iteration, position
  double top_p;
  int64_t top_k;                 // 0: off
  const bool* forbidden;         // [V] or null; or as a list:
  const int32_t* forbidden_ids;  // null where num_forbidden is 0; in any order
  int64_t num_forbidden;
  int32_t* error_flag;     // CUDA, or null; |= 1 bad row, |= 2 nothing to draw
  int64_t* token;          // [N]
  void* probability;       // acc [N]
  void* margin;            // acc [N]
  void* filtered_entropy;  // acc [N]
};

// Elementwise: NaN, +inf and -inf stay what they are.
struct GumbelPerturbParams : LogitsParams {
  const int64_t* keys;  // [N, 4] dense, as above
  double scale;
  Matrix output;  // acc [N, V]
};

struct LogitStatisticsBackwardParams : LogitsParams {
  const void *grad_logsumexp, *grad_entropy, *grad_tempered_entropy;    // acc [N]; null: zero
  const void *logsumexp, *unit_logsumexp, *entropy, *tempered_entropy;  // acc [N]
  double temperature;
  void* gradient;  // [N, V] dense, in the logits' dtype
};

// What the relaxed embedding and the update of the logits share: q = softmax(z / temperature), made from its
// logsumexp, and the reward model's table.
struct RelaxationParams : LogitsParams {
  const void* logsumexp;  // acc [N] of z / temperature
  Matrix embedding;       // [V, d]
  int64_t dim;
  double temperature;
  Matrix soft;  // acc [N, d]: q E, written by the embedding, read by the update
  // [N] row of the output / gradient, or null: identity. -1 (CUDA: any outside [0, R)): padding; nothing of
  // it is written, and its gradient is 0. Its logits must be memory of the matrix, whatever they hold: they
  // may be read with their neighbours', and count for nothing.
  const int64_t* row_index;
  int64_t target_rows;  // R
};

struct RelaxedEmbeddingParams : RelaxationParams {
  const int64_t* hard_tokens;  // [N] or null: the expectation
  const void* weight;          // acc [N] or null: 1
  Matrix output;               // [R, d] in the embedding's dtype
};

enum class UpdateRule { kGradient, kAdam, kSgd };

struct LogitUpdateParams : RelaxationParams {
  UpdateRule rule;
  Matrix grad;                 // [R, d] in the embedding's dtype
  Matrix gradient;             // acc [N, V], kGradient
  Matrix exp_avg, exp_avg_sq;  // acc [N, V], kAdam; data may be null where step == 1 and last
  double lr, beta1, beta2, eps;
  int64_t step;  // from 1; step 1 does not read the moments
  bool last;     // does not write them
};

struct CommitParams {
  int64_t* tokens;  // [P, S]
  int64_t trajectories, length, tokens_stride;
  bool* committed;            // [N], all of it written
  const int64_t* candidates;  // [N]; -1 is never committed
  const void* confidence;     // [N]
  DType confidence_dtype;     // float, or on the CPU double
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

}  // namespace entrgi
