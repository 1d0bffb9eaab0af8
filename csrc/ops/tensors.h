// Tensors across torch's stable C interface: what they are, how they are allocated, and their version
// counters.
//
// Every question to torch is a call through that interface; what a check or a kernel needs of an argument is
// asked once (Argument).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "params.h"

namespace entrgi::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// An argument that is a tensor or None, by its name. Lives no longer than the tensor.
struct Argument {
  const char* name;
  const Tensor* tensor = nullptr;  // null: None
  ScalarType dtype = ScalarType::Undefined;
  int32_t device_type = 0, device_index = 0;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;

  Argument(const char* name_, const Tensor& t) : name(name_), tensor(&t), dtype(dtype_of(t)) {
    const AtenTensorHandle handle = t.get();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  }
  Argument(const char* name_, const OptionalTensor& t) : name(name_) {
    if (t) *this = Argument(name_, *t);
  }

  explicit operator bool() const { return tensor != nullptr; }
  bool is_cpu() const { return device_type == aoti_torch_device_type_cpu(); }
  bool is_empty() const { return std::find(sizes, sizes + dim, 0) != sizes + dim; }
  bool is_dense() const {
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return is_empty();
      expected *= sizes[i];
    }
    return true;
  }
  // The dtype of the arithmetic on it, and of statistics and moments.
  ScalarType accumulator() const {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void* data() const { return tensor == nullptr ? nullptr : tensor->data_ptr(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }
  // Of a checked floating matrix, or nothing. One row may have any stride.
  Matrix matrix() const {
    if (tensor == nullptr) return {};
    const DType element = dtype == ScalarType::BFloat16 ? DType::kBFloat16
                          : dtype == ScalarType::Half   ? DType::kFloat16
                          : dtype == ScalarType::Double ? DType::kFloat64
                                                        : DType::kFloat32;
    return {data(), strides[0], element};
  }
};

inline std::string device_of(const Argument& a) {
  if (a.is_cpu()) return "cpu";
  std::ostringstream s;
  s << (a.tensor->is_cuda() ? "cuda:" : "device ") << a.device_index;
  return s.str();
}

// "float32 [4, 7] on cpu"
inline std::string describe(const Argument& a) {
  std::ostringstream s;
  s << name_of(a.dtype) << " [";
  for (int64_t i = 0; i < a.dim; ++i) s << (i ? ", " : "") << a.sizes[i];
  s << "] on " << device_of(a);
  return s.str();
}

// A small array that may come strided (a column of a matrix, an expanded gradient), as the kernels read it:
// dense. The tensor's own memory where it is, a copy elsewhere. Never for what an operator writes.
class Dense {
 public:
  explicit Dense(const Argument& a) {
    if (!a) return;
    if (!a.is_dense()) copy_ = torch::stable::contiguous(*a.tensor);
    data_ = copy_ ? copy_->data_ptr() : a.data();
  }

  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  OptionalTensor copy_;
  void* data_ = nullptr;
};

// ---- allocation -------------------------------------------------------------------------------------------

// On the device of `like`. Not torch::stable::new_empty: its way through the dispatcher takes three times as
// long.
inline Tensor empty_strided(const Argument& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_matrix(const Argument& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, 2, sizes, strides, dtype);
}

// acc [N, V] whose rows start at 16-byte boundaries, as the fast CUDA kernels want those that they read and
// write.
inline Tensor empty_accumulator_rows(const Argument& logits) {
  const ScalarType dtype = logits.accumulator();
  const int64_t columns = logits.sizes[1], step = dtype == ScalarType::Double ? 2 : 4;
  const int64_t sizes[] = {logits.sizes[0], columns}, strides[] = {(columns + step - 1) / step * step, 1};
  return empty_strided(logits, 2, sizes, strides, dtype);
}

inline Tensor empty_vector(const Argument& like, int64_t length, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &length, &stride, dtype);
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

inline void bump_version(const Argument& a, bool known_to_have_one = false) {
  if (!a || !(known_to_have_one || has_version(*a.tensor))) return;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(a.tensor->get(), a.tensor->get(), 0));
}

// Bumps the version counters of what an operator writes: without this a tensor saved for backward and then
// overwritten would give a wrong gradient without an error. The stable ABI has no call for it. torch's copy
// of a tensor onto itself does it, and returns before it touches an element.
//
// Tensors made in inference mode have no counter, and torch refuses to write them elsewhere. Where the first
// has one the others are not asked, which would take as long as all the rest: they are written as torch's own
// operators would write them.
template <typename... Others>
void count_as_written(const Argument& first, const Others&... others) {
  const NoGrad no_grad;  // the operators take no part in autograd
  const bool counted = has_version(*first.tensor);
  if (counted) bump_version(first, true);
  (bump_version(others, counted), ...);
}

}  // namespace entrgi::ops
