#include "plan.h"

#include <algorithm>

namespace entrgi {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// One CTA per row is enough to fill the device from about half a row per SM on; below, V is cut into parts of
// at least one 16-byte load per thread.
constexpr int kVocabThreads = 512;
constexpr int64_t kMinVocabSplit = kVocabThreads * 8;

Plan plan_vocab_pass(const Shape& s, const Device& device, int64_t splits) {
  Plan plan{};
  plan.kernel = Kernel::kVocabPass;
  plan.threads = kVocabThreads;
  int64_t wanted = splits;
  if (wanted <= 0)
    wanted = 2 * s.n >= device.num_sms ? 1 : ceil_div(4 * device.num_sms, std::max<int64_t>(s.n, 1));
  const int64_t most = splits > 0 ? ceil_div(s.vocab, 8) : ceil_div(s.vocab, kMinVocabSplit);
  plan.splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, kVocabThreads));
  plan.grid = s.n * plan.splits;
  plan.workspace_bytes = plan.splits > 1 ? plan.grid * kPartialStateBytes : 0;
  return plan;
}

Plan plan_relaxed_embedding(const Shape& s, const Device& device, int64_t splits) {
  Plan plan{};
  if (s.embedding == DType::kFloat32) {
    plan = {Kernel::kRelaxedEmbeddingSimt, 64, 64, 16, 1, 256};
  } else if (s.n <= 16) {
    plan = {Kernel::kRelaxedEmbeddingSm80, 16, 256, 32, 4, 128};
  } else if (s.n <= 64) {
    plan = {Kernel::kRelaxedEmbeddingSm80, 64, 128, 32, 4, 128};
  } else {
    plan = {Kernel::kRelaxedEmbeddingSm80, 128, 128, 32, 3, 128};
  }
  if (plan.kernel == Kernel::kRelaxedEmbeddingSm80) {
    plan.shared_bytes = plan.stages * plan.block_k *
                            (plan.block_m * size_of(s.logits) + plan.block_n * size_of(s.embedding)) +
                        plan.block_m * static_cast<int64_t>(sizeof(int64_t));
  }
  const int64_t tiles = ceil_div(s.n, plan.block_m) * ceil_div(s.dim, plan.block_n);
  const int64_t steps = ceil_div(s.vocab, plan.block_k);
  // Two CTAs per SM; a split of fewer than 8 steps of the reduction would be all prologue.
  int64_t wanted = splits > 0
                       ? std::min(splits, steps)
                       : std::min((2 * device.num_sms) / std::max<int64_t>(tiles, 1), ceil_div(steps, 8));
  wanted = std::max<int64_t>(wanted, 1);
  const int64_t per_split = ceil_div(steps, wanted);
  plan.splits = ceil_div(steps, per_split);  // none is empty
  plan.grid = tiles * plan.splits;
  plan.workspace_bytes = plan.splits * s.n * pitch_of(s.dim) * static_cast<int64_t>(sizeof(float));
  return plan;
}

Plan plan_logit_update(const Shape& s) {
  Plan plan{};
  if (s.embedding == DType::kFloat32) {
    plan = {Kernel::kLogitUpdateSimt, 64, 64, 16, 1, 256};
  } else if (s.n <= 16) {
    plan = {Kernel::kLogitUpdateSm80, 16, 256, 32, 4, 128};
  } else if (s.n <= 64) {
    plan = {Kernel::kLogitUpdateSm80, 64, 128, 32, 4, 128};
  } else {
    plan = {Kernel::kLogitUpdateSm80, 128, 128, 32, 4, 128};
  }
  if (plan.kernel == Kernel::kLogitUpdateSm80) {
    const int64_t ring = plan.stages * plan.block_k * (plan.block_m + plan.block_n) * size_of(s.embedding) +
                         plan.block_m * static_cast<int64_t>(sizeof(int64_t));
    const int64_t products = plan.block_m * (plan.block_n + 8) * static_cast<int64_t>(sizeof(float));
    plan.shared_bytes = std::max(ring, products);
  }
  plan.splits = 1;
  plan.grid = ceil_div(s.n, plan.block_m) * ceil_div(s.vocab, plan.block_n);
  plan.workspace_bytes = s.n * static_cast<int64_t>(sizeof(float));  // G . e_soft
  return plan;
}

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat32:
      return "float32";
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
    case Kernel::kVocabPass:
      return "vocab_pass";
    case Kernel::kStatisticsBackward:
      return "statistics_backward";
    case Kernel::kGumbelPerturb:
      return "gumbel_perturb";
    case Kernel::kRelaxedEmbeddingSm80:
      return "relaxed_embedding_sm80";
    case Kernel::kRelaxedEmbeddingSimt:
      return "relaxed_embedding_simt";
    case Kernel::kLogitUpdateSm80:
      return "logit_update_sm80";
    case Kernel::kLogitUpdateSimt:
      return "logit_update_simt";
    case Kernel::kCommit:
      return "commit";
  }
  return "";
}

Plan make_plan(Op op, const Shape& s, const Device& device, int64_t splits) {
  Plan plan{};
  switch (op) {
    case Op::kLogitStatistics:
    case Op::kSampleTokens:
      return plan_vocab_pass(s, device, splits);
    case Op::kLogitStatisticsBackward:
      plan.kernel = Kernel::kStatisticsBackward;
      plan.threads = 256;
      plan.block_n = 2048;
      plan.splits = 1;
      plan.grid = s.n * ceil_div(s.vocab, plan.block_n);
      return plan;
    case Op::kGumbelPerturb:
      plan.kernel = Kernel::kGumbelPerturb;
      plan.threads = 256;
      plan.block_n = 2048;
      plan.splits = 1;
      // Tiles start at a 16-byte boundary of the result, up to three ids before the row.
      plan.grid = s.n * ceil_div(s.vocab + 3, plan.block_n);
      return plan;
    case Op::kRelaxedEmbedding:
      return plan_relaxed_embedding(s, device, splits);
    case Op::kLogitGradient:
    case Op::kAdamStep:
    case Op::kSgdStep:
      return plan_logit_update(s);
    case Op::kCommit:
      plan.kernel = Kernel::kCommit;
      plan.threads = 256;
      plan.splits = 1;
      plan.grid = std::max<int64_t>(s.trajectories, 1);
      plan.workspace_bytes = s.n * static_cast<int64_t>(sizeof(float));
      return plan;
  }
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

}  // namespace entrgi
