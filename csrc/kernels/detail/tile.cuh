// Tiles of row-major matrices in shared memory: 16-byte chunks, swizzled by row so that the reads of the
// kernels touch every bank once, filled by cp.async from rows of any alignment.
#pragma once

#include "mma.cuh"

namespace entrgi {

// The largest unit in which every row can be copied: 16, 8 or 4 bytes asynchronously, else 2 by plain loads.
inline int copy_granule(const void* base, int64_t stride, int64_t element_bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(base) | static_cast<uint64_t>(stride * element_bytes);
  for (int granule = 16; granule > 2; granule /= 2) {
    if (bits % granule == 0) return granule;
  }
  return 2;
}

// How the chunk index is permuted within a row, by who reads it.
enum class Swizzle {
  kMatrixOf64,    // ldmatrix, rows of 64 bytes, eight consecutive ones
  kPermuted,      // ldmatrix, rows of 128 bytes and more, rows {0, 1, 4, 5, 8, 9, 12, 13} (+ 2)
  kFourElements,  // a quarter-warp (16-bit: half-warp) reads four elements per lane, four lanes to a row
};

template <typename T, int kRows, int kColumns, Swizzle kSwizzle>
struct Tile {
  static constexpr int kRowBytes = kColumns * sizeof(T), kBytes = kRows * kRowBytes;
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kChunks = kColumns / kChunk;
  static_assert(kChunks >= (sizeof(T) == 4 || kSwizzle == Swizzle::kPermuted ? 8 : 4));

  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    int mask;
    if constexpr (kSwizzle == Swizzle::kMatrixOf64) mask = row >> 1 & 3;
    if constexpr (kSwizzle == Swizzle::kPermuted) mask = (row & 1) | (row >> 1 & 6);
    if constexpr (kSwizzle == Swizzle::kFourElements) mask = sizeof(T) == 4 ? (row & 1) * 4 : row & 2;
    return (row * kChunks + (chunk ^ mask)) * 16;
  }

  // Fills the tile from columns [column, column + kColumns) of a matrix with `columns` columns;
  // `offset_of(r)` is where row r starts, in elements, or negative for a row of zeros.
  template <int kThreads, typename OffsetOf>
  __device__ static __forceinline__ void fill(uint32_t to, const T* matrix, OffsetOf offset_of,
                                              int64_t column, int64_t columns, int granule) {
    if (granule == 16) {
#pragma unroll
      for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
        const int index = i * kThreads + threadIdx.x;
        if (kRows * kChunks % kThreads != 0 && index >= kRows * kChunks) break;
        // Row and chunk of `index`, so that the addresses are one register and constants: from index /
        // kChunks and index % kChunks the compiler keeps one for each copy.
        const int row = threadIdx.x / kChunks + i * (kThreads / kChunks), chunk = threadIdx.x % kChunks;
        static_assert(kThreads % kChunks == 0);
        copy<16>(to, matrix, offset_of, column, columns, row, chunk * kChunk);
      }
    } else if (granule == 8) {
      fill_by<kThreads, 8>(to, matrix, offset_of, column, columns);
    } else if (granule == 4) {
      fill_by<kThreads, 4>(to, matrix, offset_of, column, columns);
    } else {
      fill_by<kThreads, 2>(to, matrix, offset_of, column, columns);
    }
  }

 private:
  // In a loop, for seldom: it takes few registers.
  template <int kThreads, int kGranule, typename OffsetOf>
  __device__ static __forceinline__ void fill_by(uint32_t to, const T* matrix, OffsetOf offset_of,
                                                 int64_t column, int64_t columns) {
    constexpr int kUnit = kGranule / static_cast<int>(sizeof(T)) > 0 ? kGranule / sizeof(T) : 1;
    constexpr int kUnits = kColumns / kUnit;
#pragma unroll 1
    for (int index = threadIdx.x; index < kRows * kUnits; index += kThreads) {
      copy<kGranule>(to, matrix, offset_of, column, columns, index / kUnits, index % kUnits * kUnit);
    }
  }

  template <int kGranule, typename OffsetOf>
  __device__ static __forceinline__ void copy(uint32_t to, const T* matrix, OffsetOf offset_of,
                                              int64_t column, int64_t columns, int row, int c) {
    const int64_t start = offset_of(row);
    const int64_t left = (columns - column - c) * static_cast<int64_t>(sizeof(T));
    const int valid = start < 0 || left <= 0 ? 0 : left < kGranule ? static_cast<int>(left) : kGranule;
    const T* from = valid > 0 ? matrix + start + column + c : matrix;
    const uint32_t target = to + offset(row, c / kChunk) + c % kChunk * static_cast<uint32_t>(sizeof(T));
    if constexpr (kGranule >= 4) {
      copy_async<kGranule>(target, from, valid);
    } else if constexpr (sizeof(T) == 2) {
      const uint16_t bits = valid > 0 ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(target), "h"(bits) : "memory");
    }
  }
};

}  // namespace entrgi
