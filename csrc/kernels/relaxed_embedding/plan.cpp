// Launch plan of the relaxed embedding.
#include <algorithm>
#include <limits>
#include <span>

#include "../detail/matmul_chunk.h"
#include "tiles.h"

namespace entrgi {
namespace {

using namespace relaxed_embedding_tiles;

constexpr ProductKernels kProducts{Kernel::kRelaxedEmbeddingSm90, Kernel::kRelaxedEmbeddingSm80,
                                   Kernel::kRelaxedEmbeddingSimt, Kernel::kRelaxedEmbeddingMatmul};

int64_t stage_of(const Plan& plan, const Shape& s) {
  return stage_bytes(plan.block_m, plan.block_n, plan.block_k, size_of(s.logits), size_of(s.embedding));
}

// Every tile in every cluster that was built for its columns and that the device can hold, as deep as shared
// memory allows or, where a depth is asked for, in every depth.
std::vector<Plan> hopper_candidates(const Shape& s, const Device& device, const PlanOverrides& asked) {
  std::vector<Plan> plans;
  for (const BuiltTile& tile : kSm90) {
    Plan plan = plan_of(Kernel::kRelaxedEmbeddingSm90, tile);
    const int deepest = static_cast<int>(kHopperSharedBytes / sm90_bytes(stage_of(plan, s), 1));
    for (const auto& [m, n] : kClusters) {
      if (ceil_div(s.dim, plan.block_n) % n != 0 || device.resident(m * n) == 0) continue;
      plan.cluster_m = m, plan.cluster_n = n;
      for (plan.stages = asked.stages > 0 ? 2 : deepest; plan.stages <= deepest; ++plan.stages) {
        plans.push_back(plan);
      }
    }
  }
  return plans;
}

// As many parts as asked for, none of them empty.
int64_t splits_of(int64_t steps, int64_t wanted) {
  return ceil_div(steps, ceil_div(steps, std::clamp<int64_t>(wanted, 1, steps)));
}

// For one tile of columns and one step: how many tiles of the embedding and of the logits L2 delivers, each
// once to all that share it.
double fetched_embedding(const Dealt& tiles) {
  return static_cast<double>(tiles.groups + tiles.rest);
}
double fetched_logits(const Dealt& tiles, const Plan& plan) {
  return static_cast<double>(tiles.groups * plan.cluster_m) / plan.cluster_n +
         static_cast<double>(tiles.rest) / tiles.rest_n;
}

// Clocks of a plan for Hopper: waves of CTAs, each as long as its part of the vocabulary and a constant, but
// not less than memory takes for all of it; and the partial sums, written and read again. A step takes as
// long as the slowest of
//   tensor cores   block_m block_n block_k / 2048
//   L2             delivers 32 bytes per clock and multiprocessor: what is shared once to all that share it
//   ingress        64 bytes per clock enter a multiprocessor, shared or not
//   shared memory  moves 128: both tiles are written, the logits read once, the embedding by each consumer
// The widest column tile is the slowest, so columns of padding count. All rates are assumed; none was
// measured.
double estimate(const Plan& plan, const Shape& s, const Device& device) {
  constexpr double kTensorRate = 2048, kL2Rate = 32, kIngressRate = 64, kSharedRate = 128;  // per clock
  constexpr double kMemoryRate = 20.7, kPartialRate = 20;  // per clock and multiprocessor; H200
  constexpr int64_t kOverhead = 6;  // steps: first stage, last products, 128 KB of partial sums
  const Dealt tiles(s.n, s.dim, plan);
  const double all = static_cast<double>(std::max<int64_t>(tiles.rows, 1));
  const double tensor = plan.block_m * plan.block_n * plan.block_k / kTensorRate;
  const double embedding = plan.block_k * plan.block_n * 2,
               logits = plan.block_k * plan.block_m * size_of(s.logits);
  const double l2 =
      (embedding * fetched_embedding(tiles) + logits * fetched_logits(tiles, plan)) / all / kL2Rate;
  const double ingress = (embedding + logits) / kIngressRate;
  const double shared = (embedding * (1 + plan.block_m / 64) + logits * 2) / kSharedRate;
  const int64_t size = plan.cluster_m * plan.cluster_n;
  const int64_t waves = ceil_div(plan.grid / size, device.resident(size));
  const int64_t steps = ceil_div(ceil_div(s.vocab, plan.block_k), plan.splits);
  const double products = waves * (steps + kOverhead) * std::max({tensor, l2, ingress, shared});
  const double memory = s.vocab * (s.dim * 2. + s.n * size_of(s.logits)) / (device.num_sms * kMemoryRate);
  return std::max(products, memory) + 8. * plan.splits * s.n * s.dim / (device.num_sms * kPartialRate);
}

// The tile, cluster and splits of the least estimate; tiles above the smallest compete. Splits fill one to
// four waves.
Plan best_for_hopper(std::vector<Plan> plans, const Shape& s, const Device& device,
                     const PlanOverrides& asked) {
  if (s.n <= kSm90[0].block_m) {
    prefer_tile_of_rows(plans, s.n);
  } else if (plans.back().block_m > kSm90[0].block_m) {
    std::erase_if(plans, [](const Plan& plan) { return plan.block_m == kSm90[0].block_m; });
  }
  const int64_t steps = ceil_div(s.vocab, plans.front().block_k);
  Plan best{};
  double least = std::numeric_limits<double>::infinity();
  for (Plan& plan : plans) {
    const Dealt tiles(s.n, s.dim, plan);
    if (asked.cluster_m == 0 && plan.cluster_m > 1 && tiles.groups == 0) continue;
    const int64_t resident = device.resident(plan.cluster_m * plan.cluster_n);
    const int64_t first = std::max<int64_t>(ceil_div(tiles.clusters, resident), 1);
    for (int64_t waves = first; waves < first + 4; ++waves) {
      const int64_t filling = waves * resident / std::max<int64_t>(tiles.clusters, 1);
      plan.splits = splits_of(steps, asked.splits > 0 ? asked.splits : filling);
      plan.grid = tiles.clusters * plan.cluster_m * plan.cluster_n * plan.splits;
      if (const double clocks = estimate(plan, s, device); clocks < least) least = clocks, best = plan;
    }
  }
  best.shared_bytes = sm90_bytes(stage_of(best, s), best.stages);
  return best;
}

// As many CTAs as run at once; a split of fewer than 8 steps of the reduction would be all prologue.
Plan best_of(std::vector<Plan> plans, const Shape& s, const Device& device, const PlanOverrides& asked,
             std::span<const BuiltTile> built) {
  prefer_tile_of_rows(plans, s.n);
  Plan plan = plans.front();
  if (plan.kernel == Kernel::kRelaxedEmbeddingSm80) {
    plan.shared_bytes = sm80_bytes(stage_of(plan, s), plan.stages, plan.block_m);
  }
  const int ctas =
      std::find_if(built.begin(), built.end(), [&](const BuiltTile& t) { return t.is_of(plan); })->ctas;
  const int64_t tiles = ceil_div(s.n, plan.block_m) * ceil_div(s.dim, plan.block_n);
  const int64_t steps = ceil_div(s.vocab, plan.block_k);
  const int64_t filling = std::min(ctas * device.num_sms / std::max<int64_t>(tiles, 1), ceil_div(steps, 8));
  plan.splits = splits_of(steps, asked.splits > 0 ? asked.splits : filling);
  plan.grid = tiles * plan.splits;
  return plan;
}

}  // namespace

Plan plan_relaxed_embedding(const Shape& s, const Device& device, const PlanOverrides& asked) {
  const Kernel kernel = choose_kernel(kProducts, s, device, asked);
  const bool hopper = kernel == Kernel::kRelaxedEmbeddingSm90;
  const bool matmul = kernel == Kernel::kRelaxedEmbeddingMatmul;
  const std::span<const BuiltTile> built = kernel == Kernel::kRelaxedEmbeddingSm80 ? kSm80 : kSimt;
  std::vector<Plan> plans;
  if (hopper) {
    plans = hopper_candidates(s, device, asked);
  } else if (matmul) {
    plans = {plan_matmul(kernel, s, asked)};
  } else {
    for (const BuiltTile& tile : built) plans.push_back(plan_of(kernel, tile));
  }
  narrow(plans, asked);
  Plan plan = matmul   ? plans.front()
              : hopper ? best_for_hopper(plans, s, device, asked)
                       : best_of(plans, s, device, asked, built);
  plan.workspace_bytes += plan.splits * s.n * pitch_of(s.dim) * static_cast<int64_t>(sizeof(float));
  return plan;
}

namespace {

// Parts, hard row, token and weight for each element; soft and output.
void add_reduction(Requests& requests, const Shape& s, const Plan& plan) {
  requests.load_bytes += s.n * s.dim * (plan.splits * 4 + size_of(s.embedding) + 8 + 4);
  requests.store_bytes += s.n * s.dim * (4 + size_of(s.embedding));
}

// Every thread reads its row's logsumexp; torch reads q and the embedding and writes the only part.
Requests matmul_requests(const Shape& s, const Plan& plan) {
  Requests requests{};
  requests.load_bytes = s.n * s.vocab * (size_of(s.logits) + 4) + s.vocab * s.dim * 4 +
                        s.n * matmul_ctas(s.vocab, plan) * plan.threads * 4;
  requests.store_bytes = s.n * s.vocab * 4 + s.n * s.dim * 4;
  requests.flops = 2 * s.n * s.vocab * s.dim;
  add_reduction(requests, s, plan);
  return requests;
}

}  // namespace

// With hard tokens and weights, all rows present and no `rows`. A row of the logits is read once for each
// tile of columns, a row of the embedding once for each tile of rows. By TMA, a box sent to several CTAs
// counts once, and whole even where it reaches past the matrix.
Requests relaxed_embedding_requests(const Shape& s, const Plan& plan) {
  if (plan.kernel == Kernel::kRelaxedEmbeddingMatmul) return matmul_requests(s, plan);
  const Dealt tiles(s.n, s.dim, plan);
  const int64_t columns = tiles.columns, steps = ceil_div(s.vocab, plan.block_k);
  const int64_t rows_of_parts = columns * plan.splits * s.n;  // a row in a tile of columns and a split
  const int64_t logits = columns * s.n * s.vocab * size_of(s.logits);
  const int64_t embedding = tiles.rows * s.vocab * s.dim * size_of(s.embedding);
  const int64_t pairs = plan.splits * s.n * ceil_div(s.dim, 2) * 8;  // partial sums, stored two at a time

  Requests requests{};
  requests.flops = 2 * tiles.rows * plan.block_m * columns * plan.block_n * steps * plan.block_k;
  switch (plan.kernel) {
    case Kernel::kRelaxedEmbeddingSm90:  // all four lanes of a quad read the logsumexp of their rows
      requests.load_bytes = rows_of_parts * 4 * 4;
      requests.bulk_bytes =
          columns * steps * plan.block_k *
          static_cast<int64_t>(fetched_embedding(tiles) * plan.block_n * 2 +
                               fetched_logits(tiles, plan) * plan.block_m * size_of(s.logits));
      requests.store_bytes = pairs;
      break;
    case Kernel::kRelaxedEmbeddingSm80:  // and of warps side by side, in the smallest tile
      requests.load_bytes = logits + embedding + rows_of_parts * 4 * 4 * (plan.block_m == 16 ? 4 : 1);
      requests.store_bytes = pairs;
      break;
    default:
      requests.load_bytes = logits + embedding + rows_of_parts * 4;
      requests.store_bytes = plan.splits * s.n * pitch_of(s.dim) * 4;
      break;
  }
  add_reduction(requests, s, plan);
  return requests;
}

}  // namespace entrgi
