// One plan for each family of operators; make_plan and requests_of dispatch.
#pragma once

#include "plan.h"

namespace entrgi {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

Plan plan_vocab_pass(Op op, const Shape& shape, const Device& device, const PlanOverrides& overrides);
Plan plan_relaxed_embedding(const Shape& shape, const Device& device, const PlanOverrides& overrides);
Plan plan_logit_update(Op op, const Shape& shape, const Device& device, const PlanOverrides& overrides);
Plan plan_fixed(Op op, const Shape& shape);

// fp32 E from so many rows on is torch's matrix product over chunks of block_n ids. workspace_bytes is that
// of a chunk alone.
constexpr int64_t kMatmulRows = 128;
Plan plan_matmul(Kernel kernel, const Shape& shape, const PlanOverrides& overrides);

Requests vocab_pass_requests(Op op, const Shape& shape, const Plan& plan);
Requests relaxed_embedding_requests(const Shape& shape, const Plan& plan);
Requests logit_update_requests(Op op, const Shape& shape, const Plan& plan, int64_t step, bool last);
Requests fixed_requests(Op op, const Shape& shape, const Plan& plan);

}  // namespace entrgi
