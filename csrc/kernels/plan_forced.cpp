#include "plan_forced.h"

#include <atomic>
#include <mutex>
#include <stdexcept>

namespace entrgi {
namespace {

std::atomic<bool> any{false};  // the ordinary case asks for no lock
std::mutex mutex;
ForcedPlans current;

}  // namespace

void force_plans(ForcedPlans forced) {
  const std::lock_guard<std::mutex> lock(mutex);
  current = std::move(forced);
  any = !current.plans.empty() || !current.refusal.empty();
}

ForcedPlans forced_plans() {
  const std::lock_guard<std::mutex> lock(mutex);
  return current;
}

Plan make_forced_plan(Op op, const Shape& shape, const Device& device, const PlanOverrides& given) {
  if (!any) return make_plan(op, shape, device, given);
  const ForcedPlans all = forced_plans();
  if (!all.refusal.empty()) throw std::invalid_argument(all.refusal);
  const auto forced = all.plans.find(op);
  if (forced == all.plans.end()) return make_plan(op, shape, device, given);
  PlanOverrides merged = given;
  const auto fill = [](const char*, auto& chosen, const auto& base) {
    if (chosen == std::decay_t<decltype(chosen)>{}) chosen = base;
  };
  visit_fields(fill, merged, forced->second);
  try {
    return make_plan(op, shape, device, merged);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(error.what()) +
                                " (ENTRGI_FORCE_PLAN or plans.force forces a plan of " + name_of(op) + ")");
  }
}

}  // namespace entrgi
