// The dispatch to the plan of each family of operators, and the floors.
#include "plan.h"

#include <algorithm>

#include "plan_families.h"

namespace entrgi {
namespace {

// Operators that leave nothing to choose: one kernel, one tile, one CTA per tile.
Plan plan_fixed(Op op, const Shape& s, const PlanOverrides& asked) {
  Plan plan{Kernel::kCommit};
  plan.threads = kElementwise.threads;
  if (op == Op::kCommit) {
    plan.grid = std::max<int64_t>(s.trajectories, 1);
    plan.workspace_bytes = s.n * static_cast<int64_t>(sizeof(float));
  } else {
    // Tiles of gumbel_perturb start at a 16-byte boundary of the result, up to three ids before the row.
    const bool perturb = op == Op::kGumbelPerturb;
    plan.kernel = perturb ? Kernel::kGumbelPerturb : Kernel::kStatisticsBackward;
    plan.block_n = kElementwise.block_n;
    plan.grid = s.n * ceil_div(s.vocab + (perturb ? 3 : 0), plan.block_n);
  }
  choose_kernel({plan.kernel}, asked, name_of(op));
  std::vector<Plan> candidates = {plan};
  narrow(candidates, asked);
  return plan;
}

// Of the operators that leave nothing to choose: gradient and statistics of a row, or its key, by every
// thread that has ids. commit_ has none: its rows per trajectory are data.
Requests fixed_requests(Op op, const Shape& s, const Plan& plan) {
  const int64_t logits = s.n * s.vocab * size_of(s.logits);
  if (op == Op::kCommit) return {};
  if (op == Op::kLogitStatisticsBackward) return {logits + plan.grid * plan.threads * 7 * 4, 0, logits, 0};
  const int64_t last = std::min<int64_t>(ceil_div(s.vocab % plan.block_n, 4), plan.threads);
  const int64_t threads = s.n * (s.vocab / plan.block_n * plan.threads + last);
  return {logits + threads * 20, 0, s.n * s.vocab * 4, 0};
}

}  // namespace

Device typical_device(int arch, int num_sms) {
  if (arch < 90) return {arch, num_sms};
  const int in_groups = num_sms >= 33 ? num_sms / 33 * 32 : num_sms;
  return {arch, num_sms, num_sms / 2, in_groups / 4, in_groups / 8};
}

Plan make_plan(Op op, const Shape& s, const Device& device, const PlanOverrides& asked) {
  switch (op) {
    case Op::kLogitStatistics:
    case Op::kSampleTokens:
      return plan_vocab_pass(op, s, device, asked);
    case Op::kRelaxedEmbedding:
      return plan_relaxed_embedding(s, device, asked);
    case Op::kLogitGradient:
    case Op::kAdamStep:
    case Op::kSgdStep:
      return plan_logit_update(s, device, asked);
    case Op::kLogitStatisticsBackward:
    case Op::kGumbelPerturb:
    case Op::kCommit:
      return plan_fixed(op, s, asked);
  }
  return {};
}

Floor floor_of(Op op, const Shape& s, int64_t step, bool last) {
  const int64_t logits = s.n * s.vocab * size_of(s.logits);
  const int64_t scores = s.n * s.vocab * static_cast<int64_t>(sizeof(float));
  const int64_t table = s.vocab * s.dim * size_of(s.embedding);
  const int64_t flops = 2 * s.n * s.vocab * s.dim;
  // logsumexp, grad [N, d] and soft [N, d] read
  const int64_t inputs = 4 * s.n + s.n * s.dim * (size_of(s.embedding) + 4);
  switch (op) {
    case Op::kLogitStatistics:
      return {logits + s.n * (3 * 4 + 8), 0};
    case Op::kSampleTokens:
      return {logits + s.n * (6 * 4 + 2 * 8 + 4 * 8), 0};
    case Op::kGumbelPerturb:
      return {logits + scores + s.n * 4 * 8, 0};
    case Op::kLogitStatisticsBackward:
      return {2 * logits + s.n * 7 * 4, 0};
    case Op::kRelaxedEmbedding:  // + hard rows read, token and weight, output and soft written
      return {logits + table + 2 * s.n * s.dim * size_of(s.embedding) + 4 * s.n * s.dim + 16 * s.n, flops};
    case Op::kLogitGradient:
      return {logits + table + inputs + scores, flops};
    case Op::kSgdStep:
      return {2 * logits + table + inputs, flops};
    case Op::kAdamStep:
      return {2 * logits + table + inputs + scores * ((step > 1 ? 2 : 0) + (last ? 0 : 2)), flops};
    case Op::kCommit:
      return {s.n * (3 * 8 + 4 + 1) + s.trajectories * 16, 0};
  }
  return {};
}

Requests requests_of(Op op, const Shape& s, const Plan& plan, int64_t step, bool last) {
  switch (op) {
    case Op::kLogitStatistics:
    case Op::kSampleTokens:
      return vocab_pass_requests(op, s, plan);
    case Op::kRelaxedEmbedding:
      return relaxed_embedding_requests(s, plan);
    case Op::kLogitGradient:
    case Op::kAdamStep:
    case Op::kSgdStep:
      return logit_update_requests(op, s, plan, step, last);
    case Op::kLogitStatisticsBackward:
    case Op::kGumbelPerturb:
    case Op::kCommit:
      return fixed_requests(op, s, plan);
  }
  return {};
}

}  // namespace entrgi
