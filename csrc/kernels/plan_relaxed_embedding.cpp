// Launch plan of the relaxed embedding.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "matmul_layout.h"
#include "relaxed_embedding_layout.h"

namespace entrgi {
namespace {

// What is compiled, and for which rows: the first tile that holds them all, else the last. On sm_90a the last
// two compete (see estimate).
//
//   N          16-bit E, sm_90a, rows of z and E aligned,    16-bit E, else     fp32 E
//              z of E's type or fp32
//   ... 16     sm90   64 x 256                               sm80   16 x 256    simt  16 x 256
//   ... 64     sm90   64 x 256                               sm80   64 x 128    simt  64 x 128
//   65 ...     sm90  128 x 256 or 192 x 192, clusters        sm80  128 x 128    simt 128 x 128
//   128 ...                                                                     matmul (plan_matmul.cpp)
struct Built {
  Kernel kernel;
  int block_m, block_n, block_k, threads, stages;  // stages 0: as many as shared memory holds
  int ctas = 1;                                    // on a multiprocessor at once
};
constexpr Built kBuilt[] = {
    {Kernel::kRelaxedEmbeddingSm90, 64, 256, 64, 256, 0},
    {Kernel::kRelaxedEmbeddingSm90, 128, 256, 64, 384, 0},
    {Kernel::kRelaxedEmbeddingSm90, 192, 192, 64, 512, 0},
    {Kernel::kRelaxedEmbeddingSm80, 16, 256, 32, 128, 4, 2},
    {Kernel::kRelaxedEmbeddingSm80, 64, 128, 32, 128, 4, 2},
    {Kernel::kRelaxedEmbeddingSm80, 128, 128, 32, 128, 3, 2},
    {Kernel::kRelaxedEmbeddingSimt, 16, 256, 16, 256, 2, 2},
    {Kernel::kRelaxedEmbeddingSimt, 64, 128, 16, 256, 2, 2},
    {Kernel::kRelaxedEmbeddingSimt, 128, 128, 16, 256, 2},
};
struct Cluster {
  int m, n;
};
constexpr Cluster kClusters[] = {{1, 1}, {2, 1}, {4, 1}, {1, 2}, {2, 2}};

// `wanted`, or `otherwise` where it is 0; throws where it is not among the possible ones.
int choose(const char* field, int wanted, int otherwise, const std::vector<int>& possible, Kernel kernel) {
  if (wanted == 0) return otherwise;
  if (std::find(possible.begin(), possible.end(), wanted) != possible.end()) return wanted;
  std::string message = std::string(field) + " must be " + (possible.size() > 1 ? "one of " : "");
  for (size_t i = 0; i < possible.size(); ++i) message += (i > 0 ? ", " : "") + std::to_string(possible[i]);
  throw std::invalid_argument(message + " for " + name_of(kernel) + ", got " + std::to_string(wanted));
}

// TMA counts rows in 32 bits and needs them on 16-byte boundaries.
bool hopper_can_serve(const Shape& s, const Device& device) {
  constexpr int64_t kMostRows = std::numeric_limits<int>::max();
  const bool types = s.logits == s.embedding || s.logits == DType::kFloat32;
  return device.has_wgmma() && types && s.logits_aligned && s.embedding_aligned && s.vocab <= kMostRows &&
         s.n <= kMostRows;
}

std::string describe(DType dtype, bool aligned) {
  return std::string(aligned ? "" : "unaligned ") + name_of(dtype);
}

Kernel choose_kernel(const Shape& s, const Device& device, const std::string& wanted) {
  std::vector<Kernel> possible = {Kernel::kRelaxedEmbeddingSm80};
  if (s.embedding == DType::kFloat32) {
    possible = {Kernel::kRelaxedEmbeddingSimt, Kernel::kRelaxedEmbeddingMatmul};
    if (s.n >= kMatmulRows) std::swap(possible[0], possible[1]);
  } else if (hopper_can_serve(s, device)) {
    possible = {Kernel::kRelaxedEmbeddingSm90, Kernel::kRelaxedEmbeddingSm80};
  }
  if (wanted.empty()) return possible.front();
  std::string names;
  for (const Kernel kernel : possible) {
    if (wanted == name_of(kernel)) return kernel;
    names += std::string(names.empty() ? "" : ", ") + name_of(kernel);
  }
  throw std::invalid_argument(std::string("kernel must be ") + (possible.size() > 1 ? "one of " : "") +
                              names + " for " + describe(s.logits, s.logits_aligned) + " logits and " +
                              describe(s.embedding, s.embedding_aligned) + " embeddings on sm_" +
                              std::to_string(device.arch) + ", got " + wanted);
}

std::vector<Built> choose_tiles(const Shape& s, Kernel kernel, const PlanOverrides& o) {
  std::vector<Built> tiles;
  std::vector<int> rows;
  for (const Built& built : kBuilt) {
    if (built.kernel == kernel) tiles.push_back(built), rows.push_back(built.block_m);
  }
  const int wanted = choose("block_m", o.block_m, 0, rows, kernel);
  const auto fits = [&](const Built& t) { return wanted != 0 ? t.block_m == wanted : t.block_m >= s.n; };
  const auto found = std::find_if(tiles.begin(), tiles.end(), fits);
  std::vector<Built> chosen = {found == tiles.end() ? tiles.back() : *found};
  if (kernel == Kernel::kRelaxedEmbeddingSm90 && wanted == 0 && s.n > tiles.front().block_m) {
    chosen.assign(tiles.begin() + 1, tiles.end());
  }
  std::vector<int> columns, depths;
  for (const Built& tile : chosen) columns.push_back(tile.block_n), depths.push_back(tile.block_k);
  const int block_n = choose("block_n", o.block_n, 0, columns, kernel);
  choose("block_k", o.block_k, 0, {depths.front()}, kernel);
  std::erase_if(chosen, [&](const Built& tile) { return block_n != 0 && tile.block_n != block_n; });
  return chosen;
}

Plan plan_of(const Built& tile) {
  return {tile.kernel, tile.block_m, tile.block_n, tile.block_k, tile.stages, tile.threads};
}

int64_t stage_bytes(const Plan& plan, const Shape& s) {
  return plan.block_k * (plan.block_m * size_of(s.logits) + plan.block_n * size_of(s.embedding));
}

// As many parts as asked for, none of them empty.
int64_t splits_of(int64_t steps, int64_t wanted) {
  return ceil_div(steps, ceil_div(steps, std::clamp<int64_t>(wanted, 1, steps)));
}

void set_stages(Plan& plan, const Shape& s, const PlanOverrides& o) {
  const int64_t stage = stage_bytes(plan, s) + 2 * static_cast<int64_t>(sizeof(uint64_t));  // two barriers
  std::vector<int> depths;
  for (int depth = 2; depth * stage <= kHopperSharedBytes; ++depth) depths.push_back(depth);
  plan.stages = choose("stages", o.stages, depths.back(), depths, plan.kernel);
  plan.shared_bytes = plan.stages * stage;
}

// For one tile of columns and one step: how many tiles of the embedding and of the logits L2 delivers, each
// once to all that share it.
double fetched_embedding(const RelaxedEmbeddingTiles& tiles) {
  return static_cast<double>(tiles.groups + tiles.rest);
}
double fetched_logits(const RelaxedEmbeddingTiles& tiles, const Plan& plan) {
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
// The widest column tile is the slowest, so columns of padding count.
double estimate(const Plan& plan, const Shape& s, const Device& device) {
  constexpr double kTensorRate = 2048, kL2Rate = 32, kIngressRate = 64, kSharedRate = 128;  // per clock
  constexpr double kMemoryRate = 20.7, kPartialRate = 20;  // per clock and multiprocessor; H200
  constexpr int64_t kOverhead = 6;  // steps: first stage, last products, 128 KB of partial sums
  const RelaxedEmbeddingTiles tiles(s.n, s.dim, plan);
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

// Every tile in every cluster that was built for its columns and that the device can hold.
std::vector<Plan> candidates(const Shape& s, const Device& device, const std::vector<Built>& tiles) {
  std::vector<Plan> plans;
  for (const Built& tile : tiles) {
    for (const Cluster& cluster : kClusters) {
      Plan plan = plan_of(tile);
      plan.cluster_m = cluster.m, plan.cluster_n = cluster.n;
      const bool whole = ceil_div(s.dim, plan.block_n) % cluster.n == 0;
      if (whole && device.resident(cluster.m * cluster.n) > 0) plans.push_back(plan);
    }
  }
  return plans;
}

// Leaves the plans whose field is as wanted, if anything is.
void narrow(std::vector<Plan>& plans, int Plan::* field, const char* name, int wanted) {
  std::vector<int> possible;
  for (const Plan& plan : plans) {
    if (std::find(possible.begin(), possible.end(), plan.*field) == possible.end()) {
      possible.push_back(plan.*field);
    }
  }
  choose(name, wanted, 0, possible, plans.front().kernel);
  if (wanted != 0) std::erase_if(plans, [&](const Plan& plan) { return plan.*field != wanted; });
}

// The tile, cluster and splits of the least estimate. Splits fill one to four waves.
Plan plan_hopper(const Shape& s, const Device& device, const PlanOverrides& o,
                 const std::vector<Built>& tiles_built) {
  std::vector<Plan> plans = candidates(s, device, tiles_built);
  narrow(plans, &Plan::cluster_m, "cluster_m", o.cluster_m);
  narrow(plans, &Plan::cluster_n, "cluster_n", o.cluster_n);
  const int64_t steps = ceil_div(s.vocab, plans.front().block_k);
  Plan best{};
  double least = std::numeric_limits<double>::infinity();
  for (Plan& plan : plans) {
    set_stages(plan, s, o);
    const RelaxedEmbeddingTiles tiles(s.n, s.dim, plan);
    if (o.cluster_m == 0 && plan.cluster_m > 1 && tiles.groups == 0) continue;
    const int64_t resident = device.resident(plan.cluster_m * plan.cluster_n);
    const int64_t first = std::max<int64_t>(ceil_div(tiles.clusters, resident), 1);
    for (int64_t waves = first; waves < first + 4; ++waves) {
      const int64_t filling = waves * resident / std::max<int64_t>(tiles.clusters, 1);
      plan.splits = splits_of(steps, o.splits > 0 ? o.splits : filling);
      plan.grid = tiles.clusters * plan.cluster_m * plan.cluster_n * plan.splits;
      if (const double clocks = estimate(plan, s, device); clocks < least) least = clocks, best = plan;
    }
  }
  return best;
}

// As many CTAs as run at once; a split of fewer than 8 steps of the reduction would be all prologue.
Plan plan_other(const Shape& s, const Device& device, const PlanOverrides& o, const Built& tile) {
  Plan plan = plan_of(tile);
  choose("stages", o.stages, 0, {tile.stages}, plan.kernel);
  choose("cluster_m", o.cluster_m, 0, {1}, plan.kernel);
  choose("cluster_n", o.cluster_n, 0, {1}, plan.kernel);
  if (plan.kernel == Kernel::kRelaxedEmbeddingSm80) {
    const int64_t row_offsets = plan.block_m * static_cast<int64_t>(sizeof(int64_t));
    plan.shared_bytes = plan.stages * stage_bytes(plan, s) + row_offsets;
  }
  const int64_t tiles = ceil_div(s.n, plan.block_m) * ceil_div(s.dim, plan.block_n);
  const int64_t steps = ceil_div(s.vocab, plan.block_k);
  const int64_t filling =
      std::min(tile.ctas * device.num_sms / std::max<int64_t>(tiles, 1), ceil_div(steps, 8));
  plan.splits = splits_of(steps, o.splits > 0 ? o.splits : filling);
  plan.grid = tiles * plan.splits;
  return plan;
}

}  // namespace

Plan plan_relaxed_embedding(const Shape& s, const Device& device, const PlanOverrides& o) {
  const Kernel kernel = choose_kernel(s, device, o.kernel);
  Plan plan{};
  if (kernel == Kernel::kRelaxedEmbeddingMatmul) {
    plan = plan_matmul(kernel, s, o);
  } else {
    const std::vector<Built> tiles = choose_tiles(s, kernel, o);
    plan = kernel == Kernel::kRelaxedEmbeddingSm90 ? plan_hopper(s, device, o, tiles)
                                                   : plan_other(s, device, o, tiles.front());
  }
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
  const RelaxedEmbeddingTiles tiles(s.n, s.dim, plan);
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
