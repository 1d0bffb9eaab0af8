// The epilogue of logit_update_sm90 as one warp runs it: 16 rows x 128 columns of products from registers
// through shared memory of its own to the logits and their moments.
#pragma once

#include "logit_update.cuh"
#include "tiles.h"

namespace entrgi {

using logit_update_tiles::UpdateShared;

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
  __device__ __forceinline__ int64_t n(int half) const { return first + (kM == 128 ? half * 64 : 0); }
  __device__ __forceinline__ int lane_of(int half) const {
    return kM == 128 ? half * UpdateShared::kChunkRows : 0;
  }
};

// Where a lane's columns of a row begin in the logits and their moments. A gradient is stored in the place of
// the first moment.
template <typename Z>
struct RowPointers {
  Z* z;
  float *m, *v;

  __device__ __forceinline__ RowPointers(const LogitUpdateParams& p, int64_t n, int64_t column)
      : z(static_cast<Z*>(p.logits.data) + n * p.logits.stride + column),
        m(p.rule == UpdateRule::kGradient ? fp32(p.gradient.data) + n * p.gradient.stride + column
                                          : fp32(p.exp_avg.data) + n * p.exp_avg.stride + column),
        v(fp32(p.exp_avg_sq.data) + n * p.exp_avg_sq.stride + column) {}
  template <UpdateRule kRule>
  __device__ __forceinline__ void move(const LogitUpdateParams& p, int rows) {
    z += rows * p.logits.stride;
    m += rows * (kRule == UpdateRule::kGradient ? p.gradient.stride : p.exp_avg.stride);
    v += rows * p.exp_avg_sq.stride;
  }
};

// Four logits of a lane as they were loaded.
template <typename Z>
struct LaneLogits {
  RowPointers<Z> at;
  FourBits<Z> z{};
  FourBits<float> m{}, v{};

  __device__ __forceinline__ void load_if(bool wanted, bool moments) {
    load_streamed_if(wanted, z.bits, at.z);
    if (moments) {
      load_streamed_if(wanted, m.bits, at.m);
      load_streamed_if(wanted, v.bits, at.v);
    }
  }
};

struct Updated {
  float logit[4], mean[4], square[4];  // mean: or the gradient
};

// Which rows of its chunk a lane updates and which it stores, a bit for each: none where its four columns do
// not all exist. Padding is not updated, but gets a gradient of 0.
struct LaneRows {
  uint32_t updated, stored;
};

// The 16 rows of a chunk, whose products are in shared memory. `logits` holds the first rows, as loaded; as
// soon as some have been applied, those after the rest are loaded in their place. Rows are applied two at a
// time, without a branch, so that the instructions of one fill the latencies of the other. What is done is
// known at compile time for the same reason.
template <UpdateRule kRule, bool kReads, bool kWrites, typename Z, int kM, int kInFlight>
__device__ __forceinline__ void update_rows(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                            const WarpRows<kM>& rows, int half, int count, LaneRows mine,
                                            LaneLogits<Z> (&logits)[kInFlight], const float* products,
                                            int lane) {
  constexpr int kTogether = 2;
  static_assert(UpdateShared::kChunkRows % kInFlight == 0 && kInFlight % kTogether == 0);
#pragma unroll 1
  for (int first = 0; first < count; first += kInFlight) {
#pragma unroll
    for (int start = 0; start < kInFlight; start += kTogether) {
      Updated updated[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        LaneLogits<Z>& four = logits[start + t];
        const int index = first + start + t, source = rows.lane_of(half) + index;
        const float lse = __shfl_sync(~0u, rows.lse, source), inner = __shfl_sync(~0u, rows.inner, source);
        const float4 product =
            *reinterpret_cast<const float4*>(products + index * UpdateShared::kChunkPitch + 4 * lane);
        Updated& to = updated[t];
#pragma unroll
        for (int i = 0; i < 4; ++i) to.logit[i] = to_float(four.z[i]);
        float gradient[4];
        gradient_of(gradient, to.logit, {product.x, product.y, product.z, product.w}, lse, inner,
                    scalars.inverse_tau);
        if constexpr (kRule == UpdateRule::kGradient) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to.mean[i] = mine.updated >> (start + t) & 1 ? gradient[i] : 0.f;
        } else if constexpr (kRule == UpdateRule::kSgd) {
          ascend(to.logit, gradient, scalars);
        } else {
          ascend(to.logit, to.mean, to.square, gradient, kReads, four.m, four.v, scalars);
        }
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const RowPointers<Z>& at = logits[start + t].at;
        const bool stored = mine.stored >> (start + t) & 1;
        if constexpr (kRule == UpdateRule::kGradient || kWrites) store_four_if(stored, at.m, updated[t].mean);
        if constexpr (kWrites) store_four_if(stored, at.v, updated[t].square);
        if constexpr (kRule != UpdateRule::kGradient) store_four_if(stored, at.z, updated[t].logit);
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        LaneLogits<Z>& four = logits[start + t];
        four.at.template move<kRule>(p, kInFlight);
        four.load_if(mine.updated >> (kInFlight + start + t) & 1, kReads);
      }
    }
    mine.updated >>= kInFlight, mine.stored >>= kInFlight;
  }
}

