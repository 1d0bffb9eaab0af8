// Argument checks and output allocation of every operator, shared by the CPU and the CUDA implementations.
//
// Each check raises std::runtime_error (RuntimeError in Python) naming the argument, what came and what was
// expected; arguments that share memory raise std::invalid_argument (ValueError). They look at shapes,
// dtypes, devices, addresses and scalars only: nothing here reads a tensor's data, so nothing here
// synchronises with a device. entrgi_ext/fakes.py says the same, in the same words, of tensors without
// memory. What needs the data (ids out of range) is checked in cpu.cpp; the CUDA kernels stay memory-safe
// instead.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace entrgi::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// Tensor::scalar_type asks torch for the numbers of its dtypes, one after the other, in every call.
inline ScalarType dtype_of(const Tensor& t) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float},  {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_int64(), ScalarType::Long},     {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_float64(), ScalarType::Double}, {aoti_torch_dtype_int32(), ScalarType::Int},
      {aoti_torch_dtype_bool(), ScalarType::Bool}};
  int32_t number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  for (const auto& [known_number, dtype] : known) {
    if (number == known_number) return dtype;
  }
  return t.scalar_type();
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream s;
  s << (t.is_cuda() ? "cuda:" : "device ") << t.get_device_index();
  return s.str();
}

// "float32 [4, 7] on cpu"
inline std::string describe(const Tensor& t) {
  std::ostringstream s;
  s << name_of(dtype_of(t)) << " [";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "] on " << device_of(t);
  return s.str();
}

inline ScalarType accumulator_dtype(const Tensor& logits) {
  return dtype_of(logits) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2] = {}, indices[2] = {};
  for (int i = 0; i < 2; ++i) {
    const AtenTensorHandle t = (i == 0 ? a : b).get();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &types[i]));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &indices[i]));
  }
  return types[0] == types[1] && indices[0] == indices[1];
}

// ---- scalars ----------------------------------------------------------------------------------------------

inline void check_temperature(double temperature) {
  ENTRGI_CHECK(std::isfinite(temperature) && temperature > 0, "temperature must be > 0 and finite, got ",
               temperature);
  // Beyond, z / temperature leaves the range in which fp32 tells logits apart.
  ENTRGI_CHECK(temperature >= 1e-6 && temperature <= 1e6, "temperature must be between 1e-6 and 1e6, got ",
               temperature);
}

inline void check_top_p(double top_p) {
  ENTRGI_CHECK(top_p >= 0 && top_p <= 1, "top_p must be in [0, 1], got ", top_p);
}

inline void check_top_k(std::optional<int64_t> top_k) {
  if (top_k) ENTRGI_CHECK(*top_k >= 1, "top_k must be >= 1 or None, got ", *top_k);
}

// ---- tensors ----------------------------------------------------------------------------------------------

inline void check_floating(const char* name, const Tensor& t) {
  const ScalarType dtype = dtype_of(t);
  const bool half_or_single =
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
  if (t.is_cpu()) {
    ENTRGI_CHECK(half_or_single || dtype == ScalarType::Double, name,
                 " must be bfloat16, float16, float32 or float64, got ", describe(t));
  } else {
    ENTRGI_CHECK(half_or_single, name, " must be bfloat16, float16 or float32 on this device, got ",
                 describe(t));
  }
}

inline void check_inner_stride(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  ENTRGI_CHECK(t.stride(last) == 1 || t.size(last) == 1 || t.numel() == 0, name,
               " must be contiguous in its last dimension, got stride ", t.stride(last), " (", describe(t),
               ")");
}

// An operator that writes a matrix in place must not see the same element twice (an expanded tensor).
inline void check_rows_disjoint(const char* name, const Tensor& t) {
  ENTRGI_CHECK(t.size(0) <= 1 || t.numel() == 0 || t.stride(0) >= t.size(1), name,
               " is written in place and its rows must not overlap, got row stride ", t.stride(0), " (",
               describe(t), ")");
}

