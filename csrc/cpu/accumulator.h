// Access to acc arrays (float, or double where the logits are) behind void pointers, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu.h"

namespace entrgi::cpu {

inline DType accumulator_of(DType logits) {
  return logits == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

inline double read(const void* array, int64_t i, DType acc) {
  return acc == DType::kFloat64 ? static_cast<const double*>(array)[i] : static_cast<const float*>(array)[i];
}

inline void write(void* array, int64_t i, double value, DType acc) {
  if (acc == DType::kFloat64) {
    static_cast<double*>(array)[i] = value;
  } else {
    static_cast<float*>(array)[i] = static_cast<float>(value);
  }
}

// Uninitialised dense rows, aligned to a cache line.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t columns, DType dtype)
      : bytes_(static_cast<char*>(
            ::operator new(static_cast<size_t>(rows * columns * size_of(dtype)), std::align_val_t{64}))),
        columns_(columns),
        dtype_(dtype) {}
  Matrix matrix() const { return {bytes_.get(), columns_, dtype_}; }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> bytes_;
  int64_t columns_;
  DType dtype_;
};

}  // namespace entrgi::cpu
