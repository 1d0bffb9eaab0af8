// The operators on the CPU: raw pointers, sizes and strides (in elements); no torch.
//
// What is written overlaps nothing else that is passed: csrc/ops/checks.h sees to it.
//
// Threads and matrix products are passed in (`Parallel`, `Gemm`), so that one pool and one BLAS serve the
// whole process. Every reduction has a fixed order: a row's bits do not depend on the number of threads, as
// long as the caller's matrix product keeps the order of its sums for a given shape (it stays on its thread),
// and relaxation.h says how far they depend on the other rows. Errors in the data (a NaN row, an id out of
// range) throw std::runtime_error.
//
// "acc" is float, and double where the logits are double: statistics, soft embeddings, moments and all
// arithmetic.
#pragma once

#include <cstdint>
#include <functional>

namespace entrgi::cpu {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat64 };

inline int64_t size_of(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
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

using Range = std::function<void(int64_t begin, int64_t end)>;

// run(count, cost, f) calls f on ranges that partition [0, count), on up to `threads` threads, and returns
// when all are done; an exception in f reaches the caller. `cost`: of one item, in elements read with an
// exponential each. Little work should stay on one thread.
struct Parallel {
  int threads = 1;
  std::function<void(int64_t count, int64_t cost, const Range&)> run;
};

// c [m, n] = a [m, k] b, plus c itself where `accumulate`; b is [k, n], or [n, k] where `b_transposed`.
// Float or double. Called from inside Parallel::run; it must stay on its thread.
struct GemmProblem {
  Matrix a, b, c;
  int64_t m, n, k;
  bool b_transposed, accumulate;
};
using Gemm = std::function<void(const GemmProblem&)>;

// ---- the vocabulary pass: statistics.cpp, sample.cpp; noise: gumbel_perturb.cpp ---------------------------

struct Statistics {  // acc [N] each, argmax int64 [N]
  void *logsumexp, *entropy, *tempered_entropy;
  int64_t* argmax;
};

struct Sample {  // acc [N] each, token int64 [N]
  int64_t* token;
  void *probability, *margin, *filtered_entropy;
};

struct SampleOptions {
  double temperature = 1.0;
  double top_p = 1.0;
  int64_t top_k = 0;                       // 0: off
  const uint8_t* forbidden = nullptr;      // [V] or null
  const int32_t* forbidden_ids = nullptr;  // or null: the ids themselves, num_forbidden of them
  int64_t num_forbidden = 0;
  const int64_t* keys = nullptr;  // [N, 4]: seed, step, iteration, position
};

void logit_statistics(const Matrix& logits, int64_t rows, int64_t vocabulary, double temperature,
                      const Statistics& out, const Parallel& parallel);

void sample_tokens(const Matrix& logits, int64_t rows, int64_t vocabulary, const SampleOptions& options,
                   const Statistics& statistics, const Sample& out, const Parallel& parallel);

// out [N, V] acc = z + scale * g, g the standard Gumbel noise of (key of the row, id).
void gumbel_perturb(const Matrix& logits, int64_t rows, int64_t vocabulary, const int64_t* keys, double scale,
                    const Matrix& out, const Parallel& parallel);

struct StatisticsGradients {  // acc [N] each; null: zero
  const void *logsumexp, *entropy, *tempered_entropy;
};

struct StatisticsValues {  // acc [N] each
  const void *logsumexp, *unit_logsumexp, *entropy, *tempered_entropy;
};

void logit_statistics_backward(const Matrix& logits, int64_t rows, int64_t vocabulary, double temperature,
                               const StatisticsGradients& grads, const StatisticsValues& values,
                               const Matrix& out, const Parallel& parallel);

// ---- relaxed embedding and logit update: relaxed_embedding.cpp, logit_update.cpp --------------------------

// What both share: q = softmax(logits / temperature) from its logsumexp, and the reward model's table.
struct Relaxation {
  Matrix logits;  // [N, V]
  int64_t rows = 0, vocabulary = 0, width = 0;
  double temperature = 1.0;
  const void* logsumexp = nullptr;     // acc [N]
  Matrix embedding;                    // [V, d]
  Matrix soft;                         // acc [N, d]: q E, written by relaxed_embedding, read by the update
  const int64_t* row_index = nullptr;  // [N] row of the output / gradient, -1: padding; null: identity
  int64_t target_rows = 0;             // R: rows of the output / gradient
};

// output[row_index[n]] = (1 - w) q E + w E[hard]; hard null: q E; weight null: w = 1.
void relaxed_embedding(const Relaxation& r, const Matrix& output, const int64_t* hard_tokens,
                       const void* weight, const Parallel& parallel, const Gemm& gemm);

// out [N, V] acc = q (G E^T - G . soft) / temperature; 0 in padding rows.
void logit_gradient(const Relaxation& r, const Matrix& grad, const Matrix& out, const Parallel& parallel,
                    const Gemm& gemm);

struct Adam {
  Matrix exp_avg, exp_avg_sq;  // acc [N, V]; data null only where neither is read nor written
  double lr, beta1, beta2, eps;
  int64_t step;  // counts from 1; 1 does not read the moments
  bool last;     // does not write them
};

void adam_step(const Relaxation& r, const Matrix& grad, const Adam& adam, const Parallel& parallel,
               const Gemm& gemm);
void sgd_step(const Relaxation& r, const Matrix& grad, double lr, const Parallel& parallel, const Gemm& gemm);

// ---- commit: commit.cpp -----------------------------------------------------------------------------------

struct Commit {
  Matrix tokens;  // int64 [P, S]; stride in elements, dtype unused
  int64_t trajectories, length, rows;
  uint8_t* committed;         // [N]
  const int64_t* candidates;  // [N]
  const void* confidence;     // [N] float or double
  bool confidence_is_double;
  const int64_t *positions, *splits, *counts, *keys;  // [N], [P + 1], [P], [N, 4] or null
  const int64_t* eos_token_id;                        // null: no rule
  double alg_temp;
};

void commit(const Commit& c);

}  // namespace entrgi::cpu
