// Launch plan of the logit update: gradient, Adam and SGD.
#include <algorithm>

#include "plan_operators.h"

namespace entrgi {

Plan plan_logit_update(Op, const Shape& s, const Device&, const PlanOverrides&) {
  Plan plan{};
  if (s.embedding == DType::kFloat32) {
    plan = s.n <= 16   ? Plan{Kernel::kLogitUpdateSimt, 16, 256, 16, 2, 256}
           : s.n <= 64 ? Plan{Kernel::kLogitUpdateSimt, 64, 128, 16, 2, 256}
                       : Plan{Kernel::kLogitUpdateSimt, 128, 128, 16, 2, 256};
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

Requests logit_update_requests(Op, const Shape&, const Plan&, int64_t, bool) {
  return {};
}

}  // namespace entrgi
