// How the vocabulary is cut for the products that torch multiplies, for their plans and their launchers: one
// chunk of ids, all rows, [N, block_n] fp32 in the workspace; a CTA makes or applies kIds of one row.
#pragma once

#include <algorithm>

#include "../plan_families.h"

namespace entrgi {

struct MatmulChunk {
  static constexpr int kThreads = 256, kIds = 2048;

  int64_t first, ids;
  unsigned ctas;  // of a row

  static MatmulChunk at(int64_t first, int64_t vocab, const Plan& plan) {
    const int64_t ids = std::min<int64_t>(plan.block_n, vocab - first);
    return {first, ids, static_cast<unsigned>(ceil_div(ids, kIds))};
  }
};

// CTAs of a row in all chunks.
inline int64_t matmul_ctas(int64_t vocab, const Plan& plan) {
  const int64_t last = vocab / plan.block_n * plan.block_n;
  return last / plan.block_n * MatmulChunk::at(0, vocab, plan).ctas + MatmulChunk::at(last, vocab, plan).ctas;
}

}  // namespace entrgi
