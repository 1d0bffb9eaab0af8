// Launch plan of the relaxed embedding.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan_operators.h"

namespace entrgi {
namespace {

// What is compiled. The first tile of a kernel that holds all rows is taken, else its last one.
//
//   N          16-bit E, sm_90a, rows of E aligned      16-bit E, else     fp32 E
//   ... 16     sm90   64 x 256                          sm80   16 x 256    simt 64 x 64
//   ... 64     sm90   64 x 256                          sm80   64 x 128    simt 64 x 64
//   65 ...     sm90  128 x 256, clusters of 1, 2 or 4   sm80  128 x 128    simt 64 x 64
struct Built {
  Kernel kernel;
  int block_m, block_n, block_k, threads, stages;  // stages 0: as many as shared memory holds
};
constexpr Built kBuilt[] = {
    {Kernel::kRelaxedEmbeddingSm90, 64, 256, 64, 256, 0},
    {Kernel::kRelaxedEmbeddingSm90, 128, 256, 64, 384, 0},
    {Kernel::kRelaxedEmbeddingSm80, 16, 256, 32, 128, 4},
    {Kernel::kRelaxedEmbeddingSm80, 64, 128, 32, 128, 4},
    {Kernel::kRelaxedEmbeddingSm80, 128, 128, 32, 128, 3},
    {Kernel::kRelaxedEmbeddingSimt, 64, 64, 16, 256, 1},
};

constexpr int64_t kHopperSharedBytes = 227 * 1024;

[[noreturn]] void refuse(const std::string& field, const std::string& possible, const std::string& got) {
  throw std::invalid_argument(field + " must be " + possible + ", got " + got);
}

template <typename Value>
std::string one_of(const std::vector<Value>& values) {
  std::string list = values.size() > 1 ? "one of " : "";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) list += ", ";
    if constexpr (std::is_same_v<Value, Kernel>) {
      list += name_of(values[i]);
    } else {
      list += std::to_string(values[i]);
    }
  }
  return list;
}

// `wanted`, or `otherwise` where it is 0.
int choose(const char* field, int wanted, int otherwise, const std::vector<int>& possible, Kernel kernel) {
  if (wanted == 0) return otherwise;
  if (std::find(possible.begin(), possible.end(), wanted) == possible.end()) {
    refuse(field, one_of(possible) + " for " + name_of(kernel), std::to_string(wanted));
  }
  return wanted;
}

Kernel choose_kernel(const Shape& s, const Device& device, const std::string& wanted) {
  std::vector<Kernel> possible;
  if (s.embedding == DType::kFloat32) {
    possible = {Kernel::kRelaxedEmbeddingSimt};
  } else {
    // TMA counts rows in 32 bits and needs them on 16-byte boundaries.
    if (device.arch == 90 && s.embedding_aligned && s.vocab <= INT32_MAX) {
      possible.push_back(Kernel::kRelaxedEmbeddingSm90);
    }
    possible.push_back(Kernel::kRelaxedEmbeddingSm80);
  }
  if (wanted.empty()) return possible.front();
  for (const Kernel kernel : possible) {
    if (wanted == name_of(kernel)) return kernel;
  }
  const std::string aligned = s.embedding_aligned ? "" : " unaligned";
  refuse("kernel",
         one_of(possible) + " for" + aligned + " " + name_of(s.embedding) + " embeddings on sm_" +
             std::to_string(device.arch),
         wanted);
}

Built choose_tile(const Shape& s, Kernel kernel, const PlanOverrides& o) {
  std::vector<Built> tiles;
  std::vector<int> rows;
  for (const Built& built : kBuilt) {
    if (built.kernel == kernel) tiles.push_back(built), rows.push_back(built.block_m);
  }
  const auto fits = [&](const Built& b) { return b.block_m >= s.n; };
  const auto found = std::find_if(tiles.begin(), tiles.end(), fits);
  const int block_m =
      choose("block_m", o.block_m, found == tiles.end() ? rows.back() : found->block_m, rows, kernel);
  const Built tile =
      *std::find_if(tiles.begin(), tiles.end(), [&](const Built& b) { return b.block_m == block_m; });
  choose("block_n", o.block_n, 0, {tile.block_n}, kernel);
  choose("block_k", o.block_k, 0, {tile.block_k}, kernel);
  return tile;
}

// Clusters of `cluster` CTAs that a Hopper device runs at once, one CTA per multiprocessor. Its GPCs have 16
// or 18 multiprocessors: of 18, clusters of four leave two without work.
int64_t resident_clusters(const Device& device, int cluster) {
  return std::max<int64_t>(cluster == 4 ? device.num_sms / 33 * 8 : device.num_sms / cluster, 1);
}

