// What the operators check of their arguments, whatever the device.
//
// Each check raises std::runtime_error (RuntimeError in Python) naming the argument, what came and what was
// expected; arguments that share memory raise std::invalid_argument (ValueError). They look at shapes,
// dtypes, devices, addresses and scalars only: nothing here reads a tensor's data, so nothing here
// synchronises with a device. entrgi_ext/fakes.py says the same, in the same words and order, of tensors
// without memory. What needs the data (ids out of range) is checked in csrc/cpu; the CUDA kernels stay
// memory-safe instead.
#pragma once

#include <cmath>
#include <initializer_list>
#include <stdexcept>

#include "tensors.h"

namespace entrgi::ops {

// Masses are sums of at most V integers <= 2^40: V <= 2^23 keeps them below 2^63.
constexpr int64_t kMaxVocabulary = int64_t{1} << 23;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the parts of the message are evaluated only where the check fails: describing a tensor
// takes longer than a small operator. Unlike STD_TORCH_CHECK it adds no function or file name: the message is
// for the caller of the operator.
#define ENTRGI_CHECK(condition, ...)                    \
  do {                                                  \
    if (!(condition)) ::entrgi::ops::fail(__VA_ARGS__); \
  } while (false)

// ---- scalars ----------------------------------------------------------------------------------------------

inline void check_temperature(double temperature) {
  ENTRGI_CHECK(std::isfinite(temperature) && temperature > 0, "temperature must be > 0 and finite, got ",
               temperature);
  // Beyond, z / temperature leaves the range in which fp32 tells logits apart.
  ENTRGI_CHECK(temperature >= 1e-6 && temperature <= 1e6, "temperature must be between 1e-6 and 1e6, got ",
               temperature);
}

// ---- tensors ----------------------------------------------------------------------------------------------

inline void check_device(const Argument& a, const Argument& like) {
  ENTRGI_CHECK(a.device_type == like.device_type && a.device_index == like.device_index, a.name,
               " must be on ", device_of(like), ", got ", describe(a));
}

inline void check_floating(const Argument& a) {
  const bool half_or_single =
      a.dtype == ScalarType::BFloat16 || a.dtype == ScalarType::Half || a.dtype == ScalarType::Float;
  if (a.is_cpu()) {
    ENTRGI_CHECK(half_or_single || a.dtype == ScalarType::Double, a.name,
                 " must be bfloat16, float16, float32 or float64, got ", describe(a));
  } else {
    ENTRGI_CHECK(half_or_single, a.name, " must be bfloat16, float16 or float32 on this device, got ",
                 describe(a));
  }
}

inline void check_inner_stride(const Argument& a) {
  const int64_t last = a.dim - 1;
  ENTRGI_CHECK(a.strides[last] == 1 || a.sizes[last] == 1 || a.is_empty(), a.name,
               " must be contiguous in its last dimension, got stride ", a.strides[last], " (", describe(a),
               ")");
}

// An operator that writes a matrix in place must not see the same element twice (an expanded tensor).
inline void check_rows_disjoint(const Argument& a) {
  ENTRGI_CHECK(a.sizes[0] <= 1 || a.is_empty() || a.strides[0] >= a.sizes[1], a.name,
               " is written in place and its rows must not overlap, got row stride ", a.strides[0], " (",
               describe(a), ")");
}

// For those below: None is fine where an argument may be None.
inline void check_matrix(const Argument& a, int64_t rows, int64_t columns, ScalarType dtype,
                         const Argument& like) {
  if (!a) return;
  check_device(a, like);
  ENTRGI_CHECK(a.dim == 2 && a.sizes[0] == rows && a.sizes[1] == columns && a.dtype == dtype, a.name,
               " must be ", name_of(dtype), " [", rows, ", ", columns, "], got ", describe(a));
  check_inner_stride(a);
}

inline void check_vector(const Argument& a, int64_t length, ScalarType dtype, const Argument& like) {
  if (!a) return;
  check_device(a, like);
  ENTRGI_CHECK(a.dim == 1 && a.sizes[0] == length && a.dtype == dtype, a.name, " must be ", name_of(dtype),
               " [", length, "], got ", describe(a));
}

// A value for each row of the logits.
inline void check_row_values(const Argument& a, const Argument& logits) {
  check_vector(a, logits.sizes[0], logits.accumulator(), logits);
}

inline void check_logits(const Argument& logits) {
  ENTRGI_CHECK(logits.dim == 2, "logits must be a matrix [N, V], got ", describe(logits));
  check_floating(logits);
  ENTRGI_CHECK(logits.sizes[1] >= 1, "logits must have a vocabulary of at least one id (V >= 1), got ",
               describe(logits));
  ENTRGI_CHECK(logits.sizes[1] <= kMaxVocabulary, "logits must have a vocabulary of at most ", kMaxVocabulary,
               " ids, got ", describe(logits));
  check_inner_stride(logits);
}

inline void check_keys(const Argument& keys, int64_t rows, const Argument& like) {
  check_matrix(keys, rows, 4, ScalarType::Long, like);
}

// A mask of the vocabulary, or the ids themselves.
inline void check_forbidden(const Argument& forbidden, const Argument& logits) {
  if (!forbidden) return;
  check_device(forbidden, logits);
  const int64_t vocab = logits.sizes[1];
  ENTRGI_CHECK(forbidden.dim == 1 && (forbidden.dtype == ScalarType::Int ||
                                      (forbidden.dtype == ScalarType::Bool && forbidden.sizes[0] == vocab)),
               "forbidden must be bool [", vocab, "], or int32 [F], their ids, got ", describe(forbidden));
}

inline void check_embedding(const Argument& embedding, const Argument& logits) {
  ENTRGI_CHECK(embedding.dim == 2 && embedding.sizes[0] == logits.sizes[1],
               "embedding must be [V, d] with V = ", logits.sizes[1], " as in logits, got ",
               describe(embedding));
  ENTRGI_CHECK(embedding.sizes[1] >= 1, "embedding must have at least one column (d >= 1), got ",
               describe(embedding));
  check_device(embedding, logits);
  check_floating(embedding);
  ENTRGI_CHECK((embedding.dtype == ScalarType::Double) == (logits.dtype == ScalarType::Double),
               "embedding must be float64 exactly where logits are: logits are ", name_of(logits.dtype),
               ", got ", describe(embedding));
  check_inner_stride(embedding);
}

// `target` [R, d] in the embedding's dtype, and row_index int64 [N], the row of it that a row of the logits
// reads or writes; None needs R == N.
inline void check_target(const Argument& target, const Argument& row_index, const Argument& logits,
                         const Argument& embedding) {
  const int64_t n = logits.sizes[0];
  check_vector(row_index, n, ScalarType::Long, logits);
  if (!row_index) {
    ENTRGI_CHECK(target.dim == 2 && target.sizes[0] == n, target.name, " must have ", n,
                 " rows (one for each row of logits) when row_index is None, got ", describe(target));
  }
  ENTRGI_CHECK(target.dim == 2, target.name, " must be a matrix [R, d], got ", describe(target));
  check_matrix(target, target.sizes[0], embedding.sizes[1], embedding.dtype, logits);
}

// ---- memory -----------------------------------------------------------------------------------------------

// Of the dtypes that a check lets through.
inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 8;
  }
}

