// What relaxed_embedding.cpp and logit_update.cpp share: which rows take part, and the reward model's table
// in stretches of the vocabulary, converted to acc where it is stored in 16 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "accumulator.h"
#include "row_kernels.h"

namespace entrgi::cpu {

// q = e^(z / tau - logsumexp) is NaN where both are infinite, which z / tau beyond the range of acc makes
// them.
inline void check_logsumexp(const void* logsumexp, int64_t row, DType acc) {
  const double value = read(logsumexp, row, acc);
  if (!std::isfinite(value)) {
    throw std::runtime_error("logsumexp must be finite, got " + std::to_string(value) + " at " +
                             std::to_string(row) + ": logits / temperature must stay finite in " +
                             (acc == DType::kFloat64 ? "float64" : "float32"));
  }
}

// Logits rows that are not padding, in order.
inline std::vector<int64_t> active_rows(const RelaxationParams& r) {
  std::vector<int64_t> rows;
  rows.reserve(r.n);
  for (int64_t n = 0; n < r.n; ++n) {
    if (r.row_index != nullptr) {
      const int64_t target = r.row_index[n];
      if (target < -1 || target >= r.target_rows) {
        throw std::runtime_error("row_index must be -1 or in [0, " + std::to_string(r.target_rows) +
                                 "), got " + std::to_string(target) + " at " + std::to_string(n));
      }
      if (target < 0) continue;
    }
    check_logsumexp(r.logsumexp, n, accumulator_of(r.logits.dtype));
    rows.push_back(n);
  }
  return rows;
}

inline int64_t target_row(const RelaxationParams& r, int64_t n) {
  return r.row_index == nullptr ? n : r.row_index[n];
}

// Rows go to the caller's matrix product in blocks of kMinRows ... kRowBlock + kMinRows - 1: a BLAS sums in
// one order for few rows, in another for very many (MKL: below k / 24 or 16 rows, and from 192 on), and what
// a row gives should not depend on the rows beside it.
constexpr int64_t kMinRows = 16, kRowBlock = 160;
// Fewer rows get rows of zeros beside them at low temperatures alone. There q is one-hot, the gradient of
// such a row nothing but what rounding leaves of zero, and Adam makes that as large as any other. Elsewhere
// last bits stay last bits, and a single row would take two to three times as long.
constexpr double kSharp = 1.0 / 16;

inline int64_t row_blocks(int64_t rows) {
  return std::max<int64_t>(1, (rows + kRowBlock - kMinRows) / kRowBlock);
}

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Span row_block(int64_t rows, int64_t block) {
  return {block * kRowBlock, block + 1 == row_blocks(rows) ? rows : (block + 1) * kRowBlock};
}

inline int64_t padded_rows(const RelaxationParams& r, int64_t rows) {
  return r.temperature < kSharp ? std::max(rows, kMinRows) : rows;
}

// `rows` rows of scratch for a product, those beyond them zero.
inline Scratch operand(const RelaxationParams& r, int64_t rows, int64_t columns) {
  const DType acc = accumulator_of(r.logits.dtype);
  const int64_t padded = padded_rows(r, rows);
  Scratch scratch(padded, columns, acc);
  if (rows < padded && columns > 0) {
    std::memset(scratch.matrix().at(rows), 0, (padded - rows) * columns * size_of(acc));
  }
  return scratch;
}

// Ids of the vocabulary worked on at a time, at most `most`: where a 16-bit table is converted, `columns` of
// it should stay in the second- and third-level cache.
inline int64_t stretch_of(const RelaxationParams& r, int64_t columns, int64_t most) {
  constexpr int64_t kScratchElements = int64_t{1} << 20;
  const int64_t ids = kScratchElements / (size_of(r.embedding.dtype) == 2 ? columns : 1);
  return std::min(r.vocab, std::clamp<int64_t>(ids / 64 * 64, 256, most));
}

// Some columns of rows [id, id + n) of the table in acc: the table itself, or `scratch` filled from it.
inline Matrix table_rows(const RelaxationParams& r, int64_t id, int64_t n, const Span& columns,
                         const Matrix& scratch) {
  const Matrix& table = r.embedding;
  if (size_of(table.dtype) > 2) return {table.at(id, columns.begin), table.stride, table.dtype};
  const RowKernels& kernels = row_kernels(table.dtype);
  for (int64_t i = 0; i < n; ++i) {
    kernels.to_accumulator(table.at(id + i, columns.begin), columns.size(), scratch.at(i));
  }
  return scratch;
}

}  // namespace entrgi::cpu
