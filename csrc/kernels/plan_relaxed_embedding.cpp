// Launch plan of the relaxed embedding.
#include <algorithm>

#include "plan_operators.h"

namespace entrgi {

Plan plan_relaxed_embedding(const Shape& s, const Device& device, const PlanOverrides& overrides) {
  Plan plan{};
  if (s.embedding == DType::kFloat32) {
    plan = s.n <= 16   ? Plan{Kernel::kRelaxedEmbeddingSimt, 16, 256, 16, 2, 256}
           : s.n <= 64 ? Plan{Kernel::kRelaxedEmbeddingSimt, 64, 128, 16, 2, 256}
                       : Plan{Kernel::kRelaxedEmbeddingSimt, 128, 128, 16, 2, 256};
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
  const int64_t splits = overrides.splits;
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

Requests relaxed_embedding_requests(const Shape&, const Plan&) {
  return {};
}

}  // namespace entrgi
