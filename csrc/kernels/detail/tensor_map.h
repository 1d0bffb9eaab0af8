// Tensor maps: what TMA is told of a matrix in device memory.
#pragma once

#include <cuda.h>
#include <driver_types.h>

#include "../plan.h"

namespace entrgi {

constexpr int kSwizzleBytes = 128;  // width of every box: one row of the 128-byte swizzle

// A row-major matrix [rows, columns] whose rows are `stride` elements apart, copied in boxes of `box_rows`
// rows by 128 bytes under the 128-byte swizzle; what lies outside reads 0. `base` and the rows must lie on
// 16-byte boundaries (Shape::logits_aligned, embedding_aligned): anything else is cudaErrorInvalidValue.
cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const void* base, int64_t rows, int64_t columns,
                            int64_t stride, int box_rows);

}  // namespace entrgi
