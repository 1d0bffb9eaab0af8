// The bodies of row_kernels.h. Included by row_kernels_{generic,avx2,avx512}.cpp, which name the namespace
// ENTRGI_ISA and the width of vectors ENTRGI_SIMD; everything here has internal linkage.
#include "row_kernels.h"
#include "simd.h"

namespace entrgi::cpu {
namespace {

// Logits at allowed ids, -inf elsewhere and past the end.
template <class T>
ENTRGI_INLINE VectorOf<Accumulator<T>> load_allowed(const T* z, const uint8_t* forbidden, int64_t i,
                                                    int lanes) {
  using F = Accumulator<T>;
  constexpr F kNone = -std::numeric_limits<F>::infinity();
  VectorOf<F> v = load_lanes(z + i, lanes, kNone);
  if (forbidden != nullptr) {
    using Bytes = typename Simd<F>::Bytes;
    Bytes bytes = {};
    std::memcpy(&bytes, forbidden + i, lanes);
    v = __builtin_convertvector(bytes, MaskOf<F>) != 0 ? splat(kNone) : v;
  }
  return v;
}

template <class F>
ENTRGI_INLINE VectorOf<F> at_least(VectorOf<F> v, F low) {  // -inf times a zero weight would be NaN
  return v < low ? splat(low) : v;
}

template <class T>
void statistics(const void* row, int64_t n, double temperature, ChunkStatistics& out) {
  using F = Accumulator<T>;
  using V = VectorOf<F>;
  constexpr F kInf = std::numeric_limits<F>::infinity();
  const T* z = static_cast<const T*>(row);
  out = {};

  V max = splat(-kInf);
  MaskOf<F> invalid = {};
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const V v = load_lanes(z + i, lanes, -kInf);
    max = v > max ? v : max;
    invalid |= ~(v < kInf);
  });
  out.invalid = mask_bits(invalid) != 0;
  const F m = horizontal_max(max);
  out.max = m;
  if (out.invalid || m == -kInf) return;

  const F tau = static_cast<F>(temperature);
  out.tempered_max = m / tau;   // rounded as z / tau is where the logsumexp is used again
  constexpr F kLow = F(-1000);  // e^-1000 is 0 in either precision
  const bool tempered = temperature != 1.0;
  WideSum<F> unit_s, unit_t, tempered_s, tempered_t;
  for_sum_blocks<F>(n, [&](int64_t begin, int64_t length) ENTRGI_LAMBDA {
    V s = {}, t = {}, tau_s = {}, tau_t = {};
    if (tempered) {
      for_lanes<F>(length, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
        const V difference = load_lanes(z + begin + i, lanes, -kInf) - m;
        const V x = at_least(difference, kLow), e = exponential(x);
        s += e;
        t += x * e;
        const V y = at_least(difference / tau, kLow), f = exponential(y);
        tau_s += f;
        tau_t += y * f;
      });
      tempered_s.add(tau_s);
      tempered_t.add(tau_t);
    } else {
      for_lanes<F>(length, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
        const V x = at_least(load_lanes(z + begin + i, lanes, -kInf) - m, kLow), e = exponential(x);
        s += e;
        t += x * e;
      });
    }
    unit_s.add(s);
    unit_t.add(t);
  });
  out.unit_s = unit_s.total();
  out.unit_t = unit_t.total();
  out.tempered_s = tempered ? tempered_s.total() : out.unit_s;
  out.tempered_t = tempered ? tempered_t.total() : out.unit_t;
}

template <class T>
int64_t find(const void* row, int64_t n, double value) {
  using F = Accumulator<T>;
  const T* z = static_cast<const T*>(row);
  const F target = static_cast<F>(value);
  for (int64_t i = 0; i < n; i += kLanesOf<F>) {
    const int lanes = n - i < kLanesOf<F> ? static_cast<int>(n - i) : kLanesOf<F>;
    const uint32_t bits = mask_bits(load_lanes(z + i, lanes, std::numeric_limits<F>::quiet_NaN()) == target);
    if (bits != 0) return i + __builtin_ctz(bits);
  }
  return n;
}

template <class T>
double allowed_max(const void* row, const uint8_t* forbidden, int64_t n) {
  using F = Accumulator<T>;
  const T* z = static_cast<const T*>(row);
  VectorOf<F> max = splat(-std::numeric_limits<F>::infinity());
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const VectorOf<F> v = load_allowed(z, forbidden, i, lanes);
    max = v > max ? v : max;
  });
  return horizontal_max(max);
}

