// Keyword arguments as the fields of a struct, and plans as dictionaries.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <type_traits>

#include "kernels/plan.h"
#include "params.h"

namespace entrgi {

namespace py = pybind11;

// The value of that name, one of the first `count`.
template <typename Enum>
Enum parse(const char* argument, const std::string& name, size_t count = std::size(Names<Enum>::kAll)) {
  std::string expected;
  for (size_t i = 0; i < count; ++i) {
    if (name == Names<Enum>::kAll[i]) return static_cast<Enum>(i);
    expected += std::string(expected.empty() ? "" : ", ") + Names<Enum>::kAll[i];
  }
  throw py::value_error(std::string(argument) + " must be one of " + expected + ", got " + name);
}

inline DType parse_dtype(const char* argument, const std::string& name) {
  return parse<DType>(argument, name, static_cast<size_t>(DType::kFloat64));  // which the CPU alone takes
}

// A Python value as a T; raises a sentence that names the argument.
template <typename T>
T read(const char* name, py::handle value) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    const std::string got = py::repr(value).cast<std::string>();
    if constexpr (std::is_integral_v<T>) {
      if (py::isinstance<py::int_>(value)) {
        throw py::value_error(std::string(name) + " must be a number of " + std::to_string(8 * sizeof(T)) +
                              " bits, got " + got);
      }
    }
    throw py::type_error(std::string(name) + " cannot be " + got);
  }
}

// One keyword argument for each field: pointers as integers (0 or absent: null), dtypes by name; of a matrix
// name=, name_stride= and name_dtype=. `done` raises for those that nobody asked for.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void operator()(T& field, const char* name) const {
    if constexpr (std::is_same_v<T, Matrix>) {
      const std::string matrix = name;
      (*this)(field.data, name);
      (*this)(field.stride, (matrix + "_stride").c_str());
      (*this)(field.dtype, (matrix + "_dtype").c_str());
    } else if (given_.contains(name)) {
      used_.add(name);
      const py::handle value = given_[name];
      if constexpr (std::is_pointer_v<T>) {
        field = reinterpret_cast<T>(read<uintptr_t>(name, value));
      } else if constexpr (std::is_same_v<T, DType>) {
        field = parse_dtype(name, read<std::string>(name, value));
      } else {
        field = read<T>(name, value);
      }
    }
  }

  void done() const {
    for (const auto& [name, value] : given_) {
      if (!used_.contains(name)) {
        throw py::type_error("unknown keyword argument " + name.cast<std::string>());
      }
    }
  }

 private:
  const py::kwargs& given_;
  mutable py::set used_;
};

// kernel=, splits=, block_m= ...; empty or 0 leaves the plan's own choice.
inline PlanOverrides read_overrides(const Fields& fields) {
  PlanOverrides overrides;
  const auto read = [&](const char* name, auto& field) {
    fields(field, name);
    if constexpr (std::is_integral_v<std::decay_t<decltype(field)>>) {
      if (field < 0) throw py::value_error(std::string(name) + " must be >= 0, got " + std::to_string(field));
    }
  };
  visit_fields(read, overrides);
  return overrides;
}

inline py::dict as_dict(const Plan& plan) {
  return py::dict(py::arg("kernel") = name_of(plan.kernel),
                  py::arg("tile") = py::make_tuple(plan.block_m, plan.block_n, plan.block_k),
                  py::arg("stages") = plan.stages, py::arg("threads") = plan.threads,
                  py::arg("cluster") = py::make_tuple(plan.cluster_m, plan.cluster_n),
                  py::arg("splits") = plan.splits, py::arg("grid") = plan.grid,
                  py::arg("shared_bytes") = plan.shared_bytes,
                  py::arg("workspace_bytes") = plan.workspace_bytes);
}

}  // namespace entrgi
