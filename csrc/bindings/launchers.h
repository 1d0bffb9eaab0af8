#pragma once

#include <pybind11/pybind11.h>

namespace entrgi {

// The submodules `launch` and `memory`.
void define_launchers(pybind11::module_& m);

}  // namespace entrgi
