// Gumbel perturbation, elementwise: output = z + scale g, g = -log(-log1p(-u)), u 64 bits of (key, id).
//
//   the noise of the draw (detail/philox.cuh): argmax of z / tau + g is the token drawn without a filter
//
// Layout   z [N, V] bf16 / fp16 / fp32, output fp32 [N, V], any row stride and alignment; keys int64 [N, 4].
//
// Floor    N V (sizeof(z) + 4) bytes. The arithmetic weighs more: Philox4x32-10 takes 17 wide
//          multiplications an id (of 20, three depend on the row alone or reach no output), all of it some
//          130 instructions in the SASS of sm_90a (counted), or a cycle of an SM, in which its share of an
//          H200's memory moves three times the 6 bytes of a bf16 id. The noise is the draw's: no cheaper one
//          will do.
//
// Tiling   one CTA per 2,048 ids of a row, two groups of four ids per thread. Groups lie on 16-byte
//          boundaries of the output, whatever V is; the logits of a group are one access too where they meet
//          the same boundary (always, if both matrices are dense). 32-bit ids, 64-bit rows.
//
// Considered: the noise in fp64, as on the CPU (half rate at best, 1/64 on consumer cards, for digits that
// the sum with a logit rounds away); more ids per thread (what a row shares is a twentieth of the work).
#include "detail/launch.h"
#include "detail/numeric.cuh"
#include "detail/philox.cuh"
#include "kernels.h"
#include "plan_families.h"

namespace entrgi {
namespace {

constexpr int kThreads = kElementwise.threads, kGroup = 4, kGroups = 2;
constexpr int kPerBlock = kThreads * kGroup * kGroups;
static_assert(kPerBlock == kElementwise.block_n, "a CTA has the ids that the plan gives it");

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gumbel_perturb_kernel(const GumbelPerturbParams p, float scale, unsigned blocks_per_row) {
  const int64_t n = blockIdx.x / blocks_per_row;
  const T* logits = static_cast<const T*>(p.logits.data) + n * p.logits.stride;
  float* output = fp32(p.output.data) + n * p.output.stride;
  const int vocab = static_cast<int>(p.vocab);
  // Ids from a boundary of the output to the row's start.
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(output) % 16 / sizeof(float));
  const bool aligned = (reinterpret_cast<uintptr_t>(logits) - shift * sizeof(T)) % (kGroup * sizeof(T)) == 0;
  const int first = static_cast<int>(blockIdx.x % blocks_per_row) * kPerBlock + threadIdx.x * kGroup - shift;

  float z[kGroups][kGroup];
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    const int id = first + u * kThreads * kGroup;
    if (aligned && id >= 0 && id + kGroup <= vocab) {
      using Raw = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
      const Raw raw = __ldg(reinterpret_cast<const Raw*>(logits + id));
      const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) z[u][i] = to_float(elements[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        z[u][i] = id + i >= 0 && id + i < vocab ? to_float(logits[id + i]) : 0.f;
      }
    }
  }

  const RowKey key = load_row_key(p.keys + 4 * n);
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    const int id = first + u * kThreads * kGroup;
    if (id >= vocab) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      z[u][i] = fmaf(scale, gumbel(key, static_cast<uint32_t>(id + i)), z[u][i]);
    }
    if (id >= 0 && id + kGroup <= vocab) {
      *reinterpret_cast<float4*>(output + id) = {z[u][0], z[u][1], z[u][2], z[u][3]};
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (id + i >= 0 && id + i < vocab) output[id + i] = z[u][i];
      }
    }
  }
}

}  // namespace

cudaError_t gumbel_perturb(const GumbelPerturbParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.kernel != Kernel::kGumbelPerturb || p.vocab < 1) return cudaErrorInvalidValue;
  if (p.n == 0) return cudaSuccess;
  const auto kernel =
      choose([&]<typename T>() { return &compiled<gumbel_perturb_kernel<T>>; }, any_type(p.logits.dtype));
  return launch(kernel, {plan.grid, kThreads}, stream, p, static_cast<float>(p.scale),
                static_cast<unsigned>(plan.grid / p.n));
}

}  // namespace entrgi
