// A part of a row of logits, read eight elements at a time whatever its alignment: a short head up to the
// first 16-byte boundary, aligned vectors, a short tail. Missing elements read as -inf, which every use of a
// row here ignores.
#pragma once

#include <math_constants.h>

#include "../detail/numeric.cuh"

namespace entrgi {

constexpr int kVector = 8;

template <typename T>
struct RowVectors {
  const T* row;
  int begin, end;  // ids
  int head;        // elements before the first boundary
  int count;       // vectors: the head (maybe empty), then eight ids each

  __device__ RowVectors(const T* row, int begin, int end) : row(row), begin(begin), end(end) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row + begin) % 16 / sizeof(T));
    head = min(misaligned == 0 ? 0 : 16 / static_cast<int>(sizeof(T)) - misaligned, end - begin);
    count = 1 + (end - begin - head + kVector - 1) / kVector;
  }

  __device__ __forceinline__ int first_id(int vector) const {
    return vector == 0 ? begin : begin + head + (vector - 1) * kVector;
  }

  __device__ __forceinline__ void load(int vector, float (&z)[kVector]) const {
    const int first = first_id(vector);
    if (vector > 0 && first + kVector <= end) {
      constexpr int kLoads = kVector * sizeof(T) / 16;
      uint4 raw[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(row + first) + i);
      const T* elements = reinterpret_cast<const T*>(raw);
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] = to_float(elements[i]);
    } else {
      const int last = vector == 0 ? begin + head : end;
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] = first + i < last ? to_float(row[first + i]) : -CUDART_INF_F;
    }
  }

  // Replaces forbidden ids by -inf. `forbidden` is a bool [V] or null.
  __device__ __forceinline__ void mask(int vector, const bool* forbidden, float (&z)[kVector]) const {
    if (forbidden == nullptr) return;
    const int first = first_id(vector);
    if (first + kVector <= end && reinterpret_cast<uintptr_t>(forbidden + first) % 8 == 0) {
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(forbidden + first));
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if ((i < 4 ? raw.x : raw.y) >> (i % 4 * 8) & 0xff) z[i] = -CUDART_INF_F;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (first + i < end && forbidden[first + i]) z[i] = -CUDART_INF_F;
      }
    }
  }
};

}  // namespace entrgi