template <class T>
void group_max(const void* row, const uint8_t* forbidden, int64_t n, int64_t group, double* out) {
  const T* z = static_cast<const T*>(row);
  for (int64_t i = 0; i < n; i += group) {
    *out++ =
        allowed_max<T>(z + i, forbidden == nullptr ? nullptr : forbidden + i, n - i < group ? n - i : group);
  }
}

// The bucket of x = (z - zmax) / temperature <= 0: larger for smaller x.
ENTRGI_INLINE I32 bucket_of(F32 x) {
  const F32 b = x * static_cast<float>(-kBucketsPerNat);
  return __builtin_convertvector(b < float(kBuckets - 1) ? b : splat(float(kBuckets - 1)), I32);
}
ENTRGI_INLINE I64 bucket_of(F64 x) {
  const F64 b = x * -kBucketsPerNat;
  return __builtin_convertvector(b < double(kBuckets - 1) ? b : splat(double(kBuckets - 1)), I64);
}

// round(e 2^40), half to even: the addition of 2^52 leaves the integer in the mantissa.
ENTRGI_INLINE U64 mass_of(F64 e) {
  return (U64)(e * kMassUnit + 0x1p52) - (U64)splat(0x1p52);
}

ENTRGI_INLINE void store_masses(F32 x, uint64_t* out) {
  F64 low, high;
  widen(exponential(x), low, high);
  const U64 masses[2] = {mass_of(low), mass_of(high)};
  std::memcpy(out, masses, sizeof(masses));
}
ENTRGI_INLINE void store_masses(F64 x, uint64_t* out) {
  const U64 masses = mass_of(exponential(x));
  std::memcpy(out, &masses, sizeof(masses));
}

template <class T>
void add_masses(const void* row, const uint8_t* forbidden, int64_t n, double zmax, double temperature,
                uint64_t* buckets) {
  using F = Accumulator<T>;
  const T* z = static_cast<const T*>(row);
  const F max = static_cast<F>(zmax), tau = static_cast<F>(temperature);
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const VectorOf<F> x = (load_allowed(z, forbidden, i, lanes) - max) / tau;
    if (mask_bits(x > static_cast<F>(kMasslessBelow)) == 0) return;
    uint64_t mass[kLanesOf<F>];
    store_masses(x, mass);
    const MaskOf<F> indices = bucket_of(x);
    Lane<F> bucket[kLanesOf<F>];
    std::memcpy(bucket, &indices, sizeof(bucket));
    for (int k = 0; k < kLanesOf<F>; ++k) buckets[bucket[k]] += mass[k];
  });
}

template <class T>
int64_t gather_bucket(const void* row, const uint8_t* forbidden, int64_t n, int64_t id, double zmax,
                      double temperature, int bucket, Candidate* out) {
  using F = Accumulator<T>;
  const T* z = static_cast<const T*>(row);
  const F max = static_cast<F>(zmax), tau = static_cast<F>(temperature);
  int64_t count = 0;
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const VectorOf<F> v = load_allowed(z, forbidden, i, lanes);
    const VectorOf<F> x = (v - max) / tau;
    uint32_t bits = mask_bits((bucket_of(x) == bucket) & (x > static_cast<F>(kMasslessBelow)));
    if (bits == 0) return;
    uint64_t mass[kLanesOf<F>];
    store_masses(x, mass);
    for (; bits != 0; bits &= bits - 1) {
      const int k = __builtin_ctz(bits);
      if (mass[k] != 0) out[count++] = {static_cast<double>(v[k]), mass[k], id + i + k};
    }
  });
  return count;
}

template <class T>
int64_t gather_above(const void* row, const uint8_t* forbidden, int64_t n, double bound, double* out) {
  using F = Accumulator<T>;
  const T* z = static_cast<const T*>(row);
  const F low = static_cast<F>(bound);
  int64_t count = 0;
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const VectorOf<F> v = load_allowed(z, forbidden, i, lanes);
    uint32_t bits = mask_bits((v >= low) & (v > -std::numeric_limits<F>::infinity()));
    for (; bits != 0; bits &= bits - 1) out[count++] = v[__builtin_ctz(bits)];
  });
  return count;
}