inline void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype,
                         const Tensor& like) {
  ENTRGI_CHECK(same_device(t, like), name, " must be on ", device_of(like), ", got ", describe(t));
  ENTRGI_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && dtype_of(t) == dtype, name,
               " must be ", name_of(dtype), " [", rows, ", ", columns, "], got ", describe(t));
  check_inner_stride(name, t);
}

inline void check_vector(const char* name, const Tensor& t, int64_t length, ScalarType dtype,
                         const Tensor& like) {
  ENTRGI_CHECK(same_device(t, like), name, " must be on ", device_of(like), ", got ", describe(t));
  ENTRGI_CHECK(t.dim() == 1 && t.size(0) == length && dtype_of(t) == dtype, name, " must be ", name_of(dtype),
               " [", length, "], got ", describe(t));
}

inline void check_vector(const char* name, const OptionalTensor& t, int64_t length, ScalarType dtype,
                         const Tensor& like) {
  if (t) check_vector(name, *t, length, dtype, like);
}

inline void check_logits(const Tensor& logits) {
  ENTRGI_CHECK(logits.dim() == 2, "logits must be a matrix [N, V], got ", describe(logits));
  check_floating("logits", logits);
  ENTRGI_CHECK(logits.size(1) >= 1, "logits must have a vocabulary of at least one id (V >= 1), got ",
               describe(logits));
  ENTRGI_CHECK(logits.size(1) <= kMaxVocabulary, "logits must have a vocabulary of at most ", kMaxVocabulary,
               " ids, got ", describe(logits));
  check_inner_stride("logits", logits);
}

inline void check_embedding(const Tensor& embedding, const Tensor& logits) {
  ENTRGI_CHECK(embedding.dim() == 2 && embedding.size(0) == logits.size(1),
               "embedding must be [V, d] with V = ", logits.size(1), " as in logits, got ",
               describe(embedding));
  ENTRGI_CHECK(embedding.size(1) >= 1, "embedding must have at least one column (d >= 1), got ",
               describe(embedding));
  ENTRGI_CHECK(same_device(embedding, logits), "embedding must be on ", device_of(logits), ", got ",
               describe(embedding));
  check_floating("embedding", embedding);
  ENTRGI_CHECK((dtype_of(embedding) == ScalarType::Double) == (dtype_of(logits) == ScalarType::Double),
               "embedding must be float64 exactly where logits are: logits are ", name_of(dtype_of(logits)),
               ", got ", describe(embedding));
  check_inner_stride("embedding", embedding);
}

// rows int64 [N] tells the row of `target` (R rows) that logits row n reads or writes; None needs R == N.
inline void check_rows(const OptionalTensor& rows, const Tensor& logits, const char* target_name,
                       const Tensor& target) {
  const int64_t n = logits.size(0);
  check_vector("rows", rows, n, ScalarType::Long, logits);
  if (!rows) {
    ENTRGI_CHECK(target.dim() == 2 && target.size(0) == n, target_name, " must have ", n,
                 " rows (one for each row of logits) when rows is None, got ", describe(target));
  }
}

inline void check_hard_tokens(const OptionalTensor& hard_tokens, const OptionalTensor& weight,
                              const Tensor& logits) {
  check_vector("hard_tokens", hard_tokens, logits.size(0), ScalarType::Long, logits);
  check_vector("weight", weight, logits.size(0), accumulator_dtype(logits), logits);
  ENTRGI_CHECK(!weight || hard_tokens, "weight must be None when hard_tokens is None");
}

// A mask of the vocabulary, or the ids themselves.
inline void check_forbidden(const Tensor& forbidden, const Tensor& logits) {
  ENTRGI_CHECK(same_device(forbidden, logits), "forbidden must be on ", device_of(logits), ", got ",
               describe(forbidden));
  const ScalarType dtype = dtype_of(forbidden);
  const int64_t vocab = logits.size(1);
  ENTRGI_CHECK(forbidden.dim() == 1 &&
                   (dtype == ScalarType::Int || (dtype == ScalarType::Bool && forbidden.size(0) == vocab)),
               "forbidden must be bool [", vocab, "], or int32 [F], their ids, got ", describe(forbidden));
}

