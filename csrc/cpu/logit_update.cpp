// Operator 3: dReward/dz = q (G E^T - G . soft) / tau, written out or applied as an Adam or SGD ascent step.
//
// The vocabulary is cut into stretches that threads work on independently: G E^T of a stretch and a block of
// rows in a scratch that stays in cache (2 N V d FLOPs in all), then one pass over z and the moments. Bytes:
// E once, z and each moment once each way. No reduction over the vocabulary: a row's bits depend neither on
// the number of threads nor on the other rows.
#include <cmath>
#include <cstring>

#include "relaxation.h"

namespace entrgi::cpu {
namespace {

// G of the active rows in acc, dense, and G . soft of each.
class Incoming {
 public:
  Incoming(const LogitUpdateParams& r, const std::vector<int64_t>& rows, const Parallel& parallel)
      : packed_(operand(r, static_cast<int64_t>(rows.size()), r.dim)), dots_(rows.size()) {
    const RowKernels& kernels = row_kernels(r.grad.dtype);
    const Range pack = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.to_accumulator(r.grad.at(target_row(r, rows[i])), r.dim, packed_.matrix().at(i));
        const void *g = packed_.matrix().at(i), *soft = r.soft.at(rows[i]);
        double dot = 0;
        for (int64_t k = 0; k < r.dim; ++k) dot += read(g, k, r.soft.dtype) * read(soft, k, r.soft.dtype);
        dots_[i] = dot;
      }
    };
    parallel.run(static_cast<int64_t>(rows.size()), r.dim, pack);
  }
  Matrix matrix() const { return packed_.matrix(); }
  double dot(int64_t i) const { return dots_[i]; }

 private:
  Scratch packed_;
  std::vector<double> dots_;
};

// Calls apply(logits row, first id, length, logsumexp, G . soft, inner products) for every stretch of active
// rows.
template <class Apply>
void for_stretches(const LogitUpdateParams& r, const Parallel& parallel, const Gemm& gemm,
                   const Apply& apply) {
  const std::vector<int64_t> rows = active_rows(r);
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return;
  const DType acc = accumulator_of(r.logits.dtype);
  const Incoming incoming(r, rows, parallel);
  const int64_t stretch = stretch_of(r, r.dim, 1024);
  const int64_t stretches = (r.vocab + stretch - 1) / stretch, blocks = row_blocks(count);
  const bool wide = size_of(r.embedding.dtype) > 2;
  const int64_t block_rows = std::min(count, kRowBlock + kMinRows);
  const int64_t cost = block_rows * stretch * std::max<int64_t>(1, r.dim / 16);

  parallel.run(stretches * blocks, cost, [&](int64_t begin, int64_t end) {
    const Scratch inner(padded_rows(r, block_rows), stretch, acc);
    const Scratch table(wide ? 0 : stretch, r.dim, acc);
    Matrix e;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t block = piece % blocks, id = piece / blocks * stretch,
                    n = std::min(stretch, r.vocab - id);
      if (block == 0 || piece == begin) e = table_rows(r, id, n, {0, r.dim}, table.matrix());
      const Span span = row_block(count, block);
      const Matrix g{incoming.matrix().at(span.begin), r.dim, acc};
      gemm({g, e, inner.matrix(), padded_rows(r, span.size()), n, r.dim, /*b_transposed=*/true,
            /*accumulate=*/false});
      for (int64_t i = span.begin; i < span.end; ++i) {
        apply(rows[i], id, n, read(r.logsumexp, rows[i], acc), incoming.dot(i),
              inner.matrix().at(i - span.begin));
      }
    }
  });
}

void write_gradient(const LogitUpdateParams& p, const Parallel& parallel, const Gemm& gemm) {
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  const Matrix& out = p.gradient;
  for (int64_t n = 0; n < p.n; ++n) {
    if (target_row(p, n) < 0) std::memset(out.at(n), 0, p.vocab * size_of(out.dtype));
  }
  for_stretches(p, parallel, gemm,
                [&](int64_t row, int64_t id, int64_t n, double logsumexp, double dot, void* inner) {
                  kernels.gradient(p.logits.at(row, id), n, p.temperature, logsumexp, dot, inner);
                  std::memcpy(out.at(row, id), inner, n * size_of(out.dtype));
                });
}

void adam_step(const LogitUpdateParams& p, const Parallel& parallel, const Gemm& gemm) {
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  const double step = static_cast<double>(p.step);
  const AdamFactors factors{p.beta1,
                            p.beta2,
                            1 - p.beta1,
                            1 - p.beta2,
                            1 / (1 - std::pow(p.beta1, step)),
                            1 / (1 - std::pow(p.beta2, step)),
                            p.lr,
                            p.eps,
                            p.step == 1,
                            p.last};
  const auto moment = [](const Matrix& m, int64_t row, int64_t id) -> void* {
    return m.data == nullptr ? nullptr : m.at(row, id);
  };
  for_stretches(p, parallel, gemm,
                [&](int64_t row, int64_t id, int64_t n, double logsumexp, double dot, void* inner) {
                  kernels.adam(p.logits.at(row, id), n, p.temperature, logsumexp, dot, inner,
                               moment(p.exp_avg, row, id), moment(p.exp_avg_sq, row, id), factors);
                });
}

void sgd_step(const LogitUpdateParams& p, const Parallel& parallel, const Gemm& gemm) {
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  for_stretches(p, parallel, gemm,
                [&](int64_t row, int64_t id, int64_t n, double logsumexp, double dot, void* inner) {
                  kernels.sgd(p.logits.at(row, id), n, p.temperature, logsumexp, dot, inner, p.lr);
                });
}

}  // namespace

void logit_update(const LogitUpdateParams& p, const Parallel& parallel, const Gemm& gemm) {
  switch (p.rule) {
    case UpdateRule::kGradient:
      return write_gradient(p, parallel, gemm);
    case UpdateRule::kAdam:
      return adam_step(p, parallel, gemm);
    case UpdateRule::kSgd:
      return sgd_step(p, parallel, gemm);
  }
}

}  // namespace entrgi::cpu
