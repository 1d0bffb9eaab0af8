// The dialect in which every family of operators plans: it lists the candidates that can serve a shape, in
// the order of preference, `narrow` leaves those that have what was asked for, and the family takes the best.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "plan.h"

namespace entrgi {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// One tile that a kernel was compiled with. Plans and launchers read the same lists (tiles.h of each family).
struct BuiltTile {
  int block_m, block_n, block_k;  // of the output, and a step of the reduction
  int stages;                     // of the ring; 0: as many as shared memory holds
  int threads;
  int warps_m = 0;  // warps along the rows, of the kernels for sm_80
  int ctas = 1;     // of a multiprocessor at once, that a plan counts on

  constexpr bool is_of(const Plan& p) const {
    return p.block_m == block_m && p.block_n == block_n && p.block_k == block_k && p.threads == threads &&
           (stages == 0 ? p.stages >= 2 : p.stages == stages);
  }
};

inline Plan plan_of(Kernel kernel, const BuiltTile& tile) {
  return {kernel, tile.block_m, tile.block_n, tile.block_k, tile.stages, tile.threads};
}

// Of the kernels that leave nothing to choose: ids of a row in a CTA of gumbel_perturb and
// statistics_backward; commit has the threads alone.
constexpr BuiltTile kElementwise{0, 2048, 0, 0, 256};

// What plans of matrix products take for granted of a list.
template <size_t kCount>
constexpr bool ascends_in_rows(const BuiltTile (&tiles)[kCount]) {
  for (size_t i = 1; i < kCount; ++i) {
    if (tiles[i].block_m <= tiles[i - 1].block_m) return false;
  }
  return true;
}

// The kernel that was asked for, or the first of the possible ones, which are possible `where`.
Kernel choose_kernel(const std::vector<Kernel>& possible, const PlanOverrides& asked, std::string_view where);

// The same for a product with the embedding, whose kernels these are. fp32 embeddings are torch's product
// from kMatmulRows rows on; sm_90 needs logits of the embedding's type or fp32, in aligned rows, and what TMA
// counts to fit 32 bits.
struct ProductKernels {
  Kernel sm90, sm80, simt, matmul;
};
constexpr int64_t kMatmulRows = 128;
Kernel choose_kernel(const ProductKernels& built, const Shape& shape, const Device& device,
                     const PlanOverrides& asked);

// Leaves the candidates, all of one kernel, that have what was asked for.
void narrow(std::vector<Plan>& candidates, const PlanOverrides& asked);

// Leaves the candidates whose field is `wanted`, where there are any.
void prefer(std::vector<Plan>& candidates, int Plan::* field, int wanted);

// Leaves the tile that holds all rows, the first of them, else the last.
void prefer_tile_of_rows(std::vector<Plan>& candidates, int64_t rows);

// The only candidate of a product that torch multiplies, in chunks of block_n ids. workspace_bytes is that of
// a chunk alone.
Plan plan_matmul(Kernel kernel, const Shape& shape, const PlanOverrides& asked);

Plan plan_vocab_pass(Op op, const Shape& shape, const Device& device, const PlanOverrides& asked);
Plan plan_relaxed_embedding(const Shape& shape, const Device& device, const PlanOverrides& asked);
Plan plan_logit_update(const Shape& shape, const Device& device, const PlanOverrides& asked);

Requests vocab_pass_requests(Op op, const Shape& shape, const Plan& plan);
Requests relaxed_embedding_requests(const Shape& shape, const Plan& plan);
Requests logit_update_requests(Op op, const Shape& shape, const Plan& plan, int64_t step, bool last);

}  // namespace entrgi
