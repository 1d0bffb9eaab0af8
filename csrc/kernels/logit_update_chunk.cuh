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
  __device__ __forceinline__ int64_t n(int half) const { return first + (kM == 128 ? half * 64 : 0); }
  __device__ __forceinline__ int lane_of(int half) const {
    return kM == 128 ? half * UpdateShared::kChunkRows : 0;
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

// Where a lane's columns of a row begin in the logits and their moments. A gradient is stored in the place of
// the first moment.
template <typename Z>
struct RowPointers {
  Z* z;
  float *m, *v;

  __device__ __forceinline__ RowPointers(const LogitUpdateParams& p, int64_t n, int64_t column)
      : z(static_cast<Z*>(p.logits) + n * p.logits_stride + column),
        m(p.rule == UpdateRule::kGradient ? p.gradient + n * p.gradient_stride + column
                                          : p.exp_avg + n * p.exp_avg_stride + column),
        v(p.exp_avg_sq + n * p.exp_avg_sq_stride + column) {}
  template <UpdateRule kRule>
  __device__ __forceinline__ void move(const LogitUpdateParams& p, int rows) {
    z += rows * p.logits_stride;
    m += rows * (kRule == UpdateRule::kGradient ? p.gradient_stride : p.exp_avg_stride);
    v += rows * p.exp_avg_sq_stride;
  }
};

// Four logits of a lane: as they were loaded, and what becomes of them.
template <typename Z, typename Columns>
struct LaneLogits {
  RowPointers<Z> at;
  typename Columns::template Four<Z> z{};
  typename Columns::template Four<float> m{}, v{};

  __device__ __forceinline__ void load(bool moments, Columns columns) {
    columns.load(z, at.z);
    if (moments) {
      columns.load(m, at.m);
      columns.load(v, at.v);
    }
  }
};

struct Updated {
  float logit[4], mean[4], square[4];  // mean: or the gradient
};

// The 16 rows of a chunk, whose products are in shared memory. `logits` holds the first rows, as loaded; as
// soon as some have been applied, those after the rest are loaded in their place. Rows are applied two at a
// time, without a branch, so that the instructions of one fill the latencies of the other. What is done is
// known at compile time for the same reason. Bit i of `valid`: row i is not padding.
template <UpdateRule kRule, bool kReads, bool kWrites, typename Z, typename Columns, int kM, int kInFlight>
__device__ __forceinline__ void update_rows(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                            const WarpRows<kM>& rows, int half, int count, uint32_t valid,
                                            int left, LaneLogits<Z, Columns> (&logits)[kInFlight],
                                            const float* products, int lane) {
  constexpr int kTogether = 2;
  static_assert(UpdateShared::kChunkRows % kInFlight == 0 && kInFlight % kTogether == 0);
  uint32_t stored = kRule == UpdateRule::kGradient ? (1u << count) - 1 : valid;  // padding gets 0
#pragma unroll 1
  for (int first = 0; first < count; first += kInFlight) {
#pragma unroll
    for (int start = 0; start < kInFlight; start += kTogether) {
      Updated updated[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        LaneLogits<Z, Columns>& four = logits[start + t];
        const int index = first + start + t, source = rows.lane_of(half) + index;
        const float lse = __shfl_sync(~0u, rows.lse, source), inner = __shfl_sync(~0u, rows.inner, source);
        float product[4], gradient[4];
        read_products<Columns>(product, products + index * UpdateShared::kChunkPitch, lane);
        Updated& to = updated[t];
#pragma unroll
        for (int i = 0; i < 4; ++i) to.logit[i] = to_float(four.z[i]);
        gradient_of(gradient, to.logit, product, lse, inner, scalars.inverse_tau);
        if constexpr (kRule == UpdateRule::kGradient) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to.mean[i] = valid >> (start + t) & 1 ? gradient[i] : 0.f;
        } else if constexpr (kRule == UpdateRule::kSgd) {
          ascend(to.logit, gradient, scalars);
        } else {
          ascend(to.logit, to.mean, to.square, gradient, kReads, four.m, four.v, scalars);
        }
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const RowPointers<Z>& at = logits[start + t].at;
        const Columns columns{0, stored >> (start + t) & 1 ? left : 0};
        if constexpr (kRule == UpdateRule::kGradient || kWrites) columns.store(at.m, updated[t].mean);
        if constexpr (kWrites) columns.store(at.v, updated[t].square);
        if constexpr (kRule != UpdateRule::kGradient) columns.store(at.z, updated[t].logit);
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        LaneLogits<Z, Columns>& four = logits[start + t];
        four.at.template move<kRule>(p, kInFlight);
        four.load(kReads, Columns{0, valid >> (kInFlight + start + t) & 1 ? left : 0});
      }
    }
    valid >>= kInFlight, stored >>= kInFlight;
  }
}

// Updates this warp's chunk of half `half`, 16 rows x 128 columns, of which `count` rows exist; `products` is
// the warp's own shared memory.
template <typename Z, typename Columns, int kM>
__device__ __forceinline__ void update_chunk(const LogitUpdateParams& p, const UpdateScalars& scalars,
                                             const WarpRows<kM>& rows, int half, int count, Columns columns,
                                             const float (&accumulator)[64], float* products, int lane) {
  constexpr int kInFlight = 4;  // rows
  const uint32_t valid = ~(rows.padding >> rows.lane_of(half)) & ((1u << UpdateShared::kChunkRows) - 1);
  const auto start = [&](int i) {
    LaneLogits<Z, Columns> four{RowPointers<Z>(p, rows.n(half) + i, columns.first)};
    four.load(reads_moments(p), Columns{0, valid >> i & 1 ? columns.left : 0});
    return four;
  };
  LaneLogits<Z, Columns> logits[kInFlight] = {start(0), start(1), start(2), start(3)};

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
    update_rows<kRule, kReads, kWrites>(p, scalars, rows, half, count, valid, columns.left, logits, products,
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
}

}  // namespace entrgi