// The first two output words of Philox for kLanesOf<double> ids, one per 64-bit lane (upper halves
// undefined).
ENTRGI_INLINE void philox_lanes(const PhiloxKey& key, U64 ids, U64& low, U64& high) {
  U64 c0 = ids, c1 = U64{} + key.position, c2 = U64{} + key.iteration, c3 = U64{} + key.step;
  uint32_t k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < 10; ++round) {
    const U64 p0 = multiply_low32(c0, kPhiloxMultiplier0), p1 = multiply_low32(c2, kPhiloxMultiplier1);
    c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
    c3 = p0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  low = c0;
  high = c1;
}

#if ENTRGI_VECTOR_BYTES == 64
constexpr U64 kIota = {0, 1, 2, 3, 4, 5, 6, 7};
#elif ENTRGI_VECTOR_BYTES == 32
constexpr U64 kIota = {0, 1, 2, 3};
#else
constexpr U64 kIota = {0, 1};
#endif

// The two words of kLanesOf<F> consecutive ids.
template <class F>
ENTRGI_INLINE void philox_words(const PhiloxKey& key, int64_t first_id, uint32_t* low, uint32_t* high) {
  constexpr int kLanes = kLanesOf<double>;
  for (int part = 0; part < kLanesOf<F> / kLanes; ++part) {
    U64 l, h;
    philox_lanes(key, kIota + static_cast<uint64_t>(first_id + part * kLanes), l, h);
    using Words = Vector<uint32_t, kLanes>;
    const Words low_words = __builtin_convertvector(l, Words), high_words = __builtin_convertvector(h, Words);
    std::memcpy(low + part * kLanes, &low_words, sizeof(Words));
    std::memcpy(high + part * kLanes, &high_words, sizeof(Words));
  }
}

// The uniforms, rounded down to multiples of 2^-24.
ENTRGI_INLINE F32 uniform_floor(const uint32_t* high, float) {
  return __builtin_convertvector((I32)(load_raw<U32>(high) >> 8), F32) * 0x1p-24f;
}
ENTRGI_INLINE F64 uniform_floor(const uint32_t* high, double) {
  F64 u;
  for (int k = 0; k < kLanesOf<double>; ++k) u[k] = (high[k] >> 8) * 0x1p-24;
  return u;
}

template <class T>
void draw(const void* row, const uint8_t* forbidden, int64_t n, int64_t id, double zmax, double temperature,
          const Kept& kept, const PhiloxKey& key, Draw& state) {
  using F = Accumulator<T>;
  using V = VectorOf<F>;
  constexpr F kInf = std::numeric_limits<F>::infinity();
  const T* z = static_cast<const T*>(row);
  const F max = static_cast<F>(zmax), tau = static_cast<F>(temperature);
  const F threshold = static_cast<F>(kept.threshold);
  // Ties at the threshold are kept up to this index of the stretch.
  const int64_t tie_end = kept.last_tie - id + 1;

  WideSum<F> sum, weighted;
  V first = splat(static_cast<F>(state.first)), second = splat(-kInf);
  second[0] = static_cast<F>(state.second);
  for (int k = 1; k < kLanesOf<F>; ++k) first[k] = -kInf;
  // Noise is needed exactly only where it can win. As -log(1 - u) >= u, Gumbel noise is <= -log u: an id with
  // u > e^(x - best) loses. The largest logit alone scores above -3.81; rounding stays below the factor.
  const auto bar_of = [](double score) ENTRGI_LAMBDA {
    return static_cast<F>(std::exp(score > -4.0 ? -score : 4.0) * 1.001);
  };
  F bar = bar_of(state.score);

  V block_sum = {}, block_weighted = {};
  const auto add_lanes = [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const V v = load_allowed(z, forbidden, i, lanes);
    MaskOf<F> keep = v > threshold;
    const MaskOf<F> tie = (v == threshold) & (v > -kInf);
    if (mask_bits(keep | tie) == 0) return;
    if (i + kLanesOf<F> <= tie_end) {
      keep |= tie;
    } else if (i < tie_end) {
      for (int k = 0; k < kLanesOf<F> && i + k < tie_end; ++k) keep[k] |= tie[k];
    }
    const V x = (v - max) / tau;
    const V e = keep ? exponential(x) : splat(F(0));
    block_sum += e;
    block_weighted += at_least(x, F(-1000)) * e;
    const V candidate = keep ? v : splat(-kInf);
    const V lesser = candidate < first ? candidate : first;
    second = lesser > second ? lesser : second;
    first = candidate > first ? candidate : first;

    uint32_t low[kLanesOf<F>], high[kLanesOf<F>];
    philox_words<F>(key, id + i, low, high);
    uint32_t bits = mask_bits(keep & (uniform_floor(high, F(0)) <= e * bar));
    for (; bits != 0; bits &= bits - 1) {
      const int k = __builtin_ctz(bits);
      const F score = x[k] + static_cast<F>(gumbel(low[k], high[k]));
      if (score > state.score) {
        state.score = score;
        state.token = id + i + k;
        bar = bar_of(state.score);
      }
    }
  };
  for_sum_blocks<F>(n, [&](int64_t begin, int64_t length) ENTRGI_LAMBDA {
    for_lanes<F>(length, [&](int64_t i, int lanes) ENTRGI_LAMBDA { add_lanes(begin + i, lanes); });
    sum.add(block_sum);
    weighted.add(block_weighted);
    block_sum = block_weighted = V{};
  });
  state.sum += sum.total();
  state.weighted_sum += weighted.total();
  // The two largest of all lanes.
  double best = -kInf, next = -kInf;
  for (int k = 0; k < kLanesOf<F>; ++k) {
    for (const double value : {static_cast<double>(first[k]), static_cast<double>(second[k])}) {
      if (value > best) {
        next = best;
        best = value;
      } else if (value > next) {
        next = value;
      }
    }
  }
  state.first = best;
  state.second = next;
}

