// What the relaxed embedding was compiled with, and how its memory is laid out: for the plan and the
// launchers.
//
//   N          16-bit E, sm_90a, rows of z and E aligned,    16-bit E, else     fp32 E
//              z of E's type or fp32
//   ... 16     sm90   64 x 256                               sm80   16 x 256    simt  16 x 256
//   ... 64     sm90   64 x 256                               sm80   64 x 128    simt  64 x 128
//   65 ...     sm90  128 x 256 or 192 x 192, clusters        sm80  128 x 128    simt 128 x 128
//   128 ...                                                                     matmul
#pragma once

#include "../plan_families.h"

namespace entrgi::relaxed_embedding_tiles {

constexpr BuiltTile kSm90[] = {{64, 256, 64, 0, 256}, {128, 256, 64, 0, 384}, {192, 192, 64, 0, 512}};
constexpr BuiltTile kSm80[] = {
    {16, 256, 32, 4, 128, 1, 2}, {64, 128, 32, 4, 128, 4, 2}, {128, 128, 32, 3, 128, 4, 2}};
constexpr BuiltTile kSimt[] = {
    {16, 256, 16, 2, 256, 0, 2}, {64, 128, 16, 2, 256, 0, 2}, {128, 128, 16, 2, 256}};
static_assert(ascends_in_rows(kSm90) && ascends_in_rows(kSm80) && ascends_in_rows(kSimt),
              "a plan takes the first tile that holds all rows");

struct Cluster {
  int m, n;
};
constexpr Cluster kClusters[] = {{1, 1}, {2, 1}, {4, 1}, {1, 2}, {2, 2}};

// Bytes of z and E in a stage of the ring.
constexpr int64_t stage_bytes(int block_m, int block_n, int block_k, int64_t z_bytes, int64_t e_bytes) {
  return block_k * (block_m * z_bytes + block_n * e_bytes);
}
// sm90: a full and an empty barrier for each stage. sm80: where each row of z starts.
constexpr int64_t sm90_bytes(int64_t stage, int stages) {
  return stages * (stage + 2 * static_cast<int64_t>(sizeof(uint64_t)));
}
constexpr int64_t sm80_bytes(int64_t stage, int stages, int block_m) {
  return stages * stage + block_m * static_cast<int64_t>(sizeof(int64_t));
}
constexpr bool fits_two_stages(const BuiltTile& tile) {
  return sm90_bytes(stage_bytes(tile.block_m, tile.block_n, tile.block_k, 4, 2), 2) <= kHopperSharedBytes;
}
static_assert(fits_two_stages(kSm90[0]) && fits_two_stages(kSm90[1]) && fits_two_stages(kSm90[2]),
              "every tile for sm_90 has room for two stages, of fp32 logits too");

// How relaxed_embedding_sm90 deals its tiles out to clusters.
struct Dealt {
  int64_t rows, columns;  // tiles of N and of d
  int64_t groups, rest;   // row tiles: how many times cluster_m of them, and those that are left
  int rest_n;             // CTAs along the columns that share the logits of a row tile that is left
  int64_t clusters;       // for one part of the vocabulary

  Dealt(int64_t n, int64_t dim, const Plan& plan)
      : rows(ceil_div(n, plan.block_m)),
        columns(ceil_div(dim, plan.block_n)),
        groups(rows / plan.cluster_m),
        rest(rows % plan.cluster_m),
        rest_n(rest > 0 && columns % 2 == 0 ? 2 : 1),
        clusters(groups * (columns / plan.cluster_n) +
                 rest * ceil_div(columns, plan.cluster_m * plan.cluster_n)) {}
};

}  // namespace entrgi::relaxed_embedding_tiles
