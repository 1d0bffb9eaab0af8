// What the passes over whole rows (statistics.cpp, sample.cpp, gumbel_perturb.cpp) share: rows cut into
// chunks, and their statistics.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "accumulator.h"
#include "row_kernels.h"

namespace entrgi::cpu {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline int64_t chunks_of(int64_t vocabulary) {
  return (vocabulary + kChunk - 1) / kChunk;
}

// Runs f(chunk, first id, length) for all chunks of a row: one after the other, or on all threads when there
// are too few rows to go round. Chunks, and with them every result, are the same either way.
class ChunkLoop {
 public:
  ChunkLoop(int64_t vocabulary, const Parallel* parallel) : vocabulary_(vocabulary), parallel_(parallel) {}

  int64_t vocabulary() const { return vocabulary_; }
  int64_t count() const { return chunks_of(vocabulary_); }
  bool is_parallel() const { return parallel_ != nullptr; }

  template <class Body>
  void operator()(const Body& body) const {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        body(c, c * kChunk, std::min(kChunk, vocabulary_ - c * kChunk));
      }
    };
    if (parallel_ != nullptr) {
      parallel_->run(count(), kChunk, run);
    } else {
      run(0, count());
    }
  }

 private:
  int64_t vocabulary_;
  const Parallel* parallel_;
};

// Runs f(row, loop) for all rows: whole rows on each thread, or every row on all threads.
template <class Body>
void for_rows(int64_t rows, int64_t vocabulary, const Parallel& parallel, const Body& body) {
  const bool split_rows = parallel.threads > 1 && rows < 4 * parallel.threads && chunks_of(vocabulary) >= 8;
  if (split_rows) {
    const ChunkLoop loop(vocabulary, &parallel);
    for (int64_t row = 0; row < rows; ++row) body(row, loop);
    return;
  }
  const Range run = [&](int64_t begin, int64_t end) {
    const ChunkLoop loop(vocabulary, nullptr);
    for (int64_t row = begin; row < end; ++row) body(row, loop);
  };
  parallel.run(rows, vocabulary, run);
}

struct RowStatistics {
  double logsumexp = kNaN, entropy = kNaN, tempered_entropy = kNaN;
  double max = -kInfinity;
  int64_t argmax = -1;  // also: the row is invalid

  void write_to(const LogitStatisticsParams& out, int64_t row) const {
    const DType acc = accumulator_of(out.logits.dtype);
    write(out.logsumexp, row, logsumexp, acc);
    write(out.entropy, row, entropy, acc);
    write(out.tempered_entropy, row, tempered_entropy, acc);
    out.argmax[row] = argmax;
  }
};

RowStatistics row_statistics(const LogitStatisticsParams& p, int64_t row, const ChunkLoop& loop);

// Raises for the first row whose status is not 0.
void raise_bad_rows(const std::vector<uint8_t>& status);
constexpr uint8_t kInvalidRow = 1, kNothingAllowed = 2;

}  // namespace entrgi::cpu