// Standard Gumbel noise of kLanesOf<double> consecutive ids: philox.h's in vectors. One logarithm serves both
// halves of the uniform: log1p(-v) = log w + ((1 - w) - v) with w = 1 - v rounded.
ENTRGI_INLINE F64 gumbel_lanes(const PhiloxKey& key, int64_t first_id) {
  constexpr uint64_t kWord = 0xffffffff;
  U64 low, high;
  philox_lanes(key, kIota + static_cast<uint64_t>(first_id), low, high);
  const U64 is_upper = -(high >> 31 & 1u), flip = is_upper & kWord;
  const F64 h = to_double((high & kWord) ^ flip), l = to_double((low & kWord) ^ flip);
  const F64 v = h * 0x1p-32 + (l + 0.5) * 0x1p-64, rest = 1.0 - v;
  const I64 upper = (I64)is_upper;
  const F64 lost = upper ? splat(0.0) : (1.0 - rest) - v;
  return -logarithm(-(logarithm(upper ? v : rest) + lost));
}

ENTRGI_INLINE F32 perturbed(F32 z, double scale, const PhiloxKey& key, int64_t first_id) {
  F64 low, high;
  widen(z, low, high);
  return narrow(low + scale * gumbel_lanes(key, first_id),
                high + scale * gumbel_lanes(key, first_id + kLanesOf<double>));
}
ENTRGI_INLINE F64 perturbed(F64 z, double scale, const PhiloxKey& key, int64_t first_id) {
  return z + scale * gumbel_lanes(key, first_id);
}

template <class T>
LogitKinds gumbel_perturb(const void* row, int64_t n, int64_t id, double scale, const PhiloxKey& key,
                          void* out_row) {
  using F = Accumulator<T>;
  constexpr F kInf = std::numeric_limits<F>::infinity();
  const T* z = static_cast<const T*>(row);
  F* out = static_cast<F*>(out_row);
  MaskOf<F> invalid = {}, finite = {};
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const VectorOf<F> v = load_lanes(z + i, lanes, -kInf);
    invalid |= ~(v < kInf);
    finite |= v > -kInf;
    store_lanes(out + i, perturbed(v, scale, key, id + i), lanes);
  });
  return {mask_bits(invalid) != 0, mask_bits(finite) != 0};
}

template <class T>
double scaled_exp(const void* element, double zmax, double temperature) {
  using F = Accumulator<T>;
  const VectorOf<F> v = load_part(static_cast<const T*>(element), 1, F(0));
  return exponential((v - static_cast<F>(zmax)) / static_cast<F>(temperature))[0];
}