// ---- memory ----------------------------------------------------------------------------------------------

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

struct Argument {
  const char* name;
  const Tensor* tensor;  // null: None

  Argument(const char* n, const Tensor& t) : name(n), tensor(&t) {}
  Argument(const char* n, const OptionalTensor& t) : name(n), tensor(t ? &*t : nullptr) {}
};

// The bytes of a checked vector or matrix: `count` runs of `length`, each `step` after the one before.
struct Extent {
  uintptr_t begin = 0, end = 0;
  int64_t count = 0, step = 0, length = 0;

  Extent() = default;
  explicit Extent(const Tensor& t) {
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    const int64_t columns = dim == 2 ? sizes[1] : 1;
    if (sizes[0] == 0 || columns == 0) return;
    const int64_t item = bytes_of(dtype_of(t));
    length = item * columns;
    step = item * strides[0];
    count = step == 0 ? 1 : sizes[0];  // an expanded vector is one element
    if (step == length) {
      length *= count;
      count = 1;
    }
    begin = reinterpret_cast<uintptr_t>(t.data_ptr());
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
inline void check_apart(std::initializer_list<Argument> written, std::initializer_list<Argument> read) {
  constexpr size_t kMost = 16;
  Extent extents[kMost];
  const Argument* arguments[kMost];
  size_t count = 0;
  for (const auto& list : {written, read}) {
    for (const Argument& argument : list) {
      arguments[count] = &argument;
      if (argument.tensor != nullptr) extents[count] = Extent(*argument.tensor);
      ++count;
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = i + 1; j < count; ++j) {
      if (!overlap(extents[i], extents[j])) continue;
      std::ostringstream message;
      message << arguments[i]->name << " is written in place and must not share memory with "
              << arguments[j]->name << ", got " << describe(*arguments[i]->tensor) << " and "
              << describe(*arguments[j]->tensor);
      throw std::invalid_argument(message.str());
    }
  }
}

// ---- one check for each operator --------------------------------------------------------------------------

inline void check_logit_statistics(const Tensor& logits, double temperature) {
  check_logits(logits);
  check_temperature(temperature);
}

inline void check_logit_statistics_backward(const OptionalTensor& grad_logsumexp,
                                            const OptionalTensor& grad_entropy,
                                            const OptionalTensor& grad_tempered_entropy, const Tensor& logits,
                                            const Tensor& logsumexp, const Tensor& unit_logsumexp,
                                            const Tensor& entropy, const Tensor& tempered_entropy,
                                            double temperature) {
  check_logits(logits);
  check_temperature(temperature);
  const int64_t n = logits.size(0);
  const ScalarType dtype = accumulator_dtype(logits);
  check_vector("grad_logsumexp", grad_logsumexp, n, dtype, logits);
  check_vector("grad_entropy", grad_entropy, n, dtype, logits);
  check_vector("grad_tempered_entropy", grad_tempered_entropy, n, dtype, logits);
  check_vector("logsumexp", logsumexp, n, dtype, logits);
  check_vector("unit_logsumexp", unit_logsumexp, n, dtype, logits);
  check_vector("entropy", entropy, n, dtype, logits);
  check_vector("tempered_entropy", tempered_entropy, n, dtype, logits);
}

inline void check_sample_tokens(const Tensor& logits, const Tensor& keys, double temperature, double top_p,
                                std::optional<int64_t> top_k, const OptionalTensor& forbidden,
                                const OptionalTensor& error_flag) {
  check_logit_statistics(logits, temperature);
  check_top_p(top_p);
  check_top_k(top_k);
  check_matrix("keys", keys, logits.size(0), 4, ScalarType::Long, logits);
  if (forbidden) check_forbidden(*forbidden, logits);
  check_vector("error_flag", error_flag, 1, ScalarType::Int, logits);
  if (error_flag) {
    check_apart({{"error_flag", error_flag}}, {{"logits", logits}, {"keys", keys}, {"forbidden", forbidden}});
  }
}

inline void check_gumbel_perturb(const Tensor& logits, const Tensor& keys, double scale) {
  check_logits(logits);
  check_matrix("keys", keys, logits.size(0), 4, ScalarType::Long, logits);
  ENTRGI_CHECK(scale >= 0 && scale <= 1e6, "scale must be between 0 and 1e6, got ", scale);
}

inline void check_relaxed_embedding(const Tensor& logits, const Tensor& logsumexp, const Tensor& embedding,
                                    const OptionalTensor& hard_tokens, const OptionalTensor& weight,
                                    double temperature) {
  check_logits(logits);
  check_temperature(temperature);
  check_vector("logsumexp", logsumexp, logits.size(0), accumulator_dtype(logits), logits);
  check_embedding(embedding, logits);
  check_hard_tokens(hard_tokens, weight, logits);
}

inline void check_relaxed_embedding_(const Tensor& output, const Tensor& soft, const Tensor& logits,
                                     const Tensor& logsumexp, const Tensor& embedding,
                                     const OptionalTensor& hard_tokens, const OptionalTensor& weight,
                                     const OptionalTensor& rows, double temperature) {
  check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature);
  check_rows(rows, logits, "output", output);
  ENTRGI_CHECK(output.dim() == 2, "output must be a matrix [R, d], got ", describe(output));
  check_matrix("output", output, output.size(0), embedding.size(1), dtype_of(embedding), logits);
  check_rows_disjoint("output", output);
  check_matrix("soft", soft, logits.size(0), embedding.size(1), accumulator_dtype(logits), logits);
  check_rows_disjoint("soft", soft);
  check_apart({{"output", output}, {"soft", soft}}, {{"logits", logits},
                                                     {"logsumexp", logsumexp},
                                                     {"embedding", embedding},
                                                     {"hard_tokens", hard_tokens},
                                                     {"weight", weight},
                                                     {"rows", rows}});
}

inline void check_logit_gradient(const Tensor& grad, const Tensor& logits, const Tensor& logsumexp,
                                 const Tensor& embedding, const Tensor& soft, const OptionalTensor& rows,
                                 double temperature) {
  check_relaxed_embedding(logits, logsumexp, embedding, std::nullopt, std::nullopt, temperature);
  check_rows(rows, logits, "grad", grad);
  ENTRGI_CHECK(grad.dim() == 2, "grad must be a matrix [R, d], got ", describe(grad));
  check_matrix("grad", grad, grad.size(0), embedding.size(1), dtype_of(embedding), logits);
  check_matrix("soft", soft, logits.size(0), embedding.size(1), accumulator_dtype(logits), logits);
}

inline void check_step(const Tensor& logits, const Tensor& grad, const Tensor& logsumexp,
                       const Tensor& embedding, const Tensor& soft, const OptionalTensor& rows,
                       double temperature, double lr) {
  check_logit_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature);
  check_rows_disjoint("logits", logits);
  ENTRGI_CHECK(std::isfinite(lr), "lr must be finite, got ", lr);
}

