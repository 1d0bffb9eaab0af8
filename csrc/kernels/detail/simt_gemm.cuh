// A 64 x 64 tile of a matrix product in full fp32 on the ordinary cores: 256 threads, 4 x 4 outputs each,
// reduction in steps of 16. For fp32 embeddings, where tensor cores would round to TF32.
#pragma once

#include <cstdint>

namespace entrgi {

constexpr int kSimtTile = 64, kSimtStep = 16, kSimtThreads = 256;

struct SimtShared {
  // Padded: stores of a column hit different banks; 68 floats keep 16-byte alignment.
  float a[kSimtStep][kSimtTile + 4], b[kSimtStep][kSimtTile + 4];
};

// accumulator[i][j] = sum over k in [first, last) of a(4 y + i, k) b(k, 4 x + j) with x = thread % 16,
// y = thread / 16. `a` is contiguous in k; `b` along columns or, as kTransposed, in k.
template <bool kTransposed, typename LoadA, typename LoadB>
__device__ __forceinline__ void simt_product(float (&accumulator)[4][4], int64_t first, int64_t last,
                                             SimtShared& shared, LoadA load_a, LoadB load_b) {
  constexpr int kPerThread = kSimtTile * kSimtStep / kSimtThreads;
  const int a_k = threadIdx.x % kSimtStep, a_row = threadIdx.x / kSimtStep;
  const int b_k = kTransposed ? a_k : threadIdx.x / kSimtTile;
  const int b_column = kTransposed ? a_row : threadIdx.x % kSimtTile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;

#pragma unroll 1
  for (int64_t k0 = first; k0 < last; k0 += kSimtStep) {
    float a[kPerThread], b[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t bk = k0 + b_k + (kTransposed ? 0 : i * (kSimtThreads / kSimtTile));
      a[i] = k0 + a_k < last ? load_a(a_row + i * (kSimtThreads / kSimtStep), k0 + a_k) : 0.f;
      b[i] = bk < last ? load_b(bk, b_column + (kTransposed ? i * (kSimtThreads / kSimtStep) : 0)) : 0.f;
    }
    __syncthreads();  // the previous step has been read
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      shared.a[a_k][a_row + i * (kSimtThreads / kSimtStep)] = a[i];
      if constexpr (kTransposed) {
        shared.b[b_k][b_column + i * (kSimtThreads / kSimtStep)] = b[i];
      } else {
        shared.b[b_k + i * (kSimtThreads / kSimtTile)][b_column] = b[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSimtStep; ++k) {
      const float4 av = *reinterpret_cast<const float4*>(&shared.a[k][4 * y]);
      const float4 bv = *reinterpret_cast<const float4*>(&shared.b[k][4 * x]);
      const float ai[4] = {av.x, av.y, av.z, av.w}, bj[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) accumulator[i][j] = fmaf(ai[i], bj[j], accumulator[i][j]);
      }
    }
  }
}

}  // namespace entrgi
