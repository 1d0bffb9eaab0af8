// Operator 2: output = (1 - w) q E + w E[x] with q = e^(z / tau - lse), and soft = q E unblended in acc.
//
// The work is cut into pieces of up to kRowBlock rows, a part of the vocabulary and kColumns columns. In a
// piece, q [rows, stretch] of one stretch of ids after the other is made in a scratch that stays in cache and
// multiplied with the same stretch of E (2 N V d FLOPs in all, at the rate of the caller's matrix product).
// Products of a part are added in the order of the stretches, then the parts in their order. 16-bit tables
// are widened to float first: a 16-bit product would round soft, from which the update subtracts an inner
// product that cancels.
//
// V and d alone give the parts and stretches, and every piece is one thread's: a row's bits depend neither on
// the number of threads nor on the other rows.
#include <cmath>
#include <limits>

#include "relaxation.h"

namespace entrgi::cpu {
namespace {

void check_targets_distinct(const RelaxationParams& r, const std::vector<int64_t>& rows) {
  if (r.row_index == nullptr) return;
  std::vector<int64_t> writer(r.target_rows, -1);
  for (const int64_t n : rows) {
    int64_t& first = writer[r.row_index[n]];
    if (first >= 0) {
      throw std::runtime_error("row_index must not repeat, got " + std::to_string(r.row_index[n]) + " at " +
                               std::to_string(first) + " and at " + std::to_string(n));
    }
    first = n;
  }
}

void check_hard_tokens(const RelaxedEmbeddingParams& r, const std::vector<int64_t>& rows) {
  if (r.hard_tokens == nullptr) return;
  for (const int64_t n : rows) {
    if (r.hard_tokens[n] < -1 || r.hard_tokens[n] >= r.vocab) {
      throw std::runtime_error("hard_tokens must be -1 or in [0, " + std::to_string(r.vocab) + "), got " +
                               std::to_string(r.hard_tokens[n]) + " at " + std::to_string(n));
    }
  }
}

// Into how many parts of the vocabulary the sum is cut, each with a partial result of its own: threads then
// work without waiting for each other (with a barrier per stretch: a third slower on two busy cores).
int64_t parts_of(const RelaxationParams& r) {
  constexpr int64_t kMaxParts = 16, kMinIds = 512;
  return std::clamp<int64_t>(r.vocab / kMinIds, 1, kMaxParts);
}

// Columns of a piece: q is made once for each, some percent of what multiplying it costs.
constexpr int64_t kColumns = 2048;

// Blocks of rows whose partial results are held at a time: 128 MB of them in fp32, and E is read once for
// each.
int64_t blocks_at_a_time(const RelaxationParams& r, int64_t parts) {
  constexpr int64_t kMaxElements = int64_t{1} << 25;
  return std::max<int64_t>(1, kMaxElements / (parts * kRowBlock * r.dim));
}

// out [rows, columns] = q E over the ids given, stretch by stretch; sums [rows], where given, = the sum of q
// over them. out has padded_rows(r, count) rows.
void expectation(const RelaxationParams& r, const int64_t* rows, int64_t count, const Span& ids,
                 const Span& columns, const Matrix& out, double* sums, const Gemm& gemm) {
  const DType acc = accumulator_of(r.logits.dtype);
  const RowKernels& kernels = row_kernels(r.logits.dtype);
  const int64_t stretch = std::min(stretch_of(r, columns.size(), 2048), ids.size());
  const Scratch q = operand(r, count, stretch);
  const bool wide = size_of(r.embedding.dtype) > 2;
  const Scratch table(wide ? 0 : stretch, columns.size(), acc);
  for (int64_t id = ids.begin; id < ids.end; id += stretch) {
    const int64_t n = std::min(stretch, ids.end - id);
    for (int64_t i = 0; i < count; ++i) {
      const double sum = kernels.probabilities(r.logits.at(rows[i], id), n, r.temperature,
                                               read(r.logsumexp, rows[i], acc), q.matrix().at(i));
      if (sums != nullptr) sums[i] += sum;
    }
    const Matrix e = table_rows(r, id, n, columns, table.matrix());
    gemm({q.matrix(), e, out, padded_rows(r, count), columns.size(), n, /*b_transposed=*/false,
          /*accumulate=*/id > ids.begin});
  }
}

// What the rows of a call give before the blend: partial products [parts, rows, d] and sums of q [parts,
// rows].
struct Partials {
  Scratch products;
  std::vector<double> sums;
  int64_t rows, parts;

