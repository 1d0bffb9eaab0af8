// The inner loops on the baseline instruction set of the build (SSE2 on x86-64, NEON on aarch64).
#define ENTRGI_ISA generic
#define ENTRGI_SIMD 128
#include "row_kernels_impl.h"
