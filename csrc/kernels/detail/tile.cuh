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
  kMatrixOf128,   // ldmatrix, rows of 128 bytes, eight consecutive ones
  kPermuted,      // ldmatrix, rows of 128 bytes and more, rows {0, 1, 4, 5, 8, 9, 12, 13} (+ 2)
  kFourElements,  // a quarter-warp (16-bit: half-warp) reads four elements per lane, four lanes to a row
  kPairs,         // a half-warp reads two fp32 per lane, four lanes to a row, eight rows and more
};

template <typename T, int kRows, int kColumns, Swizzle kSwizzle>
struct Tile {
  static constexpr int kRowBytes = kColumns * sizeof(T), kBytes = kRows * kRowBytes;
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kChunks = kColumns / kChunk;
  static constexpr bool kEightChunks =
      sizeof(T) == 4 || kSwizzle == Swizzle::kPermuted || kSwizzle == Swizzle::kMatrixOf128;
  static_assert(kChunks >= (kEightChunks ? 8 : 4));

  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    int mask;
    if constexpr (kSwizzle == Swizzle::kMatrixOf64) mask = row >> 1 & 3;
    if constexpr (kSwizzle == Swizzle::kMatrixOf128) mask = row & 7;
    if constexpr (kSwizzle == Swizzle::kPermuted) mask = (row & 1) | (row >> 1 & 6);
    if constexpr (kSwizzle == Swizzle::kFourElements) mask = sizeof(T) == 4 ? (row & 1) * 4 : row & 2;
    if constexpr (kSwizzle == Swizzle::kPairs) mask = (row & 3) * 2;
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
    } else {
      fill_rolled<kThreads>(to, matrix, offset_of, column, columns, granule);
    }
  }

  // The same in a loop, for seldom: it takes few registers.
  template <int kThreads, typename OffsetOf>
  __device__ static __forceinline__ void fill_rolled(uint32_t to, const T* matrix, OffsetOf offset_of,
                                                     int64_t column, int64_t columns, int granule) {
    if (granule == 16) {
      fill_by<kThreads, 16>(to, matrix, offset_of, column, columns);
    } else if (granule == 8) {
      fill_by<kThreads, 8>(to, matrix, offset_of, column, columns);
    } else if (granule == 4) {
      fill_by<kThreads, 4>(to, matrix, offset_of, column, columns);
    } else {
      fill_by<kThreads, 2>(to, matrix, offset_of, column, columns);
    }
  }

  // For whole steps: the tile's part of every row is inside the matrix, and rows are equally far apart. Unit
  // of kGranule bytes `threadIdx.x % kUnits` of row `threadIdx.x / kUnits` is this thread's first; the others
  // are kApart rows further each time.
  template <int kThreads, int kGranule>
  struct Rows {
    static constexpr int kUnits = kRowBytes / kGranule, kApart = kThreads / kUnits, kCount = kRows / kApart;
    static_assert(kThreads % kUnits == 0 && kRows % kApart == 0 && 32 % kApart == 0 && kRows % 32 == 0);

    // Where the i-th unit goes. Rows eight apart are swizzled alike: a few addresses and constants.
    __device__ static __forceinline__ uint32_t target(int i) {
      constexpr int kAlike = kApart < 8 ? 8 / kApart : 1;
      const int byte = threadIdx.x % kUnits * kGranule, row = threadIdx.x / kUnits + i % kAlike * kApart;
      return offset(row, byte / 16) + byte % 16 + i / kAlike * kAlike * kApart * kRowBytes;
    }
  };

  // Copies from `from`, this thread's first unit, and `apart` = kApart rows further each time. Rows that are
  // not there are left as they are.
  template <int kThreads, int kGranule>
  __device__ static __forceinline__ void fill_inside(uint32_t to, const T* from, int64_t apart,
                                                     uint32_t (&rows)[kRows / 32]) {
    using R = Rows<kThreads, kGranule>;
#pragma unroll 1
    for (int word = 0; word < kRows / 32; ++word, to += 32 * kRowBytes) {
      const uint32_t here = next(rows);
#pragma unroll
      for (int i = 0; i < 32 / R::kApart; ++i, advance(from, apart)) {
        if (here >> i * R::kApart & 1) copy_async<kGranule>(to + R::target(i), from, kGranule);
      }
    }
  }

  // The same for rows that start in the middle of a word, one row of 32 pairs a warp: lane l loads the word
  // of elements 2l + 1 and 2l + 2, lane i also element 0 of the i-th row, and pairs (2l, 2l + 1) are put
  // together by shuffles. Element kColumns, which lane 31 loads, must be inside the matrix. The loads of a
  // batch of 32 kWords rows are in flight at once.
  template <int kThreads>
  __device__ static __forceinline__ void fill_inside_shifted(uint32_t to, const T* from, int64_t apart,
                                                             uint32_t (&rows)[kRows / 32]) {
    using R = Rows<kThreads, 4>;
    static_assert(sizeof(T) == 2 && R::kUnits == 32 && R::kApart == 4 && kRows % 64 == 0);
    constexpr int kWords = 2, kBatch = 8 * kWords;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int batch = 0; batch < R::kCount / kBatch; ++batch, to += 32 * kWords * kRowBytes) {
      uint32_t here = 0;  // bit i: the i-th row of the batch
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint32_t every_fourth = next(rows);
#pragma unroll
        for (int i = 0; i < 8; ++i) here |= (every_fourth >> i * 4 & 1) << (word * 8 + i);
      }
      uint32_t head = 0, words[kBatch];
      if (here >> lane & 1) {
        head = __ldg(reinterpret_cast<const uint16_t*>(from - 2 * lane + lane * apart));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i, advance(from, apart)) {
        words[i] = here >> i & 1 ? __ldg(reinterpret_cast<const unsigned*>(from + 1)) : 0;
      }
      __syncwarp();
      head <<= 16;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32_t left = __shfl_up_sync(~0u, words[i], 1), first = __shfl_sync(~0u, head, i);
        words[i] = __byte_perm(lane == 0 ? first : left, words[i], 0x5432);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (here >> i & 1) {
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + R::target(i)), "r"(words[i]) : "memory");
        }
      }
    }
  }

 private:
  // From a plain addition the compiler makes multiples of `apart` and keeps them all.
  __device__ static __forceinline__ void advance(const T*& from, int64_t apart) {
    from += apart;
    asm volatile("" : "+l"(from));
  }

  // Goes round the words of a mask, so that they stay in registers in a loop.
  __device__ static __forceinline__ uint32_t next(uint32_t (&words)[kRows / 32]) {
    const uint32_t word = words[0];
#pragma unroll
    for (int i = 1; i < kRows / 32; ++i) words[i - 1] = words[i];
    return words[kRows / 32 - 1] = word;
  }

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
