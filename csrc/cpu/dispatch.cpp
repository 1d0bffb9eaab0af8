// Picks the instruction set of the inner loops once, when they are first used.
#include <cstdlib>
#include <cstring>

#include "row_kernels.h"

namespace entrgi::cpu {
namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa detect() {
#if defined(__x86_64__)
  Isa best = Isa::kGeneric;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
  // For tests and comparisons; never more than the machine has.
  if (const char* wanted = std::getenv("ENTRGI_CPU_ISA")) {
    if (std::strcmp(wanted, "generic") == 0) return Isa::kGeneric;
    if (std::strcmp(wanted, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
  }
  return best;
#else
  return Isa::kGeneric;
#endif
}

Isa isa() {
  static const Isa value = detect();
  return value;
}

}  // namespace

const RowKernels& row_kernels(DType dtype) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return avx512::row_kernels(dtype);
  if (isa() == Isa::kAvx2) return avx2::row_kernels(dtype);
#endif
  return generic::row_kernels(dtype);
}

const char* instruction_set() {
  return isa() == Isa::kAvx512 ? "avx512" : isa() == Isa::kAvx2 ? "avx2" : "generic";
}

}  // namespace entrgi::cpu
