// Launch plan of the logit update: gradient, Adam and SGD.
#include <algorithm>
#include <span>

#include "../detail/matmul_chunk.h"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace logit_update_tiles;

constexpr ProductKernels kProducts{Kernel::kLogitUpdateSm90, Kernel::kLogitUpdateSm80,
                                   Kernel::kLogitUpdateSimt, Kernel::kLogitUpdateMatmul};

// Every tile; on Hopper alone and in clusters of up to 2 x 2.
std::vector<Plan> candidates(Kernel kernel) {
  const bool hopper = kernel == Kernel::kLogitUpdateSm90;
  const std::span<const BuiltTile> tiles = hopper ? std::span<const BuiltTile>(kSm90)
                                           : kernel == Kernel::kLogitUpdateSm80 ? kSm80
                                                                                : kSimt;
  std::vector<Plan> plans;
  for (const BuiltTile& tile : tiles) {
    Plan plan = plan_of(kernel, tile);
    for (plan.cluster_m = 1; plan.cluster_m <= (hopper ? 2 : 1); ++plan.cluster_m) {
      for (plan.cluster_n = 1; plan.cluster_n <= (hopper ? 2 : 1); ++plan.cluster_n) plans.push_back(plan);
    }
  }
  return plans;
}

// The smallest tile that holds all rows, else the largest. Clusters that share E between two rows of tiles
// and G between two columns of them halve what the SMs take from L2. Three rows of tiles would make a fourth
// of nothing but padding; up to 16 logit rows, G is too little to be worth tying two SMs together. Where the
// device runs no clusters of that size, smaller ones.
Plan best_of(std::vector<Plan> plans, const Shape& s, const Device& device) {
  prefer_tile_of_rows(plans, s.n);
  const int64_t rows = ceil_div(s.n, plans.front().block_m);
  int wanted_m = rows == 2 || rows > 3 ? 2 : 1, wanted_n = s.n > 16 ? 2 : 1;
  if (device.resident(wanted_m * wanted_n) == 0) wanted_m = 1;
  if (device.resident(wanted_n) == 0) wanted_n = 1;
  prefer(plans, &Plan::cluster_m, wanted_m);
  prefer(plans, &Plan::cluster_n, wanted_n);
  return plans.front();
}

}  // namespace

Plan plan_logit_update(const Shape& s, const Device& device, const PlanOverrides& asked) {
  const Kernel kernel = choose_kernel(kProducts, s, device, asked);
  const bool matmul = kernel == Kernel::kLogitUpdateMatmul, hopper = kernel == Kernel::kLogitUpdateSm90;
  std::vector<Plan> plans = matmul ? std::vector{plan_matmul(kernel, s, asked)} : candidates(kernel);
  narrow(plans, asked);
  Plan plan = matmul ? plans.front() : best_of(plans, s, device);

  const int64_t gathered = GatheredGrad::end(s.n, s.dim, size_of(s.embedding));
  plan.workspace_bytes += matmul || hopper ? gathered : s.n * static_cast<int64_t>(sizeof(float));
  if (matmul) return plan;
  const int64_t cluster = plan.cluster_m * plan.cluster_n;
  plan.grid = ceil_div(s.n, int64_t{plan.block_m} * plan.cluster_m) *
              ceil_div(s.vocab, int64_t{plan.block_n} * plan.cluster_n) * cluster;
  if (hopper) {
    // Persistent: all clusters that run at once, or as many clusters as `splits` asks for.
    const int64_t clusters = asked.splits > 0 ? asked.splits : device.resident(cluster);
    plan.grid = std::min(plan.grid, std::max<int64_t>(clusters, 1) * cluster);
    plan.shared_bytes = UpdateShared::bytes(plan.block_m, plan.block_n, plan.stages);
  } else if (kernel == Kernel::kLogitUpdateSm80) {
    plan.shared_bytes = Sm80Shared::bytes(plan.block_m, plan.block_n, plan.block_k, plan.stages);
  }
  return plan;
}

namespace {

// The inner products; then every logit and its moments.
Requests common_requests(Op op, const Shape& s, int64_t step, bool last) {
  const int64_t logits = s.n * s.vocab;
  const bool moments = op == Op::kAdamStep;
  Requests r{};
  r.load_bytes =
      s.n * s.dim * (size_of(s.embedding) + 4) + logits * (size_of(s.logits) + (moments && step > 1 ? 8 : 0));
  r.store_bytes = s.n * 4 + logits * (op == Op::kLogitGradient ? 4 : size_of(s.logits)) +
                  (moments && !last ? logits * 8 : 0);
  return r;
}

// Every thread reads logsumexp and inner product of its row; torch reads the gathered rows of G and the
// embedding and writes the products, which are read again.
void add_matmul(Requests& r, const Shape& s, const Plan& plan) {
  r.load_bytes +=
      s.n * s.vocab * 4 + (s.n + s.vocab) * s.dim * 4 + s.n * matmul_ctas(s.vocab, plan) * plan.threads * 8;
  r.store_bytes += s.n * s.vocab * 4 + s.n * s.dim * 4;
  r.flops = 2 * s.n * s.vocab * s.dim;
}

}  // namespace

Requests logit_update_requests(Op op, const Shape& s, const Plan& plan, int64_t step, bool last) {
  Requests r = common_requests(op, s, step, last);
  if (plan.kernel == Kernel::kLogitUpdateMatmul) {
    add_matmul(r, s, plan);
    return r;
  }
  const int64_t element = size_of(s.embedding);
  const int64_t tiles_m = ceil_div(s.n, plan.block_m * plan.cluster_m) * plan.cluster_m;
  const int64_t tiles_n = ceil_div(s.vocab, plan.block_n * plan.cluster_n) * plan.cluster_n;
  const int64_t steps = ceil_div(s.dim, plan.block_k);
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