// The one to three columns after the last four of V, a row to a lane; `products` are those of the lane's row.
template <typename Z>
__device__ __forceinline__ void update_last_columns(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                                    int64_t n, const Columns& columns,
                                                    const float* products) {
  const UpdateRow row = load_update_row(p, n);
  FourLogits<Z> logits;
  if (!row.padding) logits.load(p, n, columns);
  const float4 product = *reinterpret_cast<const float4*>(products);
  logits.apply(p, scalars, row, columns, {product.x, product.y, product.z, product.w});
}

// Updates this warp's chunk of half `half`, 16 rows x 128 columns from `column` on, of which `count` rows
// exist; `products` is the warp's own shared memory.
template <typename Z, int kM>
__device__ __forceinline__ void update_chunk(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                             const WarpRows<kM>& rows, int half, int count, int64_t column,
                                             const float (&accumulator)[64], float* products, int lane) {
  constexpr int kInFlight = 4;  // rows
  constexpr uint32_t kAllRows = (1u << UpdateShared::kChunkRows) - 1;
  const int64_t first = column + 4 * lane;
  const bool inside = first + 4 <= p.vocab;
  const uint32_t valid = inside ? ~(rows.padding >> rows.lane_of(half)) & kAllRows : 0;
  const uint32_t stored = p.rule != UpdateRule::kGradient ? valid : inside ? (1u << count) - 1 : 0;
  const auto start = [&](int i) {
    LaneLogits<Z> four{RowPointers<Z>(p, rows.n(half) + i, first)};
    four.load_if(valid >> i & 1, reads_moments(p));
    return four;
  };
  LaneLogits<Z> logits[kInFlight] = {start(0), start(1), start(2), start(3)};

  __syncwarp();  // the chunk before this one has been read
#pragma unroll
  for (int f = 0; f < UpdateShared::kChunkColumns / 8; ++f) {
    float* to = products + lane / 4 * UpdateShared::kChunkPitch + f * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = {accumulator[4 * f], accumulator[4 * f + 1]};
    *reinterpret_cast<float2*>(to + 8 * UpdateShared::kChunkPitch) = {accumulator[4 * f + 2],
                                                                      accumulator[4 * f + 3]};
  }
  __syncwarp();

  const auto update = [&]<UpdateRule kRule, bool kReads, bool kWrites>() {
    update_rows<kRule, kReads, kWrites>(p, scalars, rows, half, count, {valid, stored}, logits, products,
                                        lane);
  };
  constexpr UpdateRule kGradient = UpdateRule::kGradient, kSgd = UpdateRule::kSgd, kAdam = UpdateRule::kAdam;
  if (p.rule == kGradient) {
    update.template operator()<kGradient, false, false>();
  } else if (p.rule == kSgd) {
    update.template operator()<kSgd, false, false>();
  } else if (reads_moments(p)) {
    writes_moments(p) ? update.template operator()<kAdam, true, true>()
                      : update.template operator()<kAdam, true, false>();
  } else {
    writes_moments(p) ? update.template operator()<kAdam, false, true>()
                      : update.template operator()<kAdam, false, false>();
  }

  const int64_t whole = p.vocab & ~int64_t{3};
  if (whole < p.vocab && whole - column < UpdateShared::kChunkColumns && lane < count) {
    update_last_columns<Z>(p, scalars, rows.n(half) + lane, {whole, static_cast<int>(p.vocab - whole), false},
                           products + lane * UpdateShared::kChunkPitch + (whole - column));
  }
}

}  // namespace entrgi