  Partials(int64_t rows_, int64_t parts_, int64_t width, DType acc)
      : products(parts_ * rows_, width, acc), sums(parts_ * rows_), rows(rows_), parts(parts_) {}
  int64_t at(int64_t part, int64_t row) const { return part * rows + row; }
};

Partials partials_of(const RelaxationParams& r, const int64_t* rows, int64_t count, const Parallel& parallel,
                     const Gemm& gemm) {
  const DType acc = accumulator_of(r.logits.dtype);
  const int64_t parts = parts_of(r), length = (r.vocab + parts - 1) / parts;
  const int64_t blocks = row_blocks(count), strips = (r.dim + kColumns - 1) / kColumns;
  Partials partials(padded_rows(r, count), parts, r.dim, acc);
  const int64_t cost = std::min(count, kRowBlock) * length * std::min(r.dim, kColumns) / 16;
  parallel.run(parts * blocks * strips, cost, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t strip = piece % strips, block = piece / strips % blocks, part = piece / strips / blocks;
      const Span ids{part * length, std::min(r.vocab, (part + 1) * length)};
      const Span columns{strip * kColumns, std::min(r.dim, (strip + 1) * kColumns)};
      const Span span = row_block(count, block);
      const int64_t first = partials.at(part, span.begin);
      const Matrix out{partials.products.matrix().at(first, columns.begin), r.dim, acc};
      expectation(r, rows + span.begin, span.size(), ids, columns, out,
                  strip == 0 ? &partials.sums[first] : nullptr, gemm);
    }
  });
  return partials;
}

// The partial results of row i added up in the order of the parts, into soft.
void add_up(const RelaxationParams& r, const Partials& partials, int64_t i, void* soft) {
  const RowKernels& kernels = row_kernels(accumulator_of(r.logits.dtype));
  const Matrix products = partials.products.matrix();
  double sum = partials.sums[partials.at(0, i)];
  kernels.to_accumulator(products.at(partials.at(0, i)), r.dim, soft);
  for (int64_t p = 1; p < partials.parts; ++p) {
    kernels.add(products.at(partials.at(p, i)), r.dim, soft);
    sum += partials.sums[partials.at(p, i)];
  }
  kernels.scale(soft, r.dim, 1.0 / sum);
}

}  // namespace

void relaxed_embedding(const RelaxedEmbeddingParams& r, const Parallel& parallel, const Gemm& gemm) {
  const std::vector<int64_t> rows = active_rows(r);
  check_targets_distinct(r, rows);
  check_hard_tokens(r, rows);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return;

  const DType acc = accumulator_of(r.logits.dtype);
  const RowKernels& table_kernels = row_kernels(r.embedding.dtype);
  const int64_t at_a_time = blocks_at_a_time(r, parts_of(r)) * kRowBlock;
  for (int64_t first = 0; first < count; first += at_a_time) {
    const int64_t some = std::min(at_a_time, count - first);
    const Partials partials = partials_of(r, rows.data() + first, some, parallel, gemm);
    parallel.run(some, partials.parts * r.dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = rows[first + i], target = target_row(r, n);
        add_up(r, partials, i, r.soft.at(n));
        const bool has_hard = r.hard_tokens != nullptr, invalid = has_hard && r.hard_tokens[n] < 0;
        const void* hard = has_hard ? r.embedding.at(invalid ? 0 : r.hard_tokens[n]) : nullptr;
        const double w = invalid               ? std::numeric_limits<double>::quiet_NaN()
                         : r.weight == nullptr ? 1.0
                                               : read(r.weight, n, acc);
        table_kernels.blend(r.soft.at(n), hard, w, r.dim, r.output.at(target));
      }
    });
  }
}

}  // namespace entrgi::cpu