inline void check_sgd_step_(const Tensor& logits, const Tensor& grad, const Tensor& logsumexp,
                            const Tensor& embedding, const Tensor& soft, const OptionalTensor& rows,
                            double temperature, double lr) {
  check_step(logits, grad, logsumexp, embedding, soft, rows, temperature, lr);
  check_apart(
      {{"logits", logits}},
      {{"grad", grad}, {"logsumexp", logsumexp}, {"embedding", embedding}, {"soft", soft}, {"rows", rows}});
}

inline void check_adam_step_(const Tensor& logits, const OptionalTensor& exp_avg,
                             const OptionalTensor& exp_avg_sq, const Tensor& grad, const Tensor& logsumexp,
                             const Tensor& embedding, const Tensor& soft, const OptionalTensor& rows,
                             double temperature, double lr, double beta1, double beta2, double eps,
                             int64_t step, bool last) {
  check_step(logits, grad, logsumexp, embedding, soft, rows, temperature, lr);
  ENTRGI_CHECK(beta1 >= 0 && beta1 < 1, "beta1 must be in [0, 1), got ", beta1);
  ENTRGI_CHECK(beta2 >= 0 && beta2 < 1, "beta2 must be in [0, 1), got ", beta2);
  ENTRGI_CHECK(std::isfinite(eps) && eps >= 0, "eps must be >= 0 and finite, got ", eps);
  ENTRGI_CHECK(step >= 1, "step counts from 1, got ", step);
  // The only step of its denoising step neither reads nor writes moments.
  if (!exp_avg || !exp_avg_sq) {
    ENTRGI_CHECK(step == 1 && last,
                 "exp_avg and exp_avg_sq may be None only when step == 1 and last, got step ", step,
                 ", last ", last ? "true" : "false");
  }
  const auto check_moment = [&](const char* name, const OptionalTensor& moment) {
    if (!moment) return;
    check_matrix(name, *moment, logits.size(0), logits.size(1), accumulator_dtype(logits), logits);
    check_rows_disjoint(name, *moment);
  };
  check_moment("exp_avg", exp_avg);
  check_moment("exp_avg_sq", exp_avg_sq);
  check_apart(
      {{"logits", logits}, {"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}},
      {{"grad", grad}, {"logsumexp", logsumexp}, {"embedding", embedding}, {"soft", soft}, {"rows", rows}});
}

inline void check_commit_(const Tensor& tokens, const Tensor& committed, const Tensor& candidates,
                          const Tensor& confidence, const Tensor& positions, const Tensor& splits,
                          const Tensor& counts, const OptionalTensor& keys,
                          std::optional<int64_t> /*eos_token_id*/, double alg_temp) {
  ENTRGI_CHECK(tokens.dim() == 2, "tokens must be a matrix [P, S], got ", describe(tokens));
  check_matrix("tokens", tokens, tokens.size(0), tokens.size(1), ScalarType::Long, tokens);
  check_rows_disjoint("tokens", tokens);
  ENTRGI_CHECK(candidates.dim() == 1, "candidates must be a vector [N], got ", describe(candidates));
  const int64_t trajectories = tokens.size(0), n = candidates.size(0);
  check_vector("candidates", candidates, n, ScalarType::Long, tokens);
  check_vector("committed", committed, n, ScalarType::Bool, tokens);
  ENTRGI_CHECK(n <= 1 || committed.stride(0) == 1, "committed must be contiguous, got stride ",
               committed.stride(0));
  const bool is_double = dtype_of(confidence) == ScalarType::Double && confidence.is_cpu();
  check_vector("confidence", confidence, n, is_double ? ScalarType::Double : ScalarType::Float, tokens);
  check_vector("positions", positions, n, ScalarType::Long, tokens);
  check_vector("splits", splits, trajectories + 1, ScalarType::Long, tokens);
  check_vector("counts", counts, trajectories, ScalarType::Long, tokens);
  ENTRGI_CHECK(std::isfinite(alg_temp) && alg_temp >= 0, "alg_temp must be >= 0 and finite, got ", alg_temp);
  ENTRGI_CHECK(alg_temp == 0 || keys, "keys must be given when alg_temp > 0, got None with alg_temp ",
               alg_temp);
  if (keys) check_matrix("keys", *keys, n, 4, ScalarType::Long, tokens);
  check_apart({{"tokens", tokens}, {"committed", committed}}, {{"candidates", candidates},
                                                               {"confidence", confidence},
                                                               {"positions", positions},
                                                               {"splits", splits},
                                                               {"counts", counts},
                                                               {"keys", keys}});
}

// Below, a confidence divided by it leaves fp32, and all of them rank alike; and Gumbel noise decides between
// equal confidences alone, as it does at this.
inline double committed_temperature(double alg_temp) {
  constexpr double kLeast = 1e-30;
  return alg_temp > 0 ? std::max(alg_temp, kLeast) : 0;
}

// ---- version counters -------------------------------------------------------------------------------------

class NoGrad {
 public:
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_ = aoti_torch_grad_mode_is_enabled();
};

inline bool has_version(const Tensor& t) {
  StableIValue stack[] = {torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_inference", "", stack, TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

inline void bump_version(const Tensor& t, bool known_to_have_one = false) {
  if (!known_to_have_one && !has_version(t)) return;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), t.get(), 0));
}
inline void bump_version(const OptionalTensor& t, bool known_to_have_one = false) {
  if (t) bump_version(*t, known_to_have_one);
}

// Bumps the version counters of what an operator writes: without this a tensor saved for backward and then
// overwritten would give a wrong gradient without an error. The stable ABI has no call for it. torch's copy
// of a tensor onto itself does it, and returns before it touches an element.
//
// Tensors made in inference mode have no counter, and torch refuses to write them elsewhere. Where the first
// has one the others are not asked, which would take as long as all the rest: they are written as torch's own
// operators would write them.
template <typename... Others>
void count_as_written(const Tensor& first, const Others&... others) {
  const NoGrad no_grad;  // the operators take no part in autograd
  const bool counted = has_version(first);
  if (counted) bump_version(first, true);
  (bump_version(others, counted), ...);
}

// ---- allocation -------------------------------------------------------------------------------------------

// Small row vectors may come strided (a column of a matrix, an expanded gradient): the kernels read them
// dense. A dense tensor is returned as it is. Never for what an operator writes.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline OptionalTensor dense(const OptionalTensor& t) {
  return t ? OptionalTensor(dense(*t)) : OptionalTensor();
}

