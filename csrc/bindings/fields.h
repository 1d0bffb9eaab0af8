// Keyword arguments as the fields of a struct, and plans as dictionaries.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <type_traits>

#include "kernels/plan.h"

namespace entrgi {

namespace py = pybind11;

// The value of that name.
template <typename Enum, typename Values>
Enum parse(const char* argument, const std::string& name, const Values& values) {
  std::string expected;
  for (const Enum value : values) {
    if (name == name_of(value)) return value;
    expected += std::string(expected.empty() ? "" : ", ") + name_of(value);
  }
  throw py::value_error(std::string(argument) + " must be one of " + expected + ", got " + name);
}

inline DType parse_dtype(const char* argument, const std::string& name) {
  return parse<DType>(argument, name,
                      std::initializer_list{DType::kBFloat16, DType::kFloat16, DType::kFloat32});
}

// One keyword argument for each field: pointers as integers (0 or absent: null), dtypes by name. `done`
// raises for those that nobody asked for.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void operator()(T& field, const char* name) const {
    if (!given_.contains(name)) return;
    used_.add(name);
    const py::handle value = given_[name];
    try {
      if constexpr (std::is_pointer_v<T>) {
        field = reinterpret_cast<T>(value.cast<uintptr_t>());
      } else if constexpr (std::is_same_v<T, DType>) {
        field = parse_dtype(name, value.cast<std::string>());
      } else {
        field = value.cast<T>();
      }
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + " cannot be " + py::repr(value).cast<std::string>());
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
