// Memory of the logit update that its plan and its kernels must agree on.
#pragma once

#include <cstdint>

namespace entrgi {

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
};

}  // namespace entrgi
