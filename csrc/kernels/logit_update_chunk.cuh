// The epilogue of logit_update_sm90 as one warp runs it: 16 rows x 128 columns of products from registers
// through shared memory of its own to the logits and their moments.
#pragma once

#include "logit_update.cuh"
#include "logit_update_layout.h"

namespace entrgi {

// The rows of a warp in a tile: 16 of each 64. Lane l keeps the scalars of row l % 16 of the first 64 (l <
// 16) or of the second (else; in a tile of 64 rows the same again).
template <int kM>
struct WarpRows {
  int64_t first;  // of the warp's in the first 64
  float lse, inner;
  uint32_t padding;  // a bit for each lane's row

  __device__ __forceinline__ WarpRows(const LogitUpdateParams& p, int64_t first_row, int warp, int lane)
      : first(first_row + warp * UpdateShared::kChunkRows) {
    const int half = kM == 128 ? lane / 16 : 0;
    const UpdateRow mine = load_update_row(p, first + half * 64 + lane % 16);
    lse = mine.lse;
    inner = mine.inner;
    padding = __ballot_sync(~0u, mine.padding);
  }
  __device__ __forceinline__ int64_t n(int half, int index) const {
    return first + (kM == 128 ? half * 64 : 0) + index;
  }
  __device__ __forceinline__ int lane_of(int half, int index) const {
    return (kM == 128 ? half * UpdateShared::kChunkRows : 0) + index;
  }
  __device__ __forceinline__ bool is_padding(int half, int index) const {
    return (padding >> lane_of(half, index) & 1) != 0;
  }
  __device__ __forceinline__ UpdateRow operator()(int half, int index) const {
    const int lane = lane_of(half, index);
    return {n(half, index), __shfl_sync(~0u, lse, lane), __shfl_sync(~0u, inner, lane),
            is_padding(half, index)};
  }
};

// The columns of a chunk that a lane owns, four ids side by side or 32 apart, and their products.
template <typename Columns>
constexpr int kLaneColumns = std::is_same_v<Columns, VectorColumns> ? 4 : 1;

template <typename Columns>
__device__ __forceinline__ void read_products(float (&product)[4], const float* row, int lane) {
  if constexpr (kLaneColumns<Columns> == 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + 4 * lane);
    product[0] = four.x, product[1] = four.y, product[2] = four.z, product[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[i] = row[lane + 32 * i];
  }
}

// Updates this warp's chunk of half `half`, 16 rows x 128 columns, of which `count` rows exist; `products` is
// the warp's own shared memory.
template <typename Z, typename Columns, int kM>
__device__ __forceinline__ void update_chunk(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                             const WarpRows<kM>& rows, int half, int count, Columns columns,
                                             const float (&accumulator)[64], float* products, int lane) {
  constexpr int kInFlight = kLaneColumns<Columns> == 4 ? 4 : 3;  // rows, as registers allow
  FourLogits<Z, Columns> logits[kInFlight];
  const auto load = [&](FourLogits<Z, Columns>& four, int index) {
    if (index < count && !rows.is_padding(half, index)) four.load(p, rows.n(half, index), columns);
  };
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) load(logits[i], i);

  __syncwarp();  // the chunk before this one has been read
#pragma unroll
  for (int f = 0; f < UpdateShared::kChunkColumns / 8; ++f) {
    float* to = products + lane / 4 * UpdateShared::kChunkPitch + f * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = {accumulator[4 * f], accumulator[4 * f + 1]};
    *reinterpret_cast<float2*>(to + 8 * UpdateShared::kChunkPitch) = {accumulator[4 * f + 2],
                                                                      accumulator[4 * f + 3]};
  }
  __syncwarp();

#pragma unroll 1
  for (int first = 0; first < count; first += kInFlight) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = first + i;
      if (index >= count) break;
      float product[4];
      read_products<Columns>(product, products + index * UpdateShared::kChunkPitch, lane);
      logits[i].apply(p, scalars, rows(half, index), columns, product);
      load(logits[i], index + kInFlight);
    }
  }
}

}  // namespace entrgi
