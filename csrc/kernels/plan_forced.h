// Launch plans forced from outside, for experiments; entrgi_ext/plans.py, which reads and checks them, says
// how.
#pragma once

#include <map>
#include <string>

#include "plan.h"

namespace entrgi {

struct ForcedPlans {
  std::map<Op, PlanOverrides> plans;
  std::string refusal;  // of what could not be understood: every plan throws it; empty where all could
};

// In place of what was forced before, for every plan of this process from now on.
void force_plans(ForcedPlans forced);
ForcedPlans forced_plans();

// make_plan with what is forced for the operator, field by field, where `given` leaves a choice. Throws
// std::invalid_argument as make_plan does, and the refusal.
Plan make_forced_plan(Op op, const Shape& shape, const Device& device, const PlanOverrides& given = {});

}  // namespace entrgi
