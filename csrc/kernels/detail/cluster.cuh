// What the CTAs of a cluster tell each other: a reduction over all warps whose result every warp has.
#pragma once

#include "hopper.cuh"

#ifdef ENTRGI_HOPPER

namespace entrgi {

constexpr int kMaxCluster = 8;

// The value that `merge` makes of all lanes', in every lane: the same tree in each, so the same bits.
template <typename Record, typename Merge>
__device__ __forceinline__ Record reduce_across_warp(Record mine, Merge merge) {
  constexpr int kWords = sizeof(Record) / 4;
#pragma unroll 1
  for (int delta = 16; delta > 0; delta /= 2) {
    Record other;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
    uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = __shfl_xor_sync(~0u, from[i], delta);
    mine = merge(mine, other);
  }
  return mine;
}

// The CTAs that work on a row: a whole cluster, or one CTA of it alone. `kBytes` is the largest record.
template <int kThreads, int kBytes>
struct Group {
  static constexpr int kWarps = kThreads / 32;
  struct Mailbox {
    alignas(16) unsigned char slots[2][kMaxCluster * kWarps * kBytes];
  };

  Mailbox& mailbox;
  int size, rank;
  int turn = 0;

  __device__ __forceinline__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      __cluster_barrier_arrive();
      __cluster_barrier_wait();
    }
  }

  template <typename U>
  __device__ __forceinline__ U* in_cta(U* here, int other) const {
    return size == 1 ? here : static_cast<U*>(__cluster_map_shared_rank(here, other));
  }

  // Each warp writes its record to every CTA, so that nobody reads another's memory: after the barrier a CTA
  // may exit. Two sets of slots in turn: whoever writes a set again has passed the barrier after its reading.
  template <typename Record, typename Merge>
  __device__ Record reduce(Record mine, const Record& empty, Merge merge) {
    static_assert(sizeof(Record) <= kBytes && sizeof(Record) % 4 == 0 && kBytes % 16 == 0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Record* slots = reinterpret_cast<Record*>(mailbox.slots[turn]);
    turn ^= 1;
    mine = reduce_across_warp(mine, merge);
    if (lane < size) *in_cta(slots + rank * kWarps + warp, lane) = mine;
    sync();
    mine = empty;
    for (int i = lane; i < size * kWarps; i += 32) mine = merge(mine, slots[i]);
    return reduce_across_warp(mine, merge);
  }
};

}  // namespace entrgi
#endif
