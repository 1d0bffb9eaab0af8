# Decides whether CUDA is built (ENTRGI_BUILD_CUDA) and compiles csrc/kernels once for every architecture.
include(CheckLanguage)

set(ENTRGI_BUILD_CUDA FALSE)
if(NOT ENTRGI_CUDA MATCHES "^(0|1|auto)$")
  message(FATAL_ERROR "ENTRGI_CUDA must be 0, 1 or auto, got '${ENTRGI_CUDA}'")
endif()
if(NOT ENTRGI_CUDA STREQUAL "0")
  check_language(CUDA)
  set(ENTRGI_CUTLASS_INCLUDE "" CACHE PATH "CUTLASS's headers; empty: those of the Python package nvidia-cutlass")
  if(NOT ENTRGI_CUTLASS_INCLUDE)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c
              "import cutlass_library, pathlib; print(pathlib.Path(cutlass_library.__file__).parent / 'source' / 'include')"
      OUTPUT_VARIABLE ENTRGI_CUTLASS_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(entrgi_no_cuda "nvcc was not found")
  elseif(NOT TORCH_CUDA_VERSION)
    set(entrgi_no_cuda "torch ${TORCH_VERSION} is a CPU-only build")
  elseif(NOT EXISTS "${ENTRGI_CUTLASS_INCLUDE}/cute")
    set(entrgi_no_cuda "CUTLASS's headers were not found (pip install --no-deps nvidia-cutlass)")
  else()
    set(ENTRGI_BUILD_CUDA TRUE)
  endif()
  if(NOT ENTRGI_BUILD_CUDA AND ENTRGI_CUDA STREQUAL "1")
    message(FATAL_ERROR "ENTRGI_CUDA=1, but ${entrgi_no_cuda}")
  endif()
else()
  set(entrgi_no_cuda "ENTRGI_CUDA=0")
endif()

if(ENTRGI_BUILD_CUDA)
  # Ampere to Ada run the sm_80 code, Hopper sm_90a, anything newer compiles the compute_90 PTX at first use:
  # clusters there, too, but wgmma is sm_90a's alone.
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;90-virtual")
  enable_language(CUDA)
  message(STATUS "entrgi: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} with ${CMAKE_CUDA_COMPILER}")
else()
  message(STATUS "entrgi: CUDA kernels are left out: ${entrgi_no_cuda}")
endif()

# entrgi_cuda_kernels(TARGET): all kernels and launchers in one shared library, which knows no torch and serves both
# the operators and the bindings. The CUDA runtime is linked statically: it needs no toolkit where it runs.
function(entrgi_cuda_kernels target)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/kernels/*.cu" "${CMAKE_SOURCE_DIR}/csrc/kernels/*.cpp")
  find_package(CUDAToolkit REQUIRED)
  add_library(${target} SHARED ${sources})
  target_include_directories(${target} PUBLIC "${CMAKE_SOURCE_DIR}/csrc")
  target_include_directories(${target} SYSTEM PRIVATE "${ENTRGI_CUTLASS_INCLUDE}")
  target_compile_definitions(${target} PUBLIC ENTRGI_WITH_CUDA ENTRGI_CUDA_ARCHITECTURES="sm_80,sm_90a,compute_90")
  # Register spills, and what ptxas calls a potential loss of performance: errors where ENTRGI_WERROR is set (make,
  # CI), for they cost time and not results, and another ptxas may see things in another way.
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v,-warn-spills>)
  set(launcher "${Python3_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/cmake/read_ptxas.py")
  if(ENTRGI_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-Werror>)
    list(APPEND launcher --strict)
  endif()
  if(ENTRGI_LINEINFO)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)
  endif()
  if(ENTRGI_BOUNDED_WAITS)
    target_compile_definitions(${target} PRIVATE ENTRGI_BOUNDED_WAITS)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)  # whose drivers all unpack it
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
  endif()
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static
                                             CUDA_COMPILER_LAUNCHER "${launcher}"
                                             CXX_VISIBILITY_PRESET default LIBRARY_OUTPUT_DIRECTORY "${ENTRGI_OUTPUT}")
endfunction()
