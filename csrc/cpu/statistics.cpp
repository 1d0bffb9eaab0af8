// Operator 1 without the draw: logsumexp(z / tau), H(softmax z), H(softmax z / tau) and argmax of each row.
//
// Each chunk gives sums relative to its own maximum, in float lanes; chunks are merged in order, in double:
//   s = sum e^x, t = sum x e^x with x = z - m   ->   lse = m + log s,  H = log s - t / s
// (x e^x, not z e^z: the second would cancel.) One read of z from memory, 2 exponentials an element.
#include "relaxation.h"
#include "vocabulary_rows.h"

namespace entrgi::cpu {
namespace {

// Sums relative to a running maximum of the logits themselves: z / tau may overflow where (z - max) / tau
// must not.
class Online {
 public:
  explicit Online(double temperature) : temperature_(temperature) {}

  void add(double chunk_max, double chunk_s, double chunk_t) {
    if (chunk_s == 0) return;  // nothing finite
    if (chunk_max > max_) {
      rescale(s_, t_, max_, chunk_max);
      max_ = chunk_max;
    } else {
      rescale(chunk_s, chunk_t, chunk_max, max_);
    }
    s_ += chunk_s;
    t_ += chunk_t;
  }
  double log_sum() const { return std::log(s_); }
  double entropy() const { return std::log(s_) - t_ / s_; }

 private:
  void rescale(double& s, double& t, double from, double to) const {
    const double x = (from - to) / temperature_, factor = s == 0 ? 0 : std::exp(x);
    t = factor == 0 ? 0 : factor * (t + x * s);
    s = factor * s;
  }

  double temperature_;
  double max_ = -kInfinity, s_ = 0, t_ = 0;
};

}  // namespace

RowStatistics row_statistics(const LogitStatisticsParams& p, int64_t row, const ChunkLoop& loop) {
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  std::vector<ChunkStatistics> chunks(loop.count());
  loop([&](int64_t chunk, int64_t id, int64_t n) {
    kernels.statistics(p.logits.at(row, id), n, p.temperature, chunks[chunk]);
  });

  RowStatistics result;
  Online unit(1.0), tempered(p.temperature);
  double tempered_max = 0;
  int64_t best_chunk = -1;
  for (int64_t c = 0; c < loop.count(); ++c) {
    const ChunkStatistics& chunk = chunks[c];
    if (chunk.invalid) return RowStatistics();
    if (chunk.max > result.max) {
      result.max = chunk.max;
      tempered_max = chunk.tempered_max;
      best_chunk = c;
    }
    unit.add(chunk.max, chunk.unit_s, chunk.unit_t);
    tempered.add(chunk.max, chunk.tempered_s, chunk.tempered_t);
  }
  if (best_chunk < 0) return RowStatistics();  // nothing finite
  result.logsumexp = tempered_max + tempered.log_sum();
  result.entropy = unit.entropy();
  result.tempered_entropy = tempered.entropy();
  const int64_t first = best_chunk * kChunk;
  result.argmax =
      first + kernels.find(p.logits.at(row, first), std::min(kChunk, loop.vocabulary() - first), result.max);
  return result;
}

void raise_bad_rows(const std::vector<uint8_t>& status) {
  for (size_t row = 0; row < status.size(); ++row) {
    if (status[row] == kInvalidRow) {
      throw std::runtime_error(
          "logits must not hold NaN or +inf and must have a finite value in every row, row " +
          std::to_string(row) + " does not");
    }
    if (status[row] == kNothingAllowed) {
      throw std::runtime_error(
          "logits must have a finite value at an id that is not forbidden in every row, row " +
          std::to_string(row) + " has none");
    }
  }
}

void logit_statistics(const LogitStatisticsParams& p, const Parallel& parallel) {
  std::vector<uint8_t> status(p.n, 0);
  for_rows(p.n, p.vocab, parallel, [&](int64_t row, const ChunkLoop& loop) {
    const RowStatistics result = row_statistics(p, row, loop);
    if (result.argmax < 0) status[row] = kInvalidRow;
    result.write_to(p, row);
  });
  raise_bad_rows(status);
}

void logit_statistics_backward(const LogitStatisticsBackwardParams& p, const Parallel& parallel) {
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  const DType acc = accumulator_of(p.logits.dtype);
  const Matrix out{p.gradient, p.vocab, p.logits.dtype};
  const auto grad = [&](const void* array, int64_t row) {
    return array == nullptr ? 0.0 : read(array, row, acc);
  };
  for_rows(p.n, p.vocab, parallel, [&](int64_t row, const ChunkLoop& loop) {
    const double g[] = {grad(p.grad_logsumexp, row), grad(p.grad_entropy, row),
                        grad(p.grad_tempered_entropy, row)};
    if (g[0] != 0 || g[2] != 0) check_logsumexp(p.logsumexp, row, acc);
    const double v[] = {read(p.logsumexp, row, acc), read(p.unit_logsumexp, row, acc),
                        read(p.entropy, row, acc), read(p.tempered_entropy, row, acc)};
    loop([&](int64_t, int64_t id, int64_t n) {
      kernels.statistics_backward(p.logits.at(row, id), n, p.temperature, g, v, out.at(row, id));
    });
  });
}

}  // namespace entrgi::cpu
