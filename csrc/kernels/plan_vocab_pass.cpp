// Launch plan of the vocabulary pass.
#include <algorithm>
#include <stdexcept>

#include "plan_operators.h"

namespace entrgi {
namespace {

// vocab_pass. One CTA per row is enough to fill the device from about half a row per SM on; below, V is cut
// into parts of at least one 16-byte load per thread.
constexpr int kVocabThreads = 512;
constexpr int64_t kMinVocabSplit = kVocabThreads * 8;

// vocab_pass_sm90. A cluster holds a row. Slices of up to 37.5 KB let four CTAs share an SM (with 18.4 KB of
// their own and 1 KB reserved they take 227.7 of 228 KB), so that the copies of one row run under the
// arithmetic of others; longer rows get longer slices before they get another
// kernel. The size of the cluster depends on V alone: no result depends on how many rows are in a batch.
constexpr int kClusterThreads = 256;
constexpr int kMaxCluster = 8;
constexpr int64_t kSliceBytes = 37 * 1024 + 512;
constexpr int64_t kMinSliceBytes = 8 * 1024;  // the pool of candidates takes the place of a slice

int64_t slice_bytes(const Shape& s, int64_t cluster) {
  const int64_t per_unit = 16 / size_of(s.logits);
  const int64_t units = ceil_div(s.vocab + per_unit - 1, per_unit);  // rows may start anywhere in one
  return std::max(ceil_div(units, cluster) * 16, kMinSliceBytes);
}

int cluster_for(const Shape& s) {
  int cluster = 1;
  while (cluster < kMaxCluster && slice_bytes(s, cluster) > kSliceBytes) cluster *= 2;
  return cluster;
}

std::string message(const char* field, const std::string& possible, const std::string& got) {
  return std::string(field) + " must be " + possible + ", got " + got;
}

Plan plan_cluster(const Shape& s, int cluster) {
  Plan plan{};
  plan.kernel = Kernel::kVocabPassSm90;
  plan.threads = kClusterThreads;
  plan.cluster_n = cluster;
  plan.grid = s.n * cluster;
  plan.shared_bytes = slice_bytes(s, cluster);
  return plan;
}

Plan plan_split(Op op, const Shape& s, const Device& device, int64_t splits) {
  Plan plan{};
  plan.kernel = Kernel::kVocabPass;
  plan.threads = kVocabThreads;
  int64_t wanted = splits;
  if (wanted <= 0)
    wanted = 2 * s.n >= device.num_sms ? 1 : ceil_div(4 * device.num_sms, std::max<int64_t>(s.n, 1));
  const int64_t most = splits > 0 ? ceil_div(s.vocab, 8) : ceil_div(s.vocab, kMinVocabSplit);
  plan.splits = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, kVocabThreads));
  plan.grid = s.n * plan.splits;
  // States of parts, then forbidden ids as a bool [V] where they come as a list.
  plan.workspace_bytes = plan.splits > 1 ? plan.grid * kPartialStateBytes : 0;
  if (op == Op::kSampleTokens) plan.workspace_bytes += s.vocab;
  return plan;
}

}  // namespace

// Asking for `splits` asks for vocab_pass, which alone has them.
Plan plan_vocab_pass(Op op, const Shape& s, const Device& device, const PlanOverrides& overrides) {
  const std::string split = name_of(Kernel::kVocabPass), cluster = name_of(Kernel::kVocabPassSm90);
  const int size = overrides.cluster_n > 0 ? overrides.cluster_n : cluster_for(s);
  const bool fits = device.has_clusters() && slice_bytes(s, size) <= kMaxSliceBytes;
  if (!overrides.kernel.empty() && overrides.kernel != split && !(fits && overrides.kernel == cluster)) {
    throw std::invalid_argument(
        message("kernel", fits ? "one of " + cluster + ", " + split : split, overrides.kernel));
  }
  const bool by_cluster =
      fits && (overrides.kernel.empty() ? overrides.splits == 0 : overrides.kernel == cluster);
  if (by_cluster) {
    if (size > kMaxCluster || (size & (size - 1)) != 0) {
      throw std::invalid_argument(message("cluster_n", "1, 2, 4 or 8", std::to_string(size)));
    }
    return plan_cluster(s, size);
  }
  if (overrides.cluster_n > 1) {
    throw std::invalid_argument(message("cluster_n", "1 with " + split, std::to_string(overrides.cluster_n)));
  }
  return plan_split(op, s, device, overrides.splits);
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
  const int64_t states = plan.splits > 1 ? s.n * plan.splits * kPartialStateBytes : 0;
  return {(draw ? 2 : 1) * logits + states + keys, 0, results + states, 0};
}

}  // namespace entrgi
