// A tile of a matrix product in full fp32 on the ordinary cores: 256 threads, reduction in steps of 16
// through two buffers. For fp32 embeddings, where tensor cores would round to TF32.
//
//   threads lie x (columns) by y (rows); a thread's outputs are groups of four, far apart:
//   rows    y 4 ... y 4 + 3  (+ kM / kGroupsM)        columns    x 4 ... x 4 + 3  (+ kN / kGroupsN)
//
// so that a warp's reads of b in 16-byte pieces are consecutive and those of a are broadcasts. Clocks of an
// SM for each step of k and warp (assumed, from issue rates): 128 x 128: 16 for the products, 6 for shared
// memory; 64 x 128: 8 and 5; 16 x 256: 4 and 5, where the embedding's bytes take longer than both.
#pragma once

#include <cstdint>

#include "../plan_families.h"

namespace entrgi {

constexpr int kSimtThreads = 256, kSimtStep = 16;

template <int kTileM, int kTileN, int kRowGroups, int kColumnGroups>
struct SimtTile {
  static constexpr int kM = kTileM, kN = kTileN;
  static constexpr int kGroupsM = kRowGroups, kGroupsN = kColumnGroups;
  static constexpr int kX = kN / (4 * kGroupsN), kY = kM / (4 * kGroupsM);
  static_assert(kX * kY == kSimtThreads);
  // 64 sums a thread leave room for one CTA on an SM, 32 for two.
  static constexpr int kCtasPerSm = kGroupsM * kGroupsN > 2 ? 1 : 2;

  // Padded: stores of a column hit different banks, and 16-byte alignment stays.
  struct Shared {
    float a[2][kSimtStep][kM + 4], b[2][kSimtStep][kN + 4];
  };
  using Accumulator = float[kGroupsM][4][kGroupsN][4];

  __device__ static __forceinline__ int x() { return threadIdx.x % kX; }
  __device__ static __forceinline__ int y() { return threadIdx.x / kX; }
  __device__ static __forceinline__ int row(int group, int i) {
    return group * (kM / kGroupsM) + y() * 4 + i;
  }
  __device__ static __forceinline__ int column(int group) { return group * (kN / kGroupsN) + x() * 4; }

  // accumulator += sum over k < length of finish(row, a(row, k)) b(k, column).
  //
  // a(row, k) = a[a_offset(row) + k]; where the offset is negative the row's elements are `nothing`. `b`
  // points at b(0, 0), of which `columns` exist: rows `b_stride` apart are contiguous along columns or, as
  // kTransposed, in k. Pointers advance in registers and what exists is a bit, so that a load is three
  // instructions. `finish` is applied when the element has arrived, so that its arithmetic does not hold up
  // the loads.
  template <bool kTransposed, typename A, typename OffsetA, typename Finish>
  __device__ static __forceinline__ void product(Accumulator& accumulator, int64_t length, Shared& shared,
                                                 const A* a_begin, OffsetA a_offset, A nothing, Finish finish,
                                                 const float* b_begin, int64_t b_stride, int64_t columns) {
    constexpr int kLoadsA = kM * kSimtStep / kSimtThreads, kLoadsB = kN * kSimtStep / kSimtThreads;
    constexpr int kRowsAtOnce = kSimtThreads / kSimtStep;
    static_assert(kSimtThreads % kN == 0);
    const int k_index = threadIdx.x % kSimtStep, row_index = threadIdx.x / kSimtStep;
    // Element i of a thread's share of b.
    const auto b_k = [&](int i) {
      return kTransposed ? k_index : (i * kSimtThreads + static_cast<int>(threadIdx.x)) / kN;
    };
    const auto b_column = [&](int i) {
      return kTransposed ? row_index + i * kRowsAtOnce : static_cast<int>(threadIdx.x) % kN;
    };
    // From one of them to the next, and from the last to the first of the next step.
    const int64_t b_hop = (kTransposed ? kRowsAtOnce : kSimtThreads / kN) * b_stride;
    const int64_t b_return = kTransposed ? kSimtStep - kLoadsB * b_hop : 0;

    const A* a_pointer[kLoadsA];
    unsigned a_exists = 0, b_exists = 0;
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i) {
      const int64_t offset = a_offset(row_index + i * kRowsAtOnce);
      a_exists |= static_cast<unsigned>(offset >= 0) << i;
      a_pointer[i] = a_begin + max(offset, int64_t{0}) + k_index;
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i) b_exists |= static_cast<unsigned>(b_column(i) < columns) << i;
    const float* b_pointer =
        b_begin + (kTransposed ? b_column(0) * b_stride + k_index : b_k(0) * b_stride + b_column(0));

