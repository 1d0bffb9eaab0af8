// A ring of stages in shared memory between one producing thread and consuming warpgroups, as both products
// for Hopper use it.
//
//   producer   waits for `empty` of its place, announces the stage's bytes on `full`, issues the copies
//   consumer   waits for `full` of its place, multiplies, tells `empty` of every CTA that fills the stage
#pragma once

#include "hopper.cuh"

#ifdef ENTRGI_HOPPER
namespace entrgi {

// A stage of a ring of `stages` and how often, modulo two, it has been passed: the parity of its barriers.
struct RingPlace {
  uint32_t stage = 0, phase = 0;

  __device__ __forceinline__ void advance(uint32_t stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  // Over any number of steps at once.
  __device__ __forceinline__ void advance(uint32_t stages, uint32_t steps) {
    stage += steps;
    phase ^= stage / stages & 1;
    stage %= stages;
  }
};

// Stages of `kStageBytes` from a 1,024-byte boundary on; the barriers lie wherever the kernel keeps them.
template <int kStageBytes>
struct Ring {
  char* stages;
  Barrier *full, *empty;  // of each stage

  __device__ __forceinline__ char* stage(uint32_t index) const { return stages + index * kStageBytes; }
  // By one thread, before anything uses them: `full` completes with the producer's announcement and the bytes
  // announced, `empty` with `releases` arrivals of consumers.
  __device__ __forceinline__ void init(int count, uint32_t releases) const {
    for (int i = 0; i < count; ++i) {
      full[i].init(1);
      empty[i].init(releases);
    }
  }
};

// How CTAs of a cluster share what they load: those of one column of tiles (m of them, neighbours by rank)
// one operand, those of one row (n, each m ranks from the next) the other.
struct Sharing {
  int m, n, rank_m, rank_n;

  // Bits of the CTAs, this one among them, that get a copy which each of its column or of its row needs.
  __device__ __forceinline__ uint32_t column() const { return ((1 << m) - 1) << (rank() - rank_m); }
  __device__ __forceinline__ uint32_t row() const {
    return (n == 1 ? 1 : 1 + (1 << m)) << (rank() - rank_n * m);
  }
  __device__ static __forceinline__ int rank() { return static_cast<int>(cute::block_rank_in_cluster()); }
};

// Tells the producers that fill this CTA's stages, those of its row and of its column, that a warp has left
// one: one lane for each. At most two CTAs to a row.
struct Release {
  int target;
  bool sends;

  __device__ __forceinline__ Release(const Sharing& s, int lane)
      : target(Sharing::rank() + (lane < s.m ? lane - s.rank_m : (s.rank_n == 0 ? s.m : -s.m))),
        sends(lane < s.m + s.n - 1) {}
  __device__ __forceinline__ void operator()(const Barrier& empty) const { empty.arrive(target, sends); }
};

// Copies a box to this CTA or, where others are in `mask`, to all of those.
__device__ __forceinline__ void copy_shared_box(uint32_t mask, const CUtensorMap& map, Barrier& barrier,
                                                char* to, int row, int column, uint64_t cache_hint) {
  if ((mask & (mask - 1)) == 0) {
    copy_box(map, barrier, to, row, column, cache_hint);
  } else {
    copy_box_to(static_cast<uint16_t>(mask), map, barrier, to, row, column, cache_hint);
  }
}

}  // namespace entrgi
#endif