template <class T>
void statistics_backward(const void* row, int64_t n, double temperature, const double* grads,
                         const double* values, void* out_row) {
  using F = Accumulator<T>;
  using V = VectorOf<F>;
  const T* z = static_cast<const T*>(row);
  T* out = static_cast<T*>(out_row);
  const F tau = static_cast<F>(temperature);
  const F g_lse = static_cast<F>(grads[0] / temperature), g_unit = static_cast<F>(grads[1]);
  const F g_tempered = static_cast<F>(grads[2] / temperature);
  const F lse = static_cast<F>(values[0]), unit_lse = static_cast<F>(values[1]);
  const F entropy = static_cast<F>(values[2]), tempered_entropy = static_cast<F>(values[3]);
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const V v = load_lanes(z + i, lanes, F(0));
    V gradient = {};
    if (g_lse != 0 || g_tempered != 0) {
      const V log_q = at_least(v / tau - lse, F(-1000));
      gradient += exponential(log_q) * (g_lse - g_tempered * (log_q + tempered_entropy));
    }
    if (g_unit != 0) {
      const V log_p = at_least(v - unit_lse, F(-1000));
      gradient -= exponential(log_p) * (g_unit * (log_p + entropy));
    }
    store_lanes(out + i, gradient, lanes);
  });
}

template <class T>
double probabilities(const void* row, int64_t n, double temperature, double logsumexp, void* out_row) {
  using F = Accumulator<T>;
  constexpr F kInf = std::numeric_limits<F>::infinity();
  const T* z = static_cast<const T*>(row);
  F* out = static_cast<F*>(out_row);
  const F tau = static_cast<F>(temperature), lse = static_cast<F>(logsumexp);
  WideSum<F> sum;
  for_sum_blocks<F>(n, [&](int64_t begin, int64_t length) ENTRGI_LAMBDA {
    VectorOf<F> block = {};
    for_lanes<F>(length, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
      const VectorOf<F> q = exponential(load_lanes(z + begin + i, lanes, -kInf) / tau - lse);
      block += q;
      store_lanes(out + begin + i, q, lanes);
    });
    sum.add(block);
  });
  return sum.total();
}

template <class T>
struct Gradient {
  using F = Accumulator<T>;
  F tau, lse, dot;
  Gradient(double temperature, double logsumexp, double dot)
      : tau(static_cast<F>(temperature)), lse(static_cast<F>(logsumexp)), dot(static_cast<F>(dot)) {}
  ENTRGI_INLINE VectorOf<F> operator()(VectorOf<F> z, VectorOf<F> inner) const {
    const VectorOf<F> q = exponential(z / tau - lse);
    // Where q is 0 the gradient is, whatever the inner product (an infinite row of the table, say).
    return q == F(0) ? splat(F(0)) : q * (inner - dot) / tau;
  }
};

template <class T>
void gradient(const void* row, int64_t n, double temperature, double logsumexp, double dot, void* inner_row) {
  using F = Accumulator<T>;
  const T* z = static_cast<const T*>(row);
  F* inner = static_cast<F*>(inner_row);
  const Gradient<T> gradient(temperature, logsumexp, dot);
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    store_lanes(inner + i, gradient(load_lanes(z + i, lanes, F(0)), load_lanes(inner + i, lanes, F(0))),
                lanes);
  });
}

template <class T, bool kFirst, bool kLast>
void adam_loop(T* z, int64_t n, const Gradient<T>& gradient, const Accumulator<T>* inner,
               Accumulator<T>* exp_avg, Accumulator<T>* exp_avg_sq, const AdamFactors& f) {
  using F = Accumulator<T>;
  using V = VectorOf<F>;
  const F beta1 = static_cast<F>(f.beta1), beta2 = static_cast<F>(f.beta2);
  const F fresh1 = static_cast<F>(f.one_minus_beta1), fresh2 = static_cast<F>(f.one_minus_beta2);
  const F step_size = static_cast<F>(f.lr * f.bias1), bias2 = static_cast<F>(f.bias2),
          eps = static_cast<F>(f.eps);
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const V v = load_lanes(z + i, lanes, F(0));
    const V g = gradient(v, load_lanes(inner + i, lanes, F(0)));
    V m = g * fresh1, s = g * g * fresh2;
    if constexpr (!kFirst) {
      m += load_lanes(exp_avg + i, lanes, F(0)) * beta1;
      s += load_lanes(exp_avg_sq + i, lanes, F(0)) * beta2;
    }
    if constexpr (!kLast) {
      store_lanes(exp_avg + i, m, lanes);
      store_lanes(exp_avg_sq + i, s, lanes);
    }
    store_lanes(z + i, v + m * step_size / (square_root(s * bias2) + eps), lanes);
  });
}