// Cluster and splits of the Hopper kernel, by the clocks that they take: waves of CTAs, each as long as its
// part of the vocabulary and a constant, and the partial sums written and read again. A step takes the tensor
// cores block_m 256 64 / 2048 clocks and L2 its bytes at 32 per clock and multiprocessor (the embedding
// shared by the cluster, the logits fetched by each CTA).
void choose_cluster_and_splits(Plan& plan, const Shape& s, const Device& device, const PlanOverrides& o) {
  constexpr int64_t kOverhead = 6;  // steps: first stage, last products, 128 KB of partial sums
  const int64_t steps = ceil_div(s.vocab, plan.block_k), columns = ceil_div(s.dim, plan.block_n);
  const std::vector<int> possible = {1, 2, 4};
  const int wanted = choose("cluster_m", o.cluster_m, 0, possible, plan.kernel);
  double least = -1;
  for (const int cluster : possible) {
    const int64_t row_tiles = ceil_div(s.n, plan.block_m);
    if (wanted == 0 ? cluster > 1 && cluster > row_tiles : cluster != wanted) continue;
    const int64_t clusters = std::max<int64_t>(ceil_div(row_tiles, cluster) * columns, 1);
    const int64_t resident = resident_clusters(device, cluster);
    const double tensor = plan.block_m * plan.block_n * plan.block_k / 2048.;
    const double l2 = (plan.block_n * 2. / cluster + plan.block_m * size_of(s.logits)) * plan.block_k / 32.;
    const int64_t first_waves = ceil_div(clusters, resident);
    for (int64_t waves = first_waves; waves < first_waves + 4; ++waves) {
      // As many splits as these waves hold, none of them empty.
      int64_t splits = std::min(o.splits > 0 ? o.splits : waves * resident / clusters, steps);
      const int64_t per_split = ceil_div(steps, splits);
      splits = ceil_div(steps, per_split);
      const double partials = 8. * splits * s.n * s.dim / (device.num_sms * 20.);
      const double clocks =
          ceil_div(clusters * splits, resident) * (per_split + kOverhead) * std::max(tensor, l2) + partials;
      if (least < 0 || clocks < least) {
        least = clocks;
        plan.cluster_m = cluster;
        plan.splits = splits;
        plan.grid = clusters * cluster * splits;
      }
    }
  }
}

// Two CTAs per multiprocessor; a split of fewer than 8 steps of the reduction would be all prologue.
void choose_splits(Plan& plan, const Shape& s, const Device& device, const PlanOverrides& o) {
  const int64_t tiles = ceil_div(s.n, plan.block_m) * ceil_div(s.dim, plan.block_n);
  const int64_t steps = ceil_div(s.vocab, plan.block_k);
  const int64_t filling = std::min((2 * device.num_sms) / std::max<int64_t>(tiles, 1), ceil_div(steps, 8));
  const int64_t wanted = std::max<int64_t>(o.splits > 0 ? std::min(o.splits, steps) : filling, 1);
  plan.splits = ceil_div(steps, ceil_div(steps, wanted));  // none is empty
  plan.grid = tiles * plan.splits;
}

}  // namespace

Plan plan_relaxed_embedding(const Shape& s, const Device& device, const PlanOverrides& o) {
  const Kernel kernel = choose_kernel(s, device, o.kernel);
  const Built tile = choose_tile(s, kernel, o);
  Plan plan{kernel, tile.block_m, tile.block_n, tile.block_k, tile.stages, tile.threads};
  const int64_t row_offsets = tile.block_m * static_cast<int64_t>(sizeof(int64_t));
  const int64_t stage_bytes =
      tile.block_k * (tile.block_m * size_of(s.logits) + tile.block_n * size_of(s.embedding));
  choose("cluster_n", o.cluster_n, 0, {1}, kernel);
  if (kernel == Kernel::kRelaxedEmbeddingSm90) {
    const int64_t with_barriers = stage_bytes + 2 * static_cast<int64_t>(sizeof(uint64_t));
    std::vector<int> depths;
    for (int depth = 2; row_offsets + depth * with_barriers <= kHopperSharedBytes; ++depth) {
      depths.push_back(depth);
    }
    plan.stages = choose("stages", o.stages, depths.back(), depths, kernel);
    plan.shared_bytes = row_offsets + plan.stages * with_barriers;
    choose_cluster_and_splits(plan, s, device, o);
  } else {
    choose("stages", o.stages, 0, {tile.stages}, kernel);
    choose("cluster_m", o.cluster_m, 0, {1}, kernel);
    if (kernel == Kernel::kRelaxedEmbeddingSm80) plan.shared_bytes = plan.stages * stage_bytes + row_offsets;
    choose_splits(plan, s, device, o);
  }
  plan.workspace_bytes = plan.splits * s.n * pitch_of(s.dim) * static_cast<int64_t>(sizeof(float));
  return plan;
}

// With hard tokens and weights, all rows present and no `rows`. A row of the logits is read once for each
// tile of columns and a row of the embedding once for each tile of rows, or of clusters: a box that TMA sends
// to several CTAs counts once, whole even where it reaches past the matrix.
Requests relaxed_embedding_requests(const Shape& s, const Plan& plan) {
  const int64_t columns = ceil_div(s.dim, plan.block_n), steps = ceil_div(s.vocab, plan.block_k);
  const int64_t row_tiles = ceil_div(s.n, int64_t{plan.block_m} * plan.cluster_m) * plan.cluster_m;
  const int64_t rows_of_parts = columns * plan.splits * s.n;  // a row in a tile of columns and a split
  const int64_t logits = columns * s.n * s.vocab * size_of(s.logits);
  const int64_t embedding = row_tiles * s.vocab * s.dim * size_of(s.embedding);
  const int64_t pairs = plan.splits * s.n * ceil_div(s.dim, 2) * 8;  // partial sums, stored two at a time

  Requests requests{};
  requests.flops = 2 * row_tiles * plan.block_m * columns * plan.block_n * steps * plan.block_k;
  switch (plan.kernel) {
    case Kernel::kRelaxedEmbeddingSm90:  // four lanes of a quad read the logsumexp of their rows
      requests.load_bytes = logits + rows_of_parts * 4 * 4;
      requests.bulk_bytes = row_tiles / plan.cluster_m * columns * steps * plan.block_k * plan.block_n * 2;
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
  // The reduction: parts, hard row, token and weight for each element; soft and output.
  requests.load_bytes += s.n * s.dim * (plan.splits * 4 + size_of(s.embedding) + 8 + 4);
  requests.store_bytes += s.n * s.dim * (4 + size_of(s.embedding));
  return requests;
}

}  // namespace entrgi
