// How the vocabulary pass cuts rows, and how its memory is laid out: for the plan and the kernels.
#pragma once

#include <algorithm>

#include "../plan_families.h"

namespace entrgi {

// vocab_pass: a CTA has a row, or one of several parts of it.
constexpr int kSplitThreads = 512;
constexpr int64_t kPartialStateBytes = 32;  // statistics of one part of one row
inline int64_t state_bytes(const Plan& plan) {
  return plan.splits > 1 ? plan.grid * kPartialStateBytes : 0;
}

// vocab_pass_sm90: a cluster holds a row, each CTA a slice of it. A slice is dynamic shared memory, beside
// what the search and the exchange keep in static.
constexpr int kClusterThreads = 256;
constexpr int kMaxCluster = 8;
constexpr int kCtasPerSm = 4;
constexpr int64_t kSliceBytes = 37 * 1024 + 512;
constexpr int64_t kMinSliceBytes = 8 * 1024;  // the pool of candidates takes the place of a slice
constexpr int64_t kMaxSliceBytes = 208 * 1024;
constexpr int64_t kSearchBytes = 18'864;  // at most: DrawShared
static_assert(kCtasPerSm * (kSliceBytes + kSearchBytes + 1024) <= 228 * 1024,
              "four CTAs, each with a slice, its search and 1 KB of the system's, share the 228 KB of an SM");
static_assert(kMaxSliceBytes + kSearchBytes <= kHopperSharedBytes,
              "the longest slice and the search fit what one CTA may have");

inline int64_t slice_bytes(const Shape& s, int64_t cluster) {
  const int64_t per_unit = 16 / size_of(s.logits);
  const int64_t units = ceil_div(s.vocab + per_unit - 1, per_unit);  // rows may start anywhere in one
  return std::max(ceil_div(units, cluster) * 16, kMinSliceBytes);
}

}  // namespace entrgi
