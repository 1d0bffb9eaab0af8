// Names, the dispatch to the plan of each family of operators, and the floors.
#include <stdexcept>

#include "plan_operators.h"

namespace entrgi {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
  }
  return "";
}

const char* name_of(Op op) {
  switch (op) {
    case Op::kLogitStatistics:
      return "logit_statistics";
    case Op::kLogitStatisticsBackward:
      return "logit_statistics_backward";
    case Op::kSampleTokens:
      return "sample_tokens";
    case Op::kGumbelPerturb:
      return "gumbel_perturb";
    case Op::kRelaxedEmbedding:
      return "relaxed_embedding";
    case Op::kLogitGradient:
      return "logit_gradient";
    case Op::kAdamStep:
      return "adam_step_";
    case Op::kSgdStep:
      return "sgd_step_";
    case Op::kCommit:
      return "commit_";
  }
  return "";
}

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kVocabPassSm90:
      return "vocab_pass_sm90";
    case Kernel::kVocabPass:
      return "vocab_pass";
    case Kernel::kStatisticsBackward:
      return "statistics_backward";
    case Kernel::kGumbelPerturb:
      return "gumbel_perturb";
    case Kernel::kRelaxedEmbeddingSm90:
      return "relaxed_embedding_sm90";
    case Kernel::kRelaxedEmbeddingSm80:
      return "relaxed_embedding_sm80";
    case Kernel::kRelaxedEmbeddingSimt:
      return "relaxed_embedding_simt";
    case Kernel::kRelaxedEmbeddingMatmul:
      return "relaxed_embedding_matmul";
    case Kernel::kLogitUpdateSm90:
      return "logit_update_sm90";
    case Kernel::kLogitUpdateSm80:
      return "logit_update_sm80";
    case Kernel::kLogitUpdateSimt:
      return "logit_update_simt";
    case Kernel::kLogitUpdateMatmul:
      return "logit_update_matmul";
    case Kernel::kCommit:
      return "commit";
  }
  return "";
}

Device typical_device(int arch, int num_sms) {
  if (arch < 90) return {arch, num_sms};
  const int in_groups = num_sms >= 33 ? num_sms / 33 * 32 : num_sms;
  return {arch, num_sms, num_sms / 2, in_groups / 4, in_groups / 8};
}

namespace {

Plan plan_of(Op op, const Shape& s, const Device& device, const PlanOverrides& overrides) {
  switch (op) {
    case Op::kLogitStatistics:
    case Op::kSampleTokens:
      return plan_vocab_pass(op, s, device, overrides);
    case Op::kRelaxedEmbedding:
      return plan_relaxed_embedding(s, device, overrides);
    case Op::kLogitGradient:
    case Op::kAdamStep:
    case Op::kSgdStep:
      return plan_logit_update(op, s, device, overrides);
    case Op::kLogitStatisticsBackward:
    case Op::kGumbelPerturb:
    case Op::kCommit:
      return plan_fixed(op, s);
  }
  return {};
}

std::string text(int64_t value) {
  return std::to_string(value);
}
const std::string& text(const std::string& value) {
  return value;
}

// Whether a kernel cuts the vocabulary into parts or, logit_update_sm90, has a grid of any size.
bool has_splits(Kernel kernel) {
  switch (kernel) {
    case Kernel::kVocabPass:
    case Kernel::kRelaxedEmbeddingSm90:
    case Kernel::kRelaxedEmbeddingSm80:
    case Kernel::kRelaxedEmbeddingSimt:
    case Kernel::kLogitUpdateSm90:
      return true;
    default:
      return false;
  }
}

// What an operator's plan did not take up, it has no choice of. Splits may be fewer than asked for.
void check_taken_up(Op op, const Plan& plan, const PlanOverrides& overrides) {
  const int64_t splits = has_splits(plan.kernel) ? overrides.splits : plan.splits;
  const PlanOverrides taken{name_of(plan.kernel), splits,      plan.block_m,   plan.block_n,
                            plan.block_k,         plan.stages, plan.cluster_m, plan.cluster_n};
  const auto compare = [&](const char* field, const auto& asked, const auto& own) {
    if (asked == std::decay_t<decltype(asked)>{} || asked == own) return;
    throw std::invalid_argument(std::string(field) + " must be " + text(own) + " in " + name_of(plan.kernel) +
                                " for " + name_of(op) + " of this shape, got " + text(asked));
  };
  visit_fields(compare, overrides, taken);
}

}  // namespace

Plan make_plan(Op op, const Shape& shape, const Device& device, const PlanOverrides& overrides) {
  const Plan plan = plan_of(op, shape, device, overrides);
  check_taken_up(op, plan, overrides);
  return plan;
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
