// Launch plans forced from outside, for experiments: the environment variable ENTRGI_FORCE_PLAN.
//
//     ENTRGI_FORCE_PLAN="relaxed_embedding:kernel=relaxed_embedding_sm80,splits=4;sample_tokens:cluster_n=8"
//
// Operators by their names, fields those of PlanOverrides. It is read once per process. Nothing in it is
// passed over: an unknown operator, field or kernel, a number below 1 or no number, and whatever make_plan
// cannot serve is an error that says so; only splits, where a kernel has them, are limited to what the shape
// allows. The CPU operators have no launch plan and do not read it.
#pragma once

#include <map>
#include <string>

#include "plan.h"

namespace entrgi {

using ForcedPlans = std::map<Op, PlanOverrides>;

// Throws std::invalid_argument naming the piece that cannot be understood and what is expected there.
ForcedPlans parse_forced_plans(const std::string& text);

// Those of the environment, parsed once; where that throws, it throws at every call.
const ForcedPlans& forced_plans();

// make_plan with what the environment forces for the operator, field by field, where `given` leaves a choice.
// Throws std::invalid_argument as make_plan and forced_plans do.
Plan make_forced_plan(Op op, const Shape& shape, const Device& device, const PlanOverrides& given = {});

}  // namespace entrgi
