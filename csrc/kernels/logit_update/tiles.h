// What the logit update was compiled with, and how its memory is laid out: for the plan and the launchers.
#pragma once

#include <algorithm>

#include "../plan_families.h"

namespace entrgi::logit_update_tiles {

constexpr BuiltTile kSm90[] = {{64, 256, 64, 3, 384}, {128, 128, 64, 4, 384}};
constexpr BuiltTile kSm80[] = {{16, 256, 32, 4, 128, 1}, {64, 128, 32, 4, 128, 2}, {128, 128, 32, 4, 128, 2}};
constexpr BuiltTile kSimt[] = {{16, 256, 16, 2, 256}, {64, 128, 16, 2, 256}, {128, 128, 16, 2, 256}};
static_assert(ascends_in_rows(kSm90) && ascends_in_rows(kSm80) && ascends_in_rows(kSimt),
              "a plan takes the first tile that holds all rows");

// Workspace: inner[n] = G[rows[n]] . e_soft[n], then, for TMA and torch, the gathered rows of G, whose
// padding rows are 0. `pitch` is in elements, `offset` in bytes; both keep rows on 16-byte boundaries.
struct GatheredGrad {
  static constexpr int64_t pitch(int64_t dim) { return (dim + 7) / 8 * 8; }
  static constexpr int64_t offset(int64_t n) { return (n * 4 + 127) / 128 * 128; }
  static constexpr int64_t end(int64_t n, int64_t dim, int64_t element_bytes) {
    return offset(n) + n * pitch(dim) * element_bytes;
  }
};

// Shared memory of logit_update_sm90: the ring, the products that each consuming warp passes through it, two
// barriers for every stage and one for each consumer.
struct UpdateShared {
  static constexpr int kStep = 64;                            // of d: 128 bytes, a row of the swizzle
  static constexpr int kChunkRows = 16, kChunkColumns = 128;  // of a warp
  static constexpr int kChunkPitch = kChunkColumns + 8;       // floats: rows start 8 banks apart
  static constexpr int kChunkBytes = kChunkRows * kChunkPitch * 4;
  static constexpr int kConsumerWarps = 8;

  static constexpr int stage(int block_m, int block_n) { return (block_m + block_n) * kStep * 2; }
  static constexpr int chunks(int block_m, int block_n, int stages) {
    return stages * stage(block_m, block_n);
  }
  static constexpr int barriers(int block_m, int block_n, int stages) {
    return chunks(block_m, block_n, stages) + kConsumerWarps * kChunkBytes;
  }
  static constexpr int bytes(int block_m, int block_n, int stages) {
    return barriers(block_m, block_n, stages) + (2 * stages + 2) * 8;
  }
  static constexpr int bytes(const BuiltTile& t) { return bytes(t.block_m, t.block_n, t.stages); }
};
static_assert(kSm90[0].block_k == UpdateShared::kStep && kSm90[1].block_k == UpdateShared::kStep,
              "a stage holds one row of the swizzle of each operand's rows");
static_assert(std::max(UpdateShared::bytes(kSm90[0]), UpdateShared::bytes(kSm90[1])) <= kHopperSharedBytes,
              "every tile for sm_90 fits the shared memory of a CTA");

// Shared memory of logit_update_sm80: the ring and where each row of G starts, then, in their place, the
// products. These have eight floats more to a row: the eight rows and four pairs of columns that a warp
// stores do not meet in a bank.
struct Sm80Shared {
  static constexpr int pitch(int block_n) { return block_n + 8; }
  static constexpr int bytes(int block_m, int block_n, int block_k, int stages) {
    const int ring = stages * block_k * (block_m + block_n) * 2 + block_m * static_cast<int>(sizeof(int64_t));
    return std::max(ring, block_m * pitch(block_n) * static_cast<int>(sizeof(float)));
  }
};

}  // namespace entrgi::logit_update_tiles
