// A device with as little shared memory for a block, and of as high a number, as the environment says. Apart from
// launch_program.cu, where nvcc declares these functions for device code, too.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdlib>

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using Function = cudaError_t (*)(int*, cudaDeviceAttr, int);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "cudaDeviceGetAttribute"));
  const cudaError_t error = real(value, attribute, std::getenv("DEVICE") != nullptr ? 0 : device);
  const char* bytes = std::getenv("SHARED");
  if (bytes != nullptr && attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = std::atoi(bytes);
  return error;
}

extern "C" cudaError_t cudaGetDevice(int* device) {
  using Function = cudaError_t (*)(int*);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "cudaGetDevice"));
  const cudaError_t error = real(device);
  if (const char* number = std::getenv("DEVICE")) *device = std::atoi(number);
  return error;
}