// The bytes of a checked vector or matrix: `count` runs of `length`, each `step` after the one before.
struct Extent {
  uintptr_t begin = 0, end = 0;
  int64_t count = 0, step = 0, length = 0;

  Extent() = default;
  explicit Extent(const Argument& a) {
    if (!a || a.is_empty()) return;
    const int64_t item = bytes_of(a.dtype);
    length = item * (a.dim == 2 ? a.sizes[1] : 1);
    step = item * a.strides[0];
    count = step == 0 ? 1 : a.sizes[0];  // an expanded vector is one element
    if (step == length) {
      length *= count;
      count = 1;
    }
    begin = reinterpret_cast<uintptr_t>(a.data());
    end = begin + (count - 1) * step + length;
  }
};

inline bool overlap(const Extent& a, const Extent& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  // Columns of one buffer may lie between each other: both lists of runs are walked in the order of
  // addresses.
  for (int64_t i = 0, j = 0; i < a.count && j < b.count;) {
    const uintptr_t first = a.begin + i * a.step, second = b.begin + j * b.step;
    if (first < second + b.length && second < first + a.length) return true;
    ++(first < second ? i : j);
  }
  return false;
}

// What is written must share memory with no other argument: the operators read and write in any order.
inline void check_apart(std::initializer_list<const Argument*> written,
                        std::initializer_list<const Argument*> read) {
  constexpr size_t kMost = 16;
  Extent extents[kMost];
  const Argument* arguments[kMost];
  size_t count = 0;
  for (const auto& list : {written, read}) {
    for (const Argument* argument : list) {
      arguments[count] = argument;
      extents[count++] = Extent(*argument);
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = i + 1; j < count; ++j) {
      if (!overlap(extents[i], extents[j])) continue;
      std::ostringstream message;
      message << arguments[i]->name << " is written in place and must not share memory with "
              << arguments[j]->name << ", got " << describe(*arguments[i]) << " and "
              << describe(*arguments[j]);
      throw std::invalid_argument(message.str());
    }
  }
}

}  // namespace entrgi::ops