// Not torch::stable::new_empty: its way through the dispatcher takes three times as long.
inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype) {
  const torch::stable::Device device = like.device();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(),
      &handle));
  return Tensor(handle);
}

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, 2, sizes, strides, dtype);
}

// acc [N, V] whose rows start at 16-byte boundaries, as the fast CUDA kernels want those that they read and
// write.
inline Tensor empty_accumulator_rows(const Tensor& logits) {
  const ScalarType dtype = accumulator_dtype(logits);
  const int64_t rows = logits.size(0), columns = logits.size(1), step = dtype == ScalarType::Double ? 2 : 4;
  const int64_t sizes[] = {rows, columns}, strides[] = {(columns + step - 1) / step * step, 1};
  return empty_strided(logits, 2, sizes, strides, dtype);
}

inline Tensor empty_vector(const Tensor& like, int64_t length, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &length, &stride, dtype);
}

// (logsumexp, entropy, tempered_entropy, argmax), all [N]
inline std::tuple<Tensor, Tensor, Tensor, Tensor> empty_statistics(const Tensor& logits) {
  const int64_t n = logits.size(0);
  const ScalarType dtype = accumulator_dtype(logits);
  return {empty_vector(logits, n, dtype), empty_vector(logits, n, dtype), empty_vector(logits, n, dtype),
          empty_vector(logits, n, ScalarType::Long)};
}

// empty_statistics, then (token, probability, margin, filtered_entropy), all [N]
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> empty_sample(
    const Tensor& logits) {
  const int64_t n = logits.size(0);
  const ScalarType dtype = accumulator_dtype(logits);
  return std::tuple_cat(
      empty_statistics(logits),
      std::make_tuple(empty_vector(logits, n, ScalarType::Long), empty_vector(logits, n, dtype),
                      empty_vector(logits, n, dtype), empty_vector(logits, n, dtype)));
}

}  // namespace entrgi::ops
