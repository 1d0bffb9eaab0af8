// How relaxed_embedding_sm90 deals its tiles out to clusters, for its plan and its launcher.
#pragma once

#include "plan_operators.h"

namespace entrgi {

struct RelaxedEmbeddingTiles {
  int64_t rows, columns;  // tiles of N and of d
  int64_t groups, rest;   // row tiles: how many times cluster_m of them, and those that are left
  int rest_n;             // CTAs along the columns that share the logits of a row tile that is left
  int64_t clusters;       // for one part of the vocabulary

  RelaxedEmbeddingTiles(int64_t n, int64_t dim, const Plan& plan)
      : rows(ceil_div(n, plan.block_m)),
        columns(ceil_div(dim, plan.block_n)),
        groups(rows / plan.cluster_m),
        rest(rows % plan.cluster_m),
        rest_n(rest > 0 && columns % 2 == 0 ? 2 : 1),
        clusters(groups * (columns / plan.cluster_n) +
                 rest * ceil_div(columns, plan.cluster_m * plan.cluster_n)) {}
};

}  // namespace entrgi
