#include "plan_families.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "detail/matmul_chunk.h"

namespace entrgi {
namespace {

[[noreturn]] void refuse(const std::string& field, const std::vector<std::string>& possible,
                         std::string_view where, const std::string& got) {
  std::string names;
  for (const std::string& name : possible) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument(field + " must be " + (possible.size() > 1 ? "one of " : "") + names + " for " +
                              std::string(where) + ", got " + got);
}

void narrow(std::vector<Plan>& candidates, int Plan::* field, const char* name, int asked) {
  if (asked == 0) return;
  std::vector<int> possible;
  for (const Plan& plan : candidates) possible.push_back(plan.*field);
  const Kernel kernel = candidates.front().kernel;
  std::erase_if(candidates, [&](const Plan& plan) { return plan.*field != asked; });
  if (!candidates.empty()) return;
  std::sort(possible.begin(), possible.end());
  possible.erase(std::unique(possible.begin(), possible.end()), possible.end());
  std::vector<std::string> names;
  for (const int value : possible) names.push_back(std::to_string(value));
  refuse(name, names, name_of(kernel), std::to_string(asked));
}

// Whether a kernel cuts the vocabulary into parts or, logit_update_sm90, has a grid of any size.
bool has_splits(Kernel kernel) {
  switch (kernel) {
    case Kernel::kVocabPass:
    case Kernel::kRelaxedEmbeddingSm90:
    case Kernel::kRelaxedEmbeddingSm80:
    case Kernel::kRelaxedEmbeddingSimt:
    case Kernel::kLogitUpdateSm90:
      return true;
    default:
      return false;
  }
}

}  // namespace

Kernel choose_kernel(const std::vector<Kernel>& possible, const PlanOverrides& asked,
                     std::string_view where) {
  if (asked.kernel.empty()) return possible.front();
  std::vector<std::string> names;
  for (const Kernel kernel : possible) {
    if (asked.kernel == name_of(kernel)) return kernel;
    names.push_back(name_of(kernel));
  }
  refuse("kernel", names, where, asked.kernel);
}

Kernel choose_kernel(const ProductKernels& built, const Shape& s, const Device& device,
                     const PlanOverrides& asked) {
  constexpr int64_t kMostRows = std::numeric_limits<int>::max();
  const bool aligned = s.logits_aligned && s.embedding_aligned;
  std::vector<Kernel> possible = {built.sm80};
  if (s.embedding == DType::kFloat32) {
    possible = {built.simt, built.matmul};
    if (s.n >= kMatmulRows) std::swap(possible[0], possible[1]);
  } else if (device.has_wgmma() && (s.logits == s.embedding || s.logits == DType::kFloat32) && aligned &&
             std::max(s.vocab, s.n) <= kMostRows) {
    possible = {built.sm90, built.sm80};
  }
  if (asked.kernel.empty()) return possible.front();
  std::string where = std::string(name_of(s.logits)) + " logits and " + name_of(s.embedding) +
                      " embeddings on sm_" + std::to_string(device.arch);
  if (!aligned) where += ", some of whose rows do not start at 16-byte boundaries";
  return choose_kernel(possible, asked, where);
}

void narrow(std::vector<Plan>& candidates, const PlanOverrides& asked) {
  const Kernel kernel = candidates.front().kernel;
  narrow(candidates, &Plan::block_m, "block_m", asked.block_m);
  narrow(candidates, &Plan::block_n, "block_n", asked.block_n);
  narrow(candidates, &Plan::block_k, "block_k", asked.block_k);
  narrow(candidates, &Plan::stages, "stages", asked.stages);
  narrow(candidates, &Plan::cluster_m, "cluster_m", asked.cluster_m);
  narrow(candidates, &Plan::cluster_n, "cluster_n", asked.cluster_n);
  if (asked.splits > 1 && !has_splits(kernel)) {
    refuse("splits", {"1"}, name_of(kernel), std::to_string(asked.splits));
  }
}

void prefer(std::vector<Plan>& candidates, int Plan::* field, int wanted) {
  const auto is_other = [&](const Plan& plan) { return plan.*field != wanted; };
  if (!std::all_of(candidates.begin(), candidates.end(), is_other)) std::erase_if(candidates, is_other);
}

void prefer_tile_of_rows(std::vector<Plan>& candidates, int64_t rows) {
  const auto holds_all = [&](const Plan& plan) { return plan.block_m >= rows; };
  const auto found = std::find_if(candidates.begin(), candidates.end(), holds_all);
  prefer(candidates, &Plan::block_m, found == candidates.end() ? candidates.back().block_m : found->block_m);
}

// Chunks of about the same size, none above the limit unless so many rows leave no choice.
Plan plan_matmul(Kernel kernel, const Shape& s, const PlanOverrides& asked) {
  constexpr int64_t kMostBytes = 64 << 20, kGranule = 256;  // of a chunk; ids
  if (asked.block_n % 4 != 0) {
    refuse("block_n", {"a multiple of 4"}, name_of(kernel), std::to_string(asked.block_n));
  }
  const int64_t fitting = kMostBytes / 4 / std::max<int64_t>(s.n, 1) / kGranule * kGranule;
  const int64_t chunks = ceil_div(s.vocab, std::max(fitting, kGranule));
  const int64_t ids = ceil_div(ceil_div(s.vocab, chunks), kGranule) * kGranule;
  Plan plan{kernel};
  plan.block_n = asked.block_n > 0 ? asked.block_n : static_cast<int>(ids);
  plan.threads = MatmulChunk::kThreads;
  plan.grid = s.n * MatmulChunk::at(0, s.vocab, plan).ctas;
  plan.workspace_bytes = s.n * plan.block_n * static_cast<int64_t>(sizeof(float));
  return plan;
}

}  // namespace entrgi