template <class T>
void adam(void* row, int64_t n, double temperature, double logsumexp, double dot, const void* inner_row,
          void* exp_avg_row, void* exp_avg_sq_row, const AdamFactors& f) {
  using F = Accumulator<T>;
  T* z = static_cast<T*>(row);
  const F* inner = static_cast<const F*>(inner_row);
  F *exp_avg = static_cast<F*>(exp_avg_row), *exp_avg_sq = static_cast<F*>(exp_avg_sq_row);
  const Gradient<T> gradient(temperature, logsumexp, dot);
  const auto loop = f.first ? (f.last ? adam_loop<T, true, true> : adam_loop<T, true, false>)
                            : (f.last ? adam_loop<T, false, true> : adam_loop<T, false, false>);
  loop(z, n, gradient, inner, exp_avg, exp_avg_sq, f);
}

template <class T>
void sgd(void* row, int64_t n, double temperature, double logsumexp, double dot, const void* inner_row,
         double lr) {
  using F = Accumulator<T>;
  T* z = static_cast<T*>(row);
  const F* inner = static_cast<const F*>(inner_row);
  const Gradient<T> gradient(temperature, logsumexp, dot);
  const F rate = static_cast<F>(lr);
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    const VectorOf<F> v = load_lanes(z + i, lanes, F(0));
    store_lanes(z + i, v + rate * gradient(v, load_lanes(inner + i, lanes, F(0))), lanes);
  });
}

template <class T>
void to_accumulator(const void* from, int64_t n, void* to) {
  using F = Accumulator<T>;
  const T* in = static_cast<const T*>(from);
  F* out = static_cast<F*>(to);
  for_lanes<F>(n, [&](int64_t i, int lanes)
                      ENTRGI_LAMBDA { store_lanes(out + i, load_lanes(in + i, lanes, F(0)), lanes); });
}

template <class T>
void add(const void* from, int64_t n, void* to) {
  using F = Accumulator<T>;
  const F* in = static_cast<const F*>(from);
  F* out = static_cast<F*>(to);
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    store_lanes(out + i, load_lanes(out + i, lanes, F(0)) + load_lanes(in + i, lanes, F(0)), lanes);
  });
}

template <class T>
void scale(void* row, int64_t n, double factor) {
  using F = Accumulator<T>;
  F* out = static_cast<F*>(row);
  const VectorOf<F> f = splat(static_cast<F>(factor));
  for_lanes<F>(n, [&](int64_t i, int lanes)
                      ENTRGI_LAMBDA { store_lanes(out + i, f * load_lanes(out + i, lanes, F(0)), lanes); });
}

template <class T>
void blend(const void* soft_row, const void* hard_row, double weight, int64_t n, void* out_row) {
  using F = Accumulator<T>;
  const F* soft = static_cast<const F*>(soft_row);
  const T* hard = static_cast<const T*>(hard_row);
  T* out = static_cast<T*>(out_row);
  const F w = static_cast<F>(weight), rest = F(1) - w;
  for_lanes<F>(n, [&](int64_t i, int lanes) ENTRGI_LAMBDA {
    VectorOf<F> v = load_lanes(soft + i, lanes, F(0));
    if (hard != nullptr) v = rest * v + w * load_lanes(hard + i, lanes, F(0));
    store_lanes(out + i, v, lanes);
  });
}

template <class T>
constexpr RowKernels table() {
  return {statistics<T>,          find<T>,          allowed_max<T>, group_max<T>,  add_masses<T>,
          gather_bucket<T>,       gather_above<T>,  draw<T>,        scaled_exp<T>, gumbel_perturb<T>,
          statistics_backward<T>, probabilities<T>, gradient<T>,    adam<T>,       sgd<T>,
          to_accumulator<T>,      add<T>,           scale<T>,       blend<T>};
}

}  // namespace

namespace ENTRGI_ISA {

const RowKernels& row_kernels(DType dtype) {
  static constexpr RowKernels kTables[] = {table<BFloat16>(), table<Float16>(), table<float>(),
                                           table<double>()};
  return kTables[static_cast<int>(dtype)];
}

}  // namespace ENTRGI_ISA
}  // namespace entrgi::cpu
