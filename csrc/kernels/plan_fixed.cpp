// Launch plans of the operators that leave nothing to choose: one kernel, one tile, one CTA per tile.
#include <algorithm>

#include "plan_operators.h"

namespace entrgi {
namespace {

constexpr int kThreads = 256, kIdsPerBlock = 2048;

}  // namespace

Plan plan_fixed(Op op, const Shape& s) {
  Plan plan{};
  plan.threads = kThreads;
  switch (op) {
    case Op::kLogitStatisticsBackward:
      plan.kernel = Kernel::kStatisticsBackward;
      plan.block_n = kIdsPerBlock;
      plan.grid = s.n * ceil_div(s.vocab, kIdsPerBlock);
      break;
    case Op::kGumbelPerturb:
      plan.kernel = Kernel::kGumbelPerturb;
      plan.block_n = kIdsPerBlock;
      // Tiles start at a 16-byte boundary of the result, up to three ids before the row.
      plan.grid = s.n * ceil_div(s.vocab + 3, kIdsPerBlock);
      break;
    default:
      plan.kernel = Kernel::kCommit;
      plan.grid = std::max<int64_t>(s.trajectories, 1);
      plan.workspace_bytes = s.n * static_cast<int64_t>(sizeof(float));
  }
  return plan;
}

Requests fixed_requests(Op op, const Shape& s, const Plan& plan) {
  const int64_t logits = s.n * s.vocab * size_of(s.logits);
  const int64_t scores = s.n * s.vocab * static_cast<int64_t>(sizeof(float));
  switch (op) {
    case Op::kLogitStatisticsBackward:  // three gradients and four statistics of the row, by every thread
      return {logits + plan.grid * plan.threads * 7 * 4, 0, logits, 0};
    case Op::kGumbelPerturb: {  // the row's key, 20 bytes, by every thread that has ids
      const int64_t last = std::min<int64_t>(ceil_div(s.vocab % kIdsPerBlock, 4), kThreads);
      const int64_t threads = s.n * (s.vocab / kIdsPerBlock * kThreads + last);
      return {logits + threads * 20, 0, scores, 0};
    }
    default:
      return {};
  }
}

}  // namespace entrgi
