// Launch plan of the vocabulary pass.
#include <algorithm>

#include "tiles.h"

namespace entrgi {
namespace {

// Every size of cluster that holds a row.
std::vector<Plan> cluster_candidates(const Shape& s) {
  std::vector<Plan> plans;
  for (int size = 1; size <= kMaxCluster; size *= 2) {
    if (slice_bytes(s, size) > kMaxSliceBytes) continue;
    Plan plan{Kernel::kVocabPassSm90};
    plan.threads = kClusterThreads;
    plan.cluster_n = size;
    plan.grid = s.n * size;
    plan.shared_bytes = slice_bytes(s, size);
    plans.push_back(plan);
  }
  return plans;
}

// Slices so small that four CTAs share an SM; longer rows get longer slices before they get another kernel.
// The size of the cluster depends on V alone: no result depends on how many rows are in a batch.
Plan best_cluster(const std::vector<Plan>& plans) {
  const auto is_small = [](const Plan& plan) { return plan.shared_bytes <= kSliceBytes; };
  const auto found = std::find_if(plans.begin(), plans.end(), is_small);
  return found == plans.end() ? plans.back() : *found;
}

// One CTA per row is enough to fill the device from about half a row per SM on; below, V is cut into parts of
// at least one 16-byte load per thread.
Plan split_plan(Op op, const Shape& s, const Device& device, int64_t asked) {
  Plan plan{Kernel::kVocabPass};
  plan.threads = kSplitThreads;
  const int64_t filling =
      2 * s.n >= device.num_sms ? 1 : ceil_div(4 * device.num_sms, std::max<int64_t>(s.n, 1));
  const int64_t most = ceil_div(s.vocab, asked > 0 ? 8 : kSplitThreads * 8);
  plan.splits = std::clamp<int64_t>(asked > 0 ? asked : filling, 1, std::min<int64_t>(most, kSplitThreads));
  plan.grid = s.n * plan.splits;
  // States of parts, then forbidden ids as a bool [V] where they come as a list.
  plan.workspace_bytes = state_bytes(plan) + (op == Op::kSampleTokens ? s.vocab : 0);
  return plan;
}

}  // namespace

// Asking for `splits`, or for single CTAs where none holds a row, asks for vocab_pass.
Plan plan_vocab_pass(Op op, const Shape& s, const Device& device, const PlanOverrides& asked) {
  std::vector<Plan> plans = device.has_clusters() ? cluster_candidates(s) : std::vector<Plan>{};
  const bool split = asked.splits > 0 || (asked.cluster_n == 1 && slice_bytes(s, 1) > kMaxSliceBytes);
  std::vector<Kernel> possible = {Kernel::kVocabPass};
  if (!plans.empty()) possible.insert(split ? possible.end() : possible.begin(), Kernel::kVocabPassSm90);
  const bool by_cluster = choose_kernel(possible, asked, "this V and device") == Kernel::kVocabPassSm90;
  if (!by_cluster) plans = {split_plan(op, s, device, asked.splits)};
  narrow(plans, asked);
  return by_cluster ? best_cluster(plans) : plans.front();
}

constexpr int64_t kKeyBytes = 28;  // that a thread loads of a row's key, of whose words the low halves count

// Statistics: all of it. Draws: what every draw does, whatever the row holds: the statistics, the row's key
// (vocab_pass: in each thread, one in a CTA of vocab_pass_sm90) and, by vocab_pass, one more read in which
// survivors are met. Not covered are the reads of a threshold search (vocab_pass: two to five of the row;
// vocab_pass_sm90: none) and forbidden ids.
Requests vocab_pass_requests(Op op, const Shape& s, const Plan& plan) {
  const bool draw = op == Op::kSampleTokens;
  const int64_t logits = s.n * s.vocab * size_of(s.logits);
  const int64_t results = s.n * (draw ? 6 * 4 + 2 * 8 : 3 * 4 + 8);
  if (plan.kernel == Kernel::kVocabPassSm90) {
    // Units of 16 bytes that lie in one row alone go by bulk copies; at most two to a row do not.
    return {draw ? plan.grid * kKeyBytes : 0, logits, results, 0};
  }
  const int64_t keys = draw ? s.n * plan.threads * kKeyBytes : 0;
  const int64_t states = state_bytes(plan);
  return {(draw ? 2 : 1) * logits + states + keys, 0, results + states, 0};
}

}  // namespace entrgi
