// Which kernel runs for a shape, how it is tiled and split, and the least work any kernel could do there.
// Pure C++: the launchers, the Python bindings and the tests of a machine without CUDA all use these
// functions.
#pragma once

#include <cstdint>

namespace entrgi {

enum class DType { kBFloat16, kFloat16, kFloat32 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}
const char* name_of(DType dtype);

enum class Op {
  kLogitStatistics,
  kLogitStatisticsBackward,
  kSampleTokens,
  kGumbelPerturb,
  kRelaxedEmbedding,
  kLogitGradient,
  kAdamStep,
  kSgdStep,
  kCommit,
};

const char* name_of(Op op);

struct Shape {
  int64_t n;             // rows of the logits (kCommit: candidates)
  int64_t vocab;         // V
  int64_t dim;           // d; operators without an embedding ignore it
  int64_t trajectories;  // kCommit only
  DType logits;
  DType embedding;
};

struct Device {
  int arch;     // 10 * major + minor: 80, 90
  int num_sms;  // multiprocessors
};

// Names are those of the kernel functions.
enum class Kernel {
  kVocabPass,
  kStatisticsBackward,
  kGumbelPerturb,
  kRelaxedEmbeddingSm80,
  kRelaxedEmbeddingSimt,
  kLogitUpdateSm80,
  kLogitUpdateSimt,
  kCommit,
};

const char* name_of(Kernel kernel);

// How the main kernel of an operator is launched. `grid` is one-dimensional (rows and splits may each pass
// 65,535, the limit of the other two dimensions). The small kernels around it (merge, reduce) follow from it.
struct Plan {
  Kernel kernel;
  int block_m = 0, block_n = 0,
      block_k = 0;  // tile of the output and of the reduction; 0 where there is none
  int stages = 0;   // depth of the cp.async pipeline
  int threads = 0;
  int64_t splits = 1;  // parts of the vocabulary that are reduced in a fixed order afterwards
  int64_t grid = 0;
  int64_t shared_bytes = 0;     // dynamic shared memory
  int64_t workspace_bytes = 0;  // scratch in device memory that the caller provides
};

// `splits` > 0 replaces the plan's own choice (still limited to what the shape allows): for tests.
Plan make_plan(Op op, const Shape& shape, const Device& device, int64_t splits = 0);

// Bytes that must cross the memory bus and floating-point operations of the matrix product (2 N V d),
// counting every input and output once. Adam: `step` 1 reads no moments, `last` writes none.
struct Floor {
  int64_t bytes;
  int64_t flops;
};
Floor floor_of(Op op, const Shape& shape, int64_t step = 2, bool last = false);

// Scratch layouts shared by the plan and the kernels.
constexpr int64_t kPartialStateBytes = 32;  // statistics of one split of one row
constexpr int64_t pitch_of(int64_t dim) {
  return (dim + 3) / 4 * 4;
}  // of a partial [N, d], in floats

}  // namespace entrgi