    A a[kLoadsA];
    float b[kLoadsB];
    // The next step, of which `left` elements along k exist.
    const auto load = [&](int left) {
#pragma unroll
      for (int i = 0; i < kLoadsA; ++i) {
        a[i] = (a_exists >> i & 1) && k_index < left ? *a_pointer[i] : nothing;
        a_pointer[i] += kSimtStep;
      }
#pragma unroll
      for (int i = 0; i < kLoadsB; ++i) {
        b[i] = (b_exists >> i & 1) && b_k(i) < left ? *b_pointer : 0.f;
        b_pointer += b_hop;
      }
      b_pointer += b_return;
    };
    const auto store = [&](int buffer) {
#pragma unroll
      for (int i = 0; i < kLoadsA; ++i) {
        const int row = row_index + i * kRowsAtOnce;
        shared.a[buffer][k_index][row] = finish(row, a[i]);
      }
#pragma unroll
      for (int i = 0; i < kLoadsB; ++i) shared.b[buffer][b_k(i)][b_column(i)] = b[i];
    };
    const auto step_at = [&](int64_t k) { return static_cast<int>(min(length - k, int64_t{kSimtStep})); };

    load(step_at(0));
    store(0);
    __syncthreads();
    int buffer = 0;
#pragma unroll 1
    for (int64_t k0 = 0; k0 < length; k0 += kSimtStep, buffer ^= 1) {
      if (k0 + kSimtStep < length) load(step_at(k0 + kSimtStep));
#pragma unroll
      for (int k = 0; k < kSimtStep; ++k) {
        float4 left[kGroupsM], right[kGroupsN];
#pragma unroll
        for (int g = 0; g < kGroupsM; ++g) {
          left[g] = *reinterpret_cast<const float4*>(&shared.a[buffer][k][row(g, 0)]);
        }
#pragma unroll
        for (int g = 0; g < kGroupsN; ++g) {
          right[g] = *reinterpret_cast<const float4*>(&shared.b[buffer][k][column(g)]);
        }
#pragma unroll
        for (int g = 0; g < kGroupsM; ++g) {
          const float values[4] = {left[g].x, left[g].y, left[g].z, left[g].w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int h = 0; h < kGroupsN; ++h) {
              float* to = accumulator[g][i][h];
              to[0] = fmaf(values[i], right[h].x, to[0]);
              to[1] = fmaf(values[i], right[h].y, to[1]);
              to[2] = fmaf(values[i], right[h].z, to[2]);
              to[3] = fmaf(values[i], right[h].w, to[3]);
            }
          }
        }
      }
      if (k0 + kSimtStep < length) store(buffer ^ 1);
      __syncthreads();
    }
  }
};

// By rows: few are bound by the embedding's bytes, many by arithmetic.
template <int kM, int kN>
using SimtTileOf = SimtTile<kM, kN, (kM > 64 ? 2 : 1), (kN > 128 ? 1 : 2)>;

constexpr bool is_simt(const BuiltTile& t) {
  return t.threads == kSimtThreads && t.block_k == kSimtStep && t.stages == 2;
}

}  // namespace entrgi
