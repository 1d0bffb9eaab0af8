// Philox4x32-10 (Salmon et al., 2011) and the Gumbel noise drawn from it.
#pragma once

#include <cstdint>

namespace entrgi {

// (trajectory seed, denoising step, iteration, absolute position): one row of the operator's `keys`.
struct RowKey {
  uint32_t seed_low, seed_high, step, iteration, position;
};

__device__ __forceinline__ RowKey load_row_key(const int64_t* key) {
  const uint64_t seed = static_cast<uint64_t>(key[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(key[1]),
          static_cast<uint32_t>(key[2]), static_cast<uint32_t>(key[3])};
}

__device__ __forceinline__ uint64_t philox(const RowKey& key, uint32_t id) {
  uint32_t c0 = id, c1 = key.position, c2 = key.iteration, c3 = key.step;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<uint64_t>(c0) | static_cast<uint64_t>(c1) << 32;
}

// -log(-log1p(-u)) with u = (x + 1/2) / 2^64. Near 0 u itself is rounded to fp32 and near 1 its complement,
// so neither tail is lost; the largest noise, which wins the draws, comes from u near 0. Both halves take the
// same logarithm: of 1 - u above, and below of its rounded value w, where log1p(-u) = log(w) + (1 - u - w) /
// w and the division can be left out (w is 1 - u to the last bit, and the correction matters only where w is
// near 1).
__device__ __forceinline__ float gumbel(uint64_t x) {
  const bool upper = x >> 63;
  const float v = (__ull2float_rn(upper ? ~x : x) + 0.5f) * 0x1p-64f;
  const float w = upper ? v : 1.f - v;
  const float correction = upper ? 0.f : (1.f - w) - v;
  return -logf(-logf(w) - correction);
}
__device__ __forceinline__ float gumbel(const RowKey& key, uint32_t id) {
  return gumbel(philox(key, id));
}

// No less than gumbel(x), and at most 0.06 more where that is large; without a logarithm. -log1p(-u) >= u and
// log2(1 + m) >= m, so -log(-log1p(-u)) <= -log(u) <= -log(2) (exponent + mantissa) of any number that is not
// above u: of its upper 32 bits, whose bits as a float are that sum. The last term is above the rounding here
// (6e-6) and there (two logarithms, 1e-6).
__device__ __forceinline__ float gumbel_bound(uint64_t x) {
  constexpr float kLog2 = 0.69314718f;
  const float upper_bits = __uint2float_rd(static_cast<uint32_t>(x >> 32));
  return fmaf(__int2float_rn(__float_as_int(upper_bits)), -kLog2 * 0x1p-23f, (32 + 127) * kLog2 + 1e-4f);
}

}  // namespace entrgi
