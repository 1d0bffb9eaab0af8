// What relaxed_embedding.cpp and logit_update.cpp share: which rows take part, and the reward model's table
// in stretches of the vocabulary, converted to acc where it is stored in 16 bits.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "accumulator.h"
#include "row_kernels.h"

namespace entrgi::cpu {

// Logits rows that are not padding, in order.
inline std::vector<int64_t> active_rows(const Relaxation& r) {
  std::vector<int64_t> rows;
  rows.reserve(r.rows);
  for (int64_t n = 0; n < r.rows; ++n) {
    if (r.row_index != nullptr) {
      const int64_t target = r.row_index[n];
      if (target < -1 || target >= r.target_rows) {
        throw std::runtime_error("rows must be -1 or in [0, " + std::to_string(r.target_rows) + "), got " +
                                 std::to_string(target) + " at " + std::to_string(n));
      }
      if (target < 0) continue;
    }
    rows.push_back(n);
  }
  return rows;
}

inline int64_t target_row(const Relaxation& r, int64_t n) {
  return r.row_index == nullptr ? n : r.row_index[n];
}

// Ids of the vocabulary worked on at a time: the stretch of [rows, ids] scratch and, where the table is
// converted, of the table itself should stay in the second- and third-level cache.
inline int64_t stretch_of(const Relaxation& r, int64_t rows) {
  constexpr int64_t kScratchElements = int64_t{1} << 20;
  const int64_t row_elements = std::max<int64_t>(rows, 1);
  const int64_t table_elements = size_of(r.embedding.dtype) == 2 ? std::max<int64_t>(r.width, 1) : 1;
  const int64_t ids = kScratchElements / std::max(row_elements, table_elements);
  return std::min(r.vocabulary, std::clamp<int64_t>(ids / 64 * 64, 256, 2048));
}

// Rows [id, id + n) of the table in acc: the table itself, or `scratch` filled from it.
inline Matrix table_rows(const Relaxation& r, int64_t id, int64_t n, const Matrix& scratch,
                         const Parallel* parallel) {
  const Matrix& table = r.embedding;
  if (size_of(table.dtype) > 2) return {table.at(id), table.stride, table.dtype};
  const RowKernels& kernels = row_kernels(table.dtype);
  const Range convert = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.to_accumulator(table.at(id + i), r.width, scratch.at(i));
  };
  if (parallel != nullptr) {
    parallel->run(n, r.width, convert);
  } else {
    convert(0, n);
  }
  return scratch;
}

}  // namespace entrgi::cpu
