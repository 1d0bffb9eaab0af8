// Hopper's asynchronous machinery, as thin as CUTLASS's headers allow: tensor copies that complete on an
// mbarrier, warpgroup matrix products, operand descriptors. Kernels that use it have a body on sm_90a only:
//
//     #ifdef ENTRGI_HOPPER
#pragma once

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ENTRGI_HOPPER
#endif

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "mma.cuh"

namespace entrgi {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarpgroup = 128;

// Where copies of rarely (E: no) and often (G, z: yes) read data rank in L2.
constexpr uint64_t kKeepInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
constexpr uint64_t kStreamThroughL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

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
