// How the warps of a cluster tell each other what they found.
#pragma once

#include "../detail/hopper.cuh"
#include "../detail/numeric.cuh"
#include "tiles.h"

namespace entrgi {

#ifdef ENTRGI_CLUSTERS

__device__ __forceinline__ float sum_across_warp(float x) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) x += __shfl_xor_sync(~0u, x, delta);
  return x;
}

__device__ __forceinline__ uint64_t sum_across_warp(uint64_t x) {
  constexpr int kPiece = 22;  // bits: three pieces, and 32 of each add up in 32 bits
  constexpr uint32_t kMask = (1u << kPiece) - 1;
  const uint32_t low = __reduce_add_sync(~0u, static_cast<uint32_t>(x) & kMask);
  const uint32_t middle = __reduce_add_sync(~0u, static_cast<uint32_t>(x >> kPiece) & kMask);
  const uint32_t high = __reduce_add_sync(~0u, static_cast<uint32_t>(x >> 2 * kPiece));
  return low + (static_cast<uint64_t>(middle) << kPiece) + (static_cast<uint64_t>(high) << 2 * kPiece);
}

// The CTAs that work on a row: a whole cluster, or one CTA of it alone.
struct Cluster {
  static constexpr int kWarps = kClusterThreads / 32;
  static constexpr int kBytes = 40;  // of the largest record
  struct Mailbox {
    alignas(8) unsigned char slots[2][kMaxCluster * kWarps * kBytes];
  };

  Mailbox& mailbox;
  int size, rank;

  __device__ __forceinline__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      __cluster_barrier_arrive();
      __cluster_barrier_wait();
    }
  }

  // The address of what lies here, in another CTA.
  template <typename U>
  __device__ __forceinline__ U* in_cta(U* here, int other) const {
    return size == 1 ? here : static_cast<U*>(__cluster_map_shared_rank(here, other));
  }

  // Each warp writes its record to every CTA, so that nobody reads another's memory: after the barrier a CTA
  // may exit. What a lane gets back is merged from its share of all warps' records, in a fixed order; the
  // rest is up to the caller. There are two sets of slots: between two exchanges through the same set there
  // must be another barrier of the group, which whoever still reads the first has not passed.
  template <typename Record>
  __device__ __forceinline__ Record exchange(int set, const Record& mine, const Record& empty) {
    send(set, mine, size);
    return received(set, empty);
  }

  // Its halves: what is sent to so many CTAs, from the first on, and there received by whoever needs it.
  template <typename Record>
  __device__ __forceinline__ void send(int set, const Record& mine, int receivers) {
    static_assert(sizeof(Record) <= kBytes);
    const int thread = this_thread(), lane = thread % 32, warp = thread / 32;
    Record* slots = reinterpret_cast<Record*>(mailbox.slots[set]);
    if (lane < receivers) *in_cta(slots + rank * kWarps + warp, lane) = mine;
    sync();
  }
  template <typename Record>
  __device__ __forceinline__ Record received(int set, const Record& empty) const {
    const Record* slots = reinterpret_cast<const Record*>(mailbox.slots[set]);
    Record all = empty;
    for (int i = this_thread() % 32; i < size * kWarps; i += 32) all = merge(all, slots[i]);
    return all;
  }
};
#endif

}  // namespace entrgi
