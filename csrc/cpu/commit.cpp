// Operator 4: of each trajectory's candidates, the counts[p] most confident are written into its tokens.
//
// Ranked by confidence, the earlier row first among equals; NaN and (where the rule is on) EOS rank as -inf;
// with alg_temp > 0 by confidence / alg_temp + Gumbel noise, which draws without replacement. Token -1 is
// never committed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "philox.h"

namespace entrgi::cpu {
namespace {

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error(message);
}

// Everything is checked before anything is written.
void check_data(const CommitParams& c) {
  for (int64_t p = 0; p < c.trajectories; ++p) {
    if (c.splits[p] < 0 || c.splits[p] > c.splits[p + 1] || c.splits[p + 1] > c.n) {
      fail("splits must not decrease and stay within [0, " + std::to_string(c.n) + "], got " +
           std::to_string(c.splits[p]) + " and " + std::to_string(c.splits[p + 1]) + " for trajectory " +
           std::to_string(p));
    }
    if (c.counts[p] < 0) {
      fail("counts must be >= 0, got " + std::to_string(c.counts[p]) + " for trajectory " +
           std::to_string(p));
    }
    for (int64_t n = c.splits[p]; n < c.splits[p + 1]; ++n) {
      if (c.positions[n] < 0 || c.positions[n] >= c.length) {
        fail("positions must be in [0, " + std::to_string(c.length) + "), got " +
             std::to_string(c.positions[n]) + " at " + std::to_string(n));
      }
      if (c.candidates[n] < -1) {
        fail("candidates must be -1 or a token id, got " + std::to_string(c.candidates[n]) + " at " +
             std::to_string(n));
      }
    }
  }
}

template <class F>
F score_of(const CommitParams& c, const F* confidence, int64_t n) {
  constexpr F kLast = -std::numeric_limits<F>::infinity();
  const bool is_eos = c.has_eos && c.candidates[n] == c.eos_token_id;
  F score = is_eos ? kLast : confidence[n];
  if (c.alg_temp > 0) {
    const PhiloxWords words = philox(PhiloxKey(c.keys + 4 * n), 0);
    score = score / static_cast<F>(c.alg_temp) + static_cast<F>(gumbel(words.low, words.high));
  }
  return std::isnan(score) ? kLast : score;  // after the division: 0 / 0 where alg_temp underflows
}

template <class F>
void commit_by(const CommitParams& c, const F* confidence) {
  std::vector<F> scores(c.n);
  std::vector<int64_t> ranked;
  for (int64_t p = 0; p < c.trajectories; ++p) {
    ranked.clear();
    for (int64_t n = c.splits[p]; n < c.splits[p + 1]; ++n) {
      if (c.candidates[n] < 0) continue;
      scores[n] = score_of(c, confidence, n);
      ranked.push_back(n);
    }
    const auto before = [&](int64_t a, int64_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
    const int64_t n_best = std::min<int64_t>(c.counts[p], static_cast<int64_t>(ranked.size()));
    std::partial_sort(ranked.begin(), ranked.begin() + n_best, ranked.end(), before);
    for (int64_t i = 0; i < n_best; ++i) {
      const int64_t n = ranked[i];
      c.tokens[p * c.tokens_stride + c.positions[n]] = c.candidates[n];
      c.committed[n] = true;
    }
  }
}

}  // namespace

void commit(const CommitParams& c) {
  check_data(c);
  std::fill(c.committed, c.committed + c.n, false);
  if (c.confidence_dtype == DType::kFloat64) {
    commit_by(c, static_cast<const double*>(c.confidence));
  } else {
    commit_by(c, static_cast<const float*>(c.confidence));
  }
}

}  // namespace entrgi::cpu
