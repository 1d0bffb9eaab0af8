// The one way from a launcher to the device: the kernel that was compiled for the dtypes and the tile, a grid
// that fits, attributes set once for every kernel and device, no error left behind for whoever launches next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../plan.h"

namespace entrgi {

struct LaunchConfig {
  int64_t grid;
  int threads;
  int64_t shared_bytes = 0;  // dynamic
  int64_t cluster = 1;       // CTAs of a cluster
};

// The error, and the runtime's record of it cleared: whatever is launched next by `<<<>>>`, here or in torch,
// would be blamed for it.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

inline cudaLaunchAttribute cluster_attribute(int64_t size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  return attribute;
}

// What was found out or done once for a device, of however many. Never forgotten, so that it can be asked
// until the process has ended; two threads that ask at once may both find it out.
template <typename Value>
class PerDevice {
 public:
  const Value* find(int device) const {  // null: not yet
    for (const Node* node = first_.load(std::memory_order_acquire); node != nullptr; node = node->next) {
      if (node->device == device) return &node->value;
    }
    return nullptr;
  }
  void add(int device, const Value& value) {
    Node* node = new Node{device, value, first_.load()};
    while (!first_.compare_exchange_weak(node->next, node)) {
    }
  }

 private:
  struct Node {
    int device;
    Value value;
    Node* next;
  };
  std::atomic<Node*> first_{nullptr};
};

// A kernel that was compiled, and what a device must be told before its first launch there.
class CompiledKernel {
 public:
  CompiledKernel(const void* function, int64_t most_shared_bytes);
  // Sets its attributes on a device, the current one, unless that was done before. cudaFuncSetAttribute may
  // wait for copies in flight, and loads the kernel's module, which a graph capture may refuse.
  cudaError_t prepare(int device);
  // A grid of no CTAs or of more than a device counts is cudaErrorInvalidConfiguration.
  cudaError_t launch(const LaunchConfig& config, void** arguments, cudaStream_t stream);
  CompiledKernel* next() const { return next_; }

 private:
  const void* function_;
  int most_shared_bytes_;  // dynamic shared memory of its largest plan
  CompiledKernel* next_;   // on the list that warm_up goes through
  PerDevice<bool> prepared_;
};

template <typename... Parameters>
struct KernelOf : CompiledKernel {
  KernelOf(void (*kernel)(Parameters...), int64_t most_shared_bytes)
      : CompiledKernel(reinterpret_cast<const void*>(kernel), most_shared_bytes) {}
};

// A kernel whose plans ask for at most so much dynamic shared memory.
template <auto kKernel, int64_t kMostSharedBytes = 0>
inline KernelOf compiled{kKernel, kMostSharedBytes};

// Launches a kernel with its own parameters; none (what was not compiled) is cudaErrorInvalidValue.
template <typename... Parameters>
cudaError_t launch(KernelOf<Parameters...>* kernel, const LaunchConfig& config, cudaStream_t stream,
                   std::type_identity_t<Parameters>... arguments) {
  if (kernel == nullptr) return cudaErrorInvalidValue;
  void* pointers[] = {&arguments...};
  return kernel->launch(config, pointers, stream);
}

// One of several types, by its place among them; a place outside is none.
template <typename... Types>
struct OneOf {
  int place;
};
// The element type of a matrix; of one whose elements have 16 bits; of one that has those of another or fp32.
inline OneOf<__nv_bfloat16, __half, float> any_type(DType dtype) {
  return {static_cast<int>(dtype)};
}
inline OneOf<__nv_bfloat16, __half> type_of_16_bits(DType dtype) {
  return {static_cast<int>(dtype)};
}
struct TheOthers {};
inline OneOf<TheOthers, float> same_or_float(DType dtype, DType other) {
  return {dtype == other ? 0 : dtype == DType::kFloat32 ? 1 : -1};
}
template <typename T, typename Other>
using SameOrFloat = std::conditional_t<std::is_same_v<T, TheOthers>, Other, T>;
static_assert(static_cast<int>(DType::kBFloat16) == 0 && static_cast<int>(DType::kFloat16) == 1 &&
                  static_cast<int>(DType::kFloat32) == 2,
              "the places of types are those of their dtypes");

// The tile of a plan: Place::value is its place in a list of those that were compiled.
template <const auto& kTiles, size_t... i>
auto tile_of(const Plan& plan, std::index_sequence<i...>) {
  OneOf<std::integral_constant<size_t, i>...> found{-1};
  ((kTiles[i].is_of(plan) ? void(found.place = i) : void()), ...);
  return found;
}
template <const auto& kTiles>
auto tile_of(const Plan& plan) {
  return tile_of<kTiles>(plan, std::make_index_sequence<std::size(kTiles)>{});
}

// kernel_of.template operator()<Types...>(), which gives a kernel's address, with the types of all choices;
// null where one of them is none. All kernels have the same parameters.
template <typename... Chosen, typename KernelOfTypes>
auto choose(const KernelOfTypes& kernel_of) {
  return kernel_of.template operator()<Chosen...>();
}
template <typename... Chosen, typename KernelOfTypes, typename First, typename... Types, typename... Choices>
auto choose(const KernelOfTypes& kernel_of, OneOf<First, Types...> which, Choices... rest) {
  decltype(choose<Chosen..., First>(kernel_of, rest...)) found = nullptr;
  int place = 0;
  const auto look = [&]<typename Type>() {
    if (place++ == which.place) found = choose<Chosen..., Type>(kernel_of, rest...);
  };
  look.template operator()<First>();
  (look.template operator()<Types>(), ...);
  return found;
}

}  // namespace entrgi
