// Operator 2: output = (1 - w) q E + w E[x] with q = e^(z / tau - lse), and soft = q E unblended in acc.
//
// The vocabulary is cut into stretches; for each, q [rows, stretch] is made in a scratch that stays in cache and
// multiplied with the same stretch of E (2 N V d FLOPs in all, at the rate of the caller's matrix product; z and E are
// read once). Partial products are added in the order of the stretches. 16-bit tables are widened to float first: a
// 16-bit product would round soft, from which the update subtracts an inner product that cancels.
#include <cmath>
#include <limits>

#include "relaxation.h"

namespace entrgi::cpu {
namespace {

void check_targets_distinct(const Relaxation& r, const std::vector<int64_t>& rows) {
  if (r.row_index == nullptr) return;
  std::vector<int64_t> writer(r.target_rows, -1);
  for (const int64_t n : rows) {
    int64_t& first = writer[r.row_index[n]];
    if (first >= 0) {
      throw std::runtime_error("rows must not repeat, got " + std::to_string(r.row_index[n]) + " at " +
                               std::to_string(first) + " and at " + std::to_string(n));
    }
    first = n;
  }
}

void check_hard_tokens(const Relaxation& r, const std::vector<int64_t>& rows, const int64_t* hard_tokens) {
  if (hard_tokens == nullptr) return;
  for (const int64_t n : rows) {
    if (hard_tokens[n] < -1 || hard_tokens[n] >= r.vocabulary) {
      throw std::runtime_error("hard_tokens must be -1 or in [0, " + std::to_string(r.vocabulary) + "), got " +
                               std::to_string(hard_tokens[n]) + " at " + std::to_string(n));
    }
  }
}

}  // namespace

void relaxed_embedding(const Relaxation& r, const Matrix& output, const int64_t* hard_tokens, const void* weight,
                       const Parallel& parallel, const Gemm& gemm) {
  const std::vector<int64_t> rows = active_rows(r);
  check_targets_distinct(r, rows);
  check_hard_tokens(r, rows, hard_tokens);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return;

  const DType acc = accumulator_of(r.logits.dtype);
  const RowKernels& kernels = row_kernels(r.logits.dtype);
  const int64_t stretch = stretch_of(r, count);
  const Scratch q(count, stretch, acc);
  const bool wide = size_of(r.embedding.dtype) > 2;
  const Scratch table(wide ? 0 : stretch, r.width, acc);
  // Without padding rows the product goes straight where it belongs.
  std::optional<Scratch> packed;
  if (count < r.rows) packed.emplace(count, r.width, acc);
  const Matrix soft = packed ? packed->matrix() : r.soft;

  for (int64_t id = 0; id < r.vocabulary; id += stretch) {
    const int64_t n = std::min(stretch, r.vocabulary - id);
    parallel.run(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.probabilities(r.logits.at(rows[i], id), n, r.temperature, read(r.logsumexp, rows[i], acc),
                              q.matrix().at(i));
      }
    });
    const Matrix e = table_rows(r, id, n, table.matrix(), &parallel);
    gemm({q.matrix(), e, soft, count, r.width, n, /*b_transposed=*/false, /*accumulate=*/id > 0});
  }

  const RowKernels& table_kernels = row_kernels(r.embedding.dtype);
  parallel.run(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = rows[i], target = target_row(r, n);
      if (packed) {
        std::copy_n(soft.at(i), r.width * size_of(acc), r.soft.at(n));
      }
      const int64_t token = hard_tokens == nullptr ? 0 : hard_tokens[n];
      const double w = weight == nullptr ? 1.0 : read(weight, n, acc);
      const void* hard = hard_tokens == nullptr || token < 0 ? nullptr : r.embedding.at(token);
      table_kernels.blend(r.soft.at(n), hard, token < 0 ? std::numeric_limits<double>::quiet_NaN() : w, r.width,
                          output.at(target));
    }
  });
}

}  // namespace entrgi::cpu
