// Launch plan of the products of fp32 E that torch multiplies: the chunks of the vocabulary.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "matmul_layout.h"

namespace entrgi {
namespace {

constexpr int64_t kMostChunkBytes = 64 << 20;
constexpr int64_t kGranule = 256;  // ids

// Chunks of about the same size, none above the limit unless so many rows leave no choice.
int64_t ids_of_chunk(const Shape& s) {
  const int64_t fitting = kMostChunkBytes / 4 / std::max<int64_t>(s.n, 1) / kGranule * kGranule;
  const int64_t chunks = ceil_div(s.vocab, std::max(fitting, kGranule));
  return ceil_div(ceil_div(s.vocab, chunks), kGranule) * kGranule;
}

}  // namespace

Plan plan_matmul(Kernel kernel, const Shape& s, const PlanOverrides& overrides) {
  if (overrides.block_n % 4 != 0) {
    throw std::invalid_argument(std::string("block_n must be a multiple of 4 for ") + name_of(kernel) +
                                ", got " + std::to_string(overrides.block_n));
  }
  Plan plan{kernel};
  plan.block_n = overrides.block_n > 0 ? overrides.block_n : static_cast<int>(ids_of_chunk(s));
  plan.threads = MatmulChunk::kThreads;
  plan.grid = s.n * MatmulChunk::at(0, s.vocab, plan).ctas;
  plan.workspace_bytes = s.n * plan.block_n * static_cast<int64_t>(sizeof(float));
  return plan;
}

}  // namespace entrgi
