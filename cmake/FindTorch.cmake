# Where torch's headers and libraries are, from the Python package itself. torch's own CMake package is not used:
# it wants a CUDA toolkit whenever torch was built with one, and the stable ABI needs its headers only.
execute_process(
  COMMAND "${Python3_EXECUTABLE}" -c
          "import torch, pathlib; print(pathlib.Path(torch.__file__).parent, torch.__version__, torch.version.cuda or '', sep=';')"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_status)
if(NOT torch_status EQUAL 0)
  message(FATAL_ERROR "entrgi needs torch >= 2.10 to build, and ${Python3_EXECUTABLE} cannot import torch")
endif()
list(GET torch_facts 0 TORCH_ROOT)
list(GET torch_facts 1 TORCH_VERSION)
list(GET torch_facts 2 TORCH_CUDA_VERSION)
if(TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "entrgi needs torch >= 2.10 to build (stable C++ ABI), found ${TORCH_VERSION}")
endif()
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_ROOT}, CUDA: ${TORCH_CUDA_VERSION}")

# One build for torch 2.10 and everything newer.
add_library(entrgi_torch INTERFACE)
target_include_directories(entrgi_torch SYSTEM INTERFACE "${TORCH_ROOT}/include")
target_compile_definitions(entrgi_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(entrgi_torch INTERFACE "${TORCH_ROOT}/lib/libtorch.so" "${TORCH_ROOT}/lib/libtorch_cpu.so")

add_library(entrgi_torch_cuda INTERFACE)
target_link_libraries(entrgi_torch_cuda INTERFACE "${TORCH_ROOT}/lib/libtorch_cuda.so")
