// Operator 2: output = (1 - w) q E + w E[x] with q = e^(z / tau - lse), and soft = q E unblended in acc.
//
// The vocabulary is cut into stretches; for each, q [rows, stretch] is made in a scratch that stays in cache
// and multiplied with the same stretch of E (2 N V d FLOPs in all, at the rate of the caller's matrix
// product; z and E are read once). Partial products are added in the order of the stretches. 16-bit tables
// are widened to float first: a 16-bit product would round soft, from which the update subtracts an inner
// product that cancels.
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
      throw std::runtime_error("hard_tokens must be -1 or in [0, " + std::to_string(r.vocabulary) +
                               "), got " + std::to_string(hard_tokens[n]) + " at " + std::to_string(n));
    }
  }
}

// Into how many parts of the vocabulary the sum is cut, each with a partial result of its own: threads then
// work without waiting for each other (with a barrier per stretch: a third slower on two busy cores). Given
// by the shape alone, so that the order of the sum is; bounded so that the partial results stay O(N d). A
// machine with more threads than parts leaves them to the matrix product.
int64_t parts_of(const Relaxation& r, int64_t rows) {
  constexpr int64_t kMaxParts = 16, kMaxElements = int64_t{1} << 23, kMinIds = 512;
  return std::clamp<int64_t>(std::min(kMaxElements / (rows * r.width), r.vocabulary / kMinIds), 1, kMaxParts);
}

// out [rows, d] = q E over the ids [begin, end), stretch by stretch; `parallel` null: on this thread.
// sums [rows] = the sum of q over the same ids.
void expectation(const Relaxation& r, const std::vector<int64_t>& rows, int64_t begin_id, int64_t end_id,
                 const Matrix& out, double* sums, const Parallel* parallel, const Gemm& gemm) {
  const DType acc = accumulator_of(r.logits.dtype);
  const RowKernels& kernels = row_kernels(r.logits.dtype);
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t stretch = std::min(stretch_of(r, count), end_id - begin_id);
  const Scratch q(count, stretch, acc);
  const bool wide = size_of(r.embedding.dtype) > 2;
  const Scratch table(wide ? 0 : stretch, r.width, acc);
  for (int64_t id = begin_id; id < end_id; id += stretch) {
    const int64_t n = std::min(stretch, end_id - id);
    const Range fill = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] += kernels.probabilities(r.logits.at(rows[i], id), n, r.temperature,
                                         read(r.logsumexp, rows[i], acc), q.matrix().at(i));
      }
    };
    if (parallel != nullptr) {
      parallel->run(count, n, fill);
    } else {
      fill(0, count);
    }
    const Matrix e = table_rows(r, id, n, table.matrix(), parallel);
    gemm({q.matrix(), e, out, count, r.width, n, /*b_transposed=*/false, /*accumulate=*/id > begin_id});
  }
}

}  // namespace

void relaxed_embedding(const Relaxation& r, const Matrix& output, const int64_t* hard_tokens,
                       const void* weight, const Parallel& parallel, const Gemm& gemm) {
  const std::vector<int64_t> rows = active_rows(r);
  check_targets_distinct(r, rows);
  check_hard_tokens(r, rows, hard_tokens);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return;

  const DType acc = accumulator_of(r.logits.dtype);
  // Without padding rows the product goes straight where it belongs.
  std::optional<Scratch> packed;
  if (count < r.rows) packed.emplace(count, r.width, acc);
  const Matrix soft = packed ? packed->matrix() : r.soft;
  const int64_t parts = parts_of(r, count);
  std::vector<double> sums(parts * count);  // [parts, rows]; the first row of them becomes the total
  if (parts < parallel.threads) {
    expectation(r, rows, 0, r.vocabulary, soft, sums.data(), &parallel, gemm);
  } else {
    const Scratch partial(parts * count, r.width, acc);
    const int64_t length = (r.vocabulary + parts - 1) / parts;
    parallel.run(parts, count * length * r.width / 16, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const Matrix part{partial.matrix().at(p * count), r.width, acc};
        expectation(r, rows, p * length, std::min(r.vocabulary, (p + 1) * length), part, &sums[p * count],
                    nullptr, gemm);
      }
    });
    const RowKernels& kernels = row_kernels(acc);
    parallel.run(count, parts * r.width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.to_accumulator(partial.matrix().at(i), r.width, soft.at(i));
        for (int64_t p = 1; p < parts; ++p) {
          kernels.add(partial.matrix().at(p * count + i), r.width, soft.at(i));
          sums[i] += sums[p * count + i];
        }
      }
    });
  }

  const RowKernels& table_kernels = row_kernels(r.embedding.dtype);
  parallel.run(count, r.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = rows[i], target = target_row(r, n);
      table_kernels.scale(soft.at(i), r.width, 1.0 / sums[i]);
      if (packed) {
        std::copy_n(soft.at(i), r.width * size_of(acc), r.soft.at(n));
      }
      const bool has_hard = hard_tokens != nullptr, invalid = has_hard && hard_tokens[n] < 0;
      const void* hard = has_hard ? r.embedding.at(invalid ? 0 : hard_tokens[n]) : nullptr;
      const double w = invalid             ? std::numeric_limits<double>::quiet_NaN()
                       : weight == nullptr ? 1.0
                                           : read(weight, n, acc);
      table_kernels.blend(r.soft.at(n), hard, w, r.width, output.at(target));
    }
  });
}

}  // namespace entrgi::cpu
