// Access to acc arrays (float, or double where the logits are) behind void pointers, and scratch memory.
#pragma once

#include <cstdint>
#include <memory>

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

// Uninitialised dense rows, aligned to a cache line. Not by an aligned `new`, which takes several times as
// long as an ordinary one.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t columns, DType dtype) : columns_(columns), dtype_(dtype) {
    const size_t bytes = static_cast<size_t>(rows * columns * size_of(dtype));
    if (bytes == 0) return;
    bytes_ = std::make_unique_for_overwrite<char[]>(bytes + kLine - 1);
    begin_ = bytes_.get() + (kLine - reinterpret_cast<uintptr_t>(bytes_.get()) % kLine) % kLine;
  }
  Matrix matrix() const { return {begin_, columns_, dtype_}; }

 private:
  static constexpr uintptr_t kLine = 64;
  std::unique_ptr<char[]> bytes_;
  char* begin_ = nullptr;
  int64_t columns_;
  DType dtype_;
};

}  // namespace entrgi::cpu
