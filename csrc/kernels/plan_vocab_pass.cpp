// Launch plan of the vocabulary pass.
#include <algorithm>

#include "plan_operators.h"

namespace entrgi {
namespace {

// One CTA per row is enough to fill the device from about half a row per SM on; below, V is cut into parts of
// at least one 16-byte load per thread.
constexpr int kVocabThreads = 512;
constexpr int64_t kMinVocabSplit = kVocabThreads * 8;

}  // namespace

Plan plan_vocab_pass(Op, const Shape& s, const Device& device, const PlanOverrides& overrides) {
  Plan plan{};
  plan.kernel = Kernel::kVocabPass;
  plan.threads = kVocabThreads;
  const int64_t splits = overrides.splits;
  int64_t wanted = splits;
  if (wanted <= 0)
    wanted = 2 * s.n >= device.num_sms ? 1 : ceil_div(4 * device.num_sms, std::max<int64_t>(s.n, 1));
  const int64_t most = splits > 0 ? ceil_div(s.vocab, 8) : ceil_div(s.vocab, kMinVocabSplit);
  plan.splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, kVocabThreads));
  plan.grid = s.n * plan.splits;
  plan.workspace_bytes = plan.splits > 1 ? plan.grid * kPartialStateBytes : 0;
  return plan;
}

Requests vocab_pass_requests(Op, const Shape&, const Plan&) {
  return {};
}

}  // namespace entrgi
