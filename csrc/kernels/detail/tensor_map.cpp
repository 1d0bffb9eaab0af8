#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <atomic>

#include "launch.h"

namespace entrgi {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked for at run time: the library does not link the driver.
cudaError_t find_encode(Encode* encode) {
  static std::atomic<Encode> known{nullptr};  // of the process, whichever thread asked first
  *encode = known.load();
  if (*encode == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
    if (error != cudaSuccess) return reported(error);
    if (result != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
    *encode = reinterpret_cast<Encode>(function);
    known.store(*encode);
  }
  return cudaSuccess;
}

CUtensorMapDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const void* base, int64_t rows, int64_t columns,
                            int64_t stride, int box_rows) {
  Encode encode = nullptr;
  if (const cudaError_t error = find_encode(&encode); error != cudaSuccess) return error;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * size_of(dtype))};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kSwizzleBytes / size_of(dtype)),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const auto make = [&] {
    return encode(map, type_of(dtype), 2, const_cast<void*>(base), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = make();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has not used its device yet
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);  // makes the context current
    if (error != cudaSuccess) return reported(error);
    result = make();
  }
  if (result == CUDA_ERROR_INVALID_CONTEXT) return cudaErrorDeviceUninitialized;
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace entrgi
