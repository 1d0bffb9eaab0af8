// The operators on the CPU: raw pointers, sizes and strides (csrc/params.h); no torch.
//
// Threads and matrix products are passed in (`Parallel`, `Gemm`), so that one pool and one BLAS serve the
// whole process. Every reduction has a fixed order: a row's bits do not depend on the number of threads, as
// long as the caller's matrix product keeps the order of its sums for a given shape (it stays on its thread),
// and relaxation.h says how far they depend on the other rows. Errors in the data (a NaN row, an id out of
// range) throw std::runtime_error.
#pragma once

#include <cstdint>
#include <functional>

#include "params.h"

namespace entrgi::cpu {

using Range = std::function<void(int64_t begin, int64_t end)>;

// run(count, cost, f) calls f on ranges that partition [0, count), on up to `threads` threads, and returns
// when all are done; an exception in f reaches the caller. `cost`: of one item, in elements read with an
// exponential each. Little work should stay on one thread.
struct Parallel {
  int threads = 1;
  std::function<void(int64_t count, int64_t cost, const Range&)> run;
};

// The caller's matrix product. Called from inside Parallel::run; it must stay on its thread.
using Gemm = std::function<void(const MatrixProduct&)>;

void logit_statistics(const LogitStatisticsParams& p, const Parallel& parallel);
void sample_tokens(const SampleTokensParams& p, const Parallel& parallel);
void gumbel_perturb(const GumbelPerturbParams& p, const Parallel& parallel);
void logit_statistics_backward(const LogitStatisticsBackwardParams& p, const Parallel& parallel);
void relaxed_embedding(const RelaxedEmbeddingParams& p, const Parallel& parallel, const Gemm& gemm);
void logit_update(const LogitUpdateParams& p, const Parallel& parallel, const Gemm& gemm);
void commit(const CommitParams& p);

}  // namespace entrgi::cpu
