// Hopper's asynchronous machinery, as thin as CUTLASS's headers allow: mbarriers, copies that complete on
// them, warpgroup matrix products, operand descriptors. Kernels that use it have a body only where it exists:
//
//     #ifdef ENTRGI_CLUSTERS    clusters, mbarriers, bulk copies: compute capability 9.0 and newer
//     #ifdef ENTRGI_HOPPER      tensor maps and wgmma besides: sm_90a alone
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ENTRGI_CLUSTERS
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ENTRGI_HOPPER
#endif

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "mma.cuh"

namespace entrgi {

constexpr int kWarpgroup = 128;

// A value that is the same in all lanes of a warp, known to be: what comes from threadIdx.x the compiler
// takes to differ, keeps out of uniform registers and moves there for every descriptor and barrier (R2UR).
__device__ __forceinline__ int uniform(int value) {
  return __shfl_sync(~0u, value, 0);
}

#ifdef ENTRGI_CLUSTERS
// An mbarrier in shared memory. CUTLASS's own does not tell the compiler that it orders memory, and asserts
// that it counts something: an assertion is a function call, even one that is never made, and where a kernel
// has one ptxas runs its matrix products one at a time.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ uint32_t address() const { return shared_address(&word); }

  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  // Until the phase of that parity is complete.
  __device__ __forceinline__ void wait(uint32_t parity) const {
#ifdef ENTRGI_BOUNDED_WAITS
    for (const long long start = clock64(); !try_wait(parity);) {
      if (clock64() - start > kLongestWait) __trap();
    }
#else
    while (!try_wait(parity)) {
    }
#endif
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // On the barrier at the same place in another CTA of the cluster.
  __device__ __forceinline__ void arrive(uint32_t cta, bool sends = true) const {
    asm volatile(
        "{.reg .pred p;\n .reg .b32 there;\n setp.ne.b32 p, %2, 0;\n"
        " @p mapa.shared::cluster.u32 there, %0, %1;\n"
        " @p mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(address()),
        "r"(cta), "r"(int{sends})
        : "memory");
  }
  // This thread's arrival, and the bytes of copies that complete the phase together with it.
  __device__ __forceinline__ void arrive_and_expect_tx(uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
  }

 private:
  // Some seconds, after which a wait that nobody ends is an error with a place (build option).
  static constexpr long long kLongestWait = 4'000'000'000;

  __device__ __forceinline__ bool try_wait(uint32_t parity) const {
    uint32_t complete;
    asm volatile(
        "{.reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
        : "=r"(complete)
        : "r"(address()), "r"(parity)
        : "memory");
    return complete != 0;
  }
};

// Makes initialised barriers known to the copy engine and to the cluster; a barrier of the threads has to
// follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Copies bytes, a multiple of 16, between 16-byte boundaries; they complete on `barrier`.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier.address())
      : "memory");
}
#endif

// How long L2 keeps what is copied: read once, by several CTAs at about the same time, again and again.
constexpr uint64_t kNormalInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint64_t kKeepInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
constexpr uint64_t kStreamThroughL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

#ifdef ENTRGI_HOPPER
// Copies the box at (row, column) of a tensor map to shared memory; its bytes complete on `barrier`.
__device__ __forceinline__ void copy_box(const CUtensorMap& map, Barrier& barrier, void* to, int64_t row,
                                         int64_t column, uint64_t cache_hint) {
  cute::SM90_TMA_LOAD_2D::copy(&map, reinterpret_cast<uint64_t*>(&barrier), cache_hint, to,
                               static_cast<int32_t>(column), static_cast<int32_t>(row));
}

// The same into every CTA of `mask` in the cluster, at the same offsets, each on its own barrier.
__device__ __forceinline__ void copy_box_to(uint16_t mask, const CUtensorMap& map, Barrier& barrier, void* to,
                                            int64_t row, int64_t column, uint64_t cache_hint) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, reinterpret_cast<uint64_t*>(&barrier), mask, cache_hint, to,
                                         static_cast<int32_t>(column), static_cast<int32_t>(row));
}
#endif

// Descriptor of a wgmma operand in shared memory under the 128-byte swizzle. The offsets are in bytes; what
// they mean depends on the operand's major direction (PTX ISA, "matrix descriptor").
__device__ __forceinline__ uint64_t operand(uint32_t address, int leading_bytes, int stride_bytes) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = address >> 4;
  descriptor.bitfield.leading_byte_offset_ = leading_bytes >> 4;
  descriptor.bitfield.stride_byte_offset_ = stride_bytes >> 4;
  descriptor.bitfield.base_offset_ = 0;
  descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return descriptor;
}

// d (+)= a b for a CuTe atom with both operands in shared memory, or a in registers.
template <typename Atom, size_t kN>
__device__ __forceinline__ void wgmma(float (&d)[kN], uint64_t a, uint64_t b, bool accumulate) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    Atom::fma(a, b, d[i]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }(std::make_index_sequence<kN>{});
}
template <typename Atom, size_t kN>
__device__ __forceinline__ void wgmma(float (&d)[kN], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    Atom::fma(a[0], a[1], a[2], a[3], b, d[i]...,
              accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }(std::make_index_sequence<kN>{});
}

}  // namespace entrgi
