// The inner loops over one stretch of one row of logits, compiled once per instruction set and element type.
// Everything that branches on data or threads stands in the operators' files; these only stream.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "philox.h"

namespace entrgi::cpu {

// A stretch this long stays in the first-level cache between the two passes over it, and is short enough for
// sums of its terms in float. It is the unit of all fixed-order reductions.
constexpr int64_t kChunk = 4096;

// Probability masses e^((z - max) / temperature) in units of 2^-40: integers, so that no order of summation
// matters.
constexpr double kMassUnit = 0x1p40;
// Below this, half a unit is not reached.
constexpr double kMasslessBelow = -28.5;
// Masses are first summed in buckets of equal width in (max - z) / temperature; the last one takes the rest.
constexpr int kBuckets = 1024;
constexpr double kBucketsPerNat = 36.0;

// Sums over a chunk relative to its own maximum: s = sum e^x, t = sum x e^x with x = z - max ("unit") and
// with x = (z - max) / temperature ("tempered").
struct ChunkStatistics {
  double max, tempered_max;
  double unit_s, unit_t, tempered_s, tempered_t;
  bool invalid;  // holds NaN or +inf; nothing else is set then
};

struct Candidate {
  double value;
  uint64_t mass;
  int64_t id;
};

// Which ids of a row the filter keeps: z > threshold, and z == threshold up to the id `last_tie`.
struct Kept {
  double threshold;
  int64_t last_tie;
};

// The Gumbel maximum over the kept ids seen so far, and sums for their probabilities.
struct Draw {
  double sum = 0, weighted_sum = 0;  // sum e^x and sum x e^x, x = (z - zmax) / temperature
  double first, second;              // the two largest kept logits
  double score;                      // -inf: none yet
  int64_t token = -1;
};

struct LogitKinds {
  bool invalid, finite;  // some are NaN or +inf; some are neither that nor -inf
};

struct AdamFactors {
  double beta1, beta2, one_minus_beta1, one_minus_beta2;
  double bias1, bias2;  // 1 / (1 - beta^step)
  double lr, eps;
  bool first, last;
};

// z: the stretch's first element, n: its length, id: the vocabulary id of its first element; `forbidden` (may
// be null) starts at the same id.
struct RowKernels {
  void (*statistics)(const void* z, int64_t n, double temperature, ChunkStatistics& out);
  // First i with z[i] == value, or n.
  int64_t (*find)(const void* z, int64_t n, double value);
  double (*allowed_max)(const void* z, const uint8_t* forbidden, int64_t n);
  // Maxima of stretches of `group` ids, ceil(n / group) of them.
  void (*group_max)(const void* z, const uint8_t* forbidden, int64_t n, int64_t group, double* out);
  // Adds every id's mass to its bucket.
  void (*add_masses)(const void* z, const uint8_t* forbidden, int64_t n, double zmax, double temperature,
                     uint64_t* buckets);
  // Writes the ids of one bucket that have mass, in order; returns how many (out has room for n).
  int64_t (*gather_bucket)(const void* z, const uint8_t* forbidden, int64_t n, int64_t id, double zmax,
                           double temperature, int bucket, Candidate* out);
  // Writes the allowed values >= bound that are not -inf; returns how many (out has room for n).
  int64_t (*gather_above)(const void* z, const uint8_t* forbidden, int64_t n, double bound, double* out);
  void (*draw)(const void* z, const uint8_t* forbidden, int64_t n, int64_t id, double zmax,
               double temperature, const Kept& kept, const PhiloxKey& key, Draw& state);
  // e^((z - zmax) / temperature), of one element, as `draw` computes it.
  double (*scaled_exp)(const void* z, double zmax, double temperature);

  // out[i] (acc) = z[i] + scale * noise of the id; what the stretch holds.
  LogitKinds (*gumbel_perturb)(const void* z, int64_t n, int64_t id, double scale, const PhiloxKey& key,
                               void* out);

  // out[i] = g_lse q / tau - g_unit p (log p + H) - g_tempered q (log q + H_tau) / tau, in the logits' dtype.
  void (*statistics_backward)(const void* z, int64_t n, double temperature, const double* grads,
                              const double* values, void* out);

  // out[i] (acc) = e^(z / temperature - logsumexp); returns their sum.
  double (*probabilities)(const void* z, int64_t n, double temperature, double logsumexp, void* out);
  // In place on inner (acc): q (inner - dot) / temperature.
  void (*gradient)(const void* z, int64_t n, double temperature, double logsumexp, double dot, void* inner);
  void (*adam)(void* z, int64_t n, double temperature, double logsumexp, double dot, const void* inner,
               void* exp_avg, void* exp_avg_sq, const AdamFactors& factors);
  void (*sgd)(void* z, int64_t n, double temperature, double logsumexp, double dot, const void* inner,
              double lr);

  // The same element type as the embedding's: conversion to and from acc, and the blend of operator 2.
  void (*to_accumulator)(const void* from, int64_t n, void* to);
  // to += from (acc)
  void (*add)(const void* from, int64_t n, void* to);
  // row (acc) *= factor
  void (*scale)(void* row, int64_t n, double factor);
  // out = (1 - w) soft + w hard; hard null: soft.
  void (*blend)(const void* soft, const void* hard, double weight, int64_t n, void* out);
};

// The table for an element type on this machine; ENTRGI_CPU_ISA=generic|avx2|avx512 picks a lesser one.
const RowKernels& row_kernels(DType dtype);

// "generic", "avx2" or "avx512": what row_kernels gives.
const char* instruction_set();

namespace generic {
const RowKernels& row_kernels(DType dtype);
}
namespace avx2 {
const RowKernels& row_kernels(DType dtype);
}
namespace avx512 {
const RowKernels& row_kernels(DType dtype);
}

}  // namespace entrgi::cpu
