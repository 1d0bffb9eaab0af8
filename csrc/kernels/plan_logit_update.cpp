// Launch plan of the logit update: gradient, Adam and SGD.
#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <vector>

#include "logit_update_layout.h"
#include "plan_operators.h"

namespace entrgi {
namespace {

// What was built. A kernel takes its smallest tile that holds all rows, else its largest.
constexpr Plan kBuilt[] = {
    // kernel                  tile          stages  threads
    {Kernel::kLogitUpdateSm90, 64, 256, 64, 3, 384},   //
    {Kernel::kLogitUpdateSm90, 128, 128, 64, 4, 384},  //
    {Kernel::kLogitUpdateSm80, 16, 256, 32, 4, 128},   //
    {Kernel::kLogitUpdateSm80, 64, 128, 32, 4, 128},   //
    {Kernel::kLogitUpdateSm80, 128, 128, 32, 4, 128},  //
    {Kernel::kLogitUpdateSimt, 16, 256, 16, 2, 256},   //
    {Kernel::kLogitUpdateSimt, 64, 128, 16, 2, 256},   //
    {Kernel::kLogitUpdateSimt, 128, 128, 16, 2, 256},
};

[[noreturn]] void refuse(const std::string& field, const std::string& possible, const std::string& where,
                         const std::string& got) {
  throw std::invalid_argument(field + " must be " + possible + where + ", got " + got);
}

// The kernel asked for, or the best that can serve the shape.
Kernel choose_kernel(const Shape& s, const Device& device, const std::string& asked) {
  std::vector<Kernel> possible;
  std::string where = std::string(" for ") + name_of(s.embedding) + " embeddings";
  const auto only_ampere = [&](const std::string& reason) {
    possible = {Kernel::kLogitUpdateSm80};
    where += reason;
  };
  if (s.embedding == DType::kFloat32) {
    possible = {Kernel::kLogitUpdateSimt};
  } else if (!device.has_wgmma()) {
    only_ampere(" on this device");
  } else if (s.logits != s.embedding && s.logits != DType::kFloat32) {
    only_ampere(std::string(" and ") + name_of(s.logits) + " logits");
  } else if (!s.embedding_aligned) {
    only_ampere(" whose rows do not start at 16-byte boundaries");
  } else if (!s.logits_aligned) {
    only_ampere(" and logits, moments or a gradient whose rows do not start at 16-byte boundaries");
  } else if (s.vocab > std::numeric_limits<int32_t>::max()) {
    only_ampere(" of more rows than TMA counts");
  } else {
    possible = {Kernel::kLogitUpdateSm90, Kernel::kLogitUpdateSm80};
  }
  std::string names;
  for (const Kernel kernel : possible) {
    if (asked.empty() || asked == name_of(kernel)) return kernel;
    names += (names.empty() ? "" : " or ") + std::string(name_of(kernel));
  }
  refuse("kernel", names, where, asked);
}

// Leaves the candidates whose `field` is `asked`, if anything was.
void narrow(std::vector<Plan>& candidates, int Plan::* field, const char* name, int asked) {
  if (asked == 0) return;
  std::string possible;
  std::vector<Plan> left;
  for (const Plan& plan : candidates) {
    const std::string value = std::to_string(plan.*field);
    if (plan.*field == asked) left.push_back(plan);
    if ((possible + " or ").find(value + " or ") == std::string::npos) {
      possible += (possible.empty() ? "" : " or ") + value;
    }
  }
  if (left.empty()) {
    refuse(name, possible, std::string(" in this tile of ") + name_of(candidates.front().kernel),
           std::to_string(asked));
  }
  candidates = left;
}

int choose_cluster(const char* name, bool possible, int preferred, int asked, const Plan& plan) {
  if (asked == 0) return possible ? preferred : 1;
  if (asked != 1 && !(asked == 2 && possible)) {
    refuse(name, possible ? "1 or 2" : "1", std::string(" for ") + name_of(plan.kernel),
           std::to_string(asked));
  }
  return asked;
}

// Clusters that share E between two rows of tiles and G between two columns of them halve what the SMs take
// from L2. Three rows of tiles would make a fourth of nothing but padding; up to 16 logit rows, G is too
// little to be worth tying two SMs together. Where the device runs no clusters of that size, smaller ones.
void choose_clusters(Plan& plan, const Shape& s, const Device& device, const PlanOverrides& overrides) {
  const bool possible = plan.kernel == Kernel::kLogitUpdateSm90;
  const int64_t rows = ceil_div(s.n, plan.block_m);
  int wanted_m = rows == 2 || rows > 3 ? 2 : 1, wanted_n = s.n > 16 ? 2 : 1;
  if (device.resident(wanted_m * wanted_n) == 0) wanted_m = 1;
  if (device.resident(wanted_n) == 0) wanted_n = 1;
  plan.cluster_m = choose_cluster("cluster_m", possible, wanted_m, overrides.cluster_m, plan);
  plan.cluster_n = choose_cluster("cluster_n", possible, wanted_n, overrides.cluster_n, plan);
}

int64_t shared_bytes(const Plan& plan, const Shape& s) {
  switch (plan.kernel) {
    case Kernel::kLogitUpdateSm90:
      return UpdateShared::bytes(plan.block_m, plan.block_n, plan.stages);
    case Kernel::kLogitUpdateSm80: {
      const int64_t ring = plan.stages * plan.block_k * (plan.block_m + plan.block_n) * size_of(s.embedding) +
                           plan.block_m * static_cast<int64_t>(sizeof(int64_t));
      const int64_t products = plan.block_m * (plan.block_n + 8) * static_cast<int64_t>(sizeof(float));
      return std::max(ring, products);
    }
    default:
      return 0;
  }
}

}  // namespace

Plan plan_logit_update(Op, const Shape& s, const Device& device, const PlanOverrides& overrides) {
  const Kernel kernel = choose_kernel(s, device, overrides.kernel);
  std::vector<Plan> candidates;
  std::copy_if(std::begin(kBuilt), std::end(kBuilt), std::back_inserter(candidates),
               [&](const Plan& plan) { return plan.kernel == kernel; });
  narrow(candidates, &Plan::block_m, "block_m", overrides.block_m);
  narrow(candidates, &Plan::block_n, "block_n", overrides.block_n);
  narrow(candidates, &Plan::block_k, "block_k", overrides.block_k);
  narrow(candidates, &Plan::stages, "stages", overrides.stages);
  const auto holds_all = [&](const Plan& plan) { return s.n <= plan.block_m; };
  const auto chosen = std::find_if(candidates.begin(), candidates.end(), holds_all);
  Plan plan = chosen == candidates.end() ? candidates.back() : *chosen;

  choose_clusters(plan, s, device, overrides);
  plan.shared_bytes = shared_bytes(plan, s);
  const int64_t cluster = plan.cluster_m * plan.cluster_n;
  plan.grid = ceil_div(s.n, int64_t{plan.block_m} * plan.cluster_m) *
              ceil_div(s.vocab, int64_t{plan.block_n} * plan.cluster_n) * cluster;
  plan.workspace_bytes = s.n * static_cast<int64_t>(sizeof(float));  // G . e_soft
  if (kernel == Kernel::kLogitUpdateSm90) {
    // Persistent: all clusters that run at once, or as many clusters as `splits` asks for.
    const int64_t clusters = overrides.splits > 0 ? overrides.splits : device.resident(cluster);
    plan.grid = std::min(plan.grid, std::max<int64_t>(clusters, 1) * cluster);
    plan.workspace_bytes = GatheredGrad::end(s.n, s.dim);
  }
  return plan;
}

Requests logit_update_requests(Op op, const Shape& s, const Plan& plan, int64_t step, bool last) {
  const int64_t logits = s.n * s.vocab, element = size_of(s.embedding);
  const bool moments = op == Op::kAdamStep;
  const int64_t tiles_m = ceil_div(s.n, plan.block_m * plan.cluster_m) * plan.cluster_m;
  const int64_t tiles_n = ceil_div(s.vocab, plan.block_n * plan.cluster_n) * plan.cluster_n;
  const int64_t steps = ceil_div(s.dim, plan.block_k);
  Requests r{};
  // The inner products; then every logit and its moments.
  r.load_bytes = s.n * s.dim * (element + 4) + logits * (size_of(s.logits) + (moments && step > 1 ? 8 : 0));
  r.store_bytes = s.n * 4 + logits * (op == Op::kLogitGradient ? 4 : size_of(s.logits)) +
                  (moments && !last ? logits * 8 : 0);
  r.flops = tiles_m * tiles_n * steps * 2 * plan.block_m * plan.block_n * plan.block_k;
  // logsumexp and inner product of a row, 8 bytes: read once for each `columns` of a tile's columns.
  const auto row_scalars = [&](int64_t columns) { return 8 * s.n * tiles_n * plan.block_n / columns; };
  if (plan.kernel == Kernel::kLogitUpdateSm90) {
    r.store_bytes += s.n * s.dim * element;  // the gathered rows of G
    r.load_bytes += row_scalars(UpdateShared::kChunkColumns) + (s.vocab % 4 != 0 ? 8 * s.n : 0);
    // Each box is asked for once in a cluster, whole, wherever the matrix ends.
    r.bulk_bytes = steps * plan.block_k * element *
                   (tiles_m * plan.block_m * tiles_n / plan.cluster_n +
                    tiles_n * plan.block_n * tiles_m / plan.cluster_m);
  } else {
    r.load_bytes += (tiles_n * s.n + tiles_m * s.vocab) * s.dim * element + row_scalars(4);
  }
  return r;
}

}  // namespace entrgi
