// Philox4x32-10 (Salmon et al., 2011) and Gumbel noise: one draw for every (key row, id), independent of all
// else.
#pragma once

#include <cmath>
#include <cstdint>

namespace entrgi::cpu {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;

// The words of one row of keys (seed, step, iteration, position) as Philox takes them.
struct PhiloxKey {
  uint32_t key0, key1;                 // seed, low and high
  uint32_t position, iteration, step;  // counter words 1, 2, 3; word 0 is the vocabulary id

  explicit PhiloxKey(const int64_t* row)
      : key0(static_cast<uint32_t>(row[0])),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(row[0]) >> 32)),
        position(static_cast<uint32_t>(row[3])),
        iteration(static_cast<uint32_t>(row[2])),
        step(static_cast<uint32_t>(row[1])) {}
};

struct PhiloxWords {
  uint32_t low, high;
};

// The first two output words for counter word 0 = id.
inline PhiloxWords philox(const PhiloxKey& key, uint32_t id) {
  uint32_t c0 = id, c1 = key.position, c2 = key.iteration, c3 = key.step, k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0, p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {c0, c1};
}

// Standard Gumbel noise -log(-log1p(-u)) from a 64-bit uniform u = (high, low), the upper half of u taken
// through 1 - u, so that neither tail is lost.
inline double gumbel(uint32_t low, uint32_t high) {
  const bool upper = high >= 0x80000000u;
  if (upper) {
    high = ~high;
    low = ~low;
  }
  const double v = high * 0x1p-32 + (low + 0.5) * 0x1p-64;
  return -std::log(upper ? -std::log(v) : -std::log1p(-v));
}

}  // namespace entrgi::cpu
