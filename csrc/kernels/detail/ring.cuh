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

}  // namespace entrgi
#endif
