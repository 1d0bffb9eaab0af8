// Which kernel runs for a shape, how it is tiled and split, and the least work any kernel could do there.
// Pure C++: the launchers, the Python bindings and the tests of a machine without CUDA all use these
// functions.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

#include "params.h"

namespace entrgi {

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

struct Shape {
  int64_t n;             // rows of the logits (kCommit: candidates)
  int64_t vocab;         // V
  int64_t dim;           // d; operators without an embedding ignore it
  int64_t trajectories;  // kCommit only
  DType logits;
  DType embedding;
  // Rows start at 16-byte boundaries: what TMA, bulk copies and vectors need. Of an update's logits: those of
  // the moments and the gradient as well.
  bool logits_aligned = true;
  bool embedding_aligned = true;
};

// Whether all rows of a matrix start at 16-byte boundaries. One row repeated (stride 0) has no tensor map:
// no.
inline bool rows_aligned(const void* base, int64_t stride, DType dtype) {
  return stride > 0 &&
         (reinterpret_cast<uintptr_t>(base) | static_cast<uint64_t>(stride * size_of(dtype))) % 16 == 0;
}

// What the code that runs on a device may use.
struct Device {
  int arch;     // 80: mma.sync; 90: wgmma and clusters (sm_90a on Hopper); 100: mma.sync and clusters (newer)
  int num_sms;  // multiprocessors
  // Clusters of so many CTAs, each alone on a multiprocessor, that run at once; 0 below 90.
  int clusters_of_2 = 0, clusters_of_4 = 0, clusters_of_8 = 0;

  bool has_wgmma() const { return arch == 90; }
  bool has_clusters() const { return arch >= 90; }
  // CTAs of clusters of `size` (1, 2, 4, 8) that run at once, in clusters.
  int64_t resident(int64_t size) const {
    return size == 1 ? num_sms : size == 2 ? clusters_of_2 : size == 4 ? clusters_of_4 : clusters_of_8;
  }
};

// A whole device of that architecture as far as public figures tell: groups have 16 or 18 multiprocessors, so
// clusters of four and eight leave two of 18 without work. A device at hand is asked (current_device).
Device typical_device(int arch, int num_sms);

// Names are those of the kernel functions.
enum class Kernel {
  kVocabPass,
  kVocabPassSm90,
  kStatisticsBackward,
  kGumbelPerturb,
  kRelaxedEmbeddingSm90,
  kRelaxedEmbeddingSm80,
  kRelaxedEmbeddingSimt,
  kRelaxedEmbeddingMatmul,
  kLogitUpdateSm90,
  kLogitUpdateSm80,
  kLogitUpdateSimt,
  kLogitUpdateMatmul,
  kCommit,
};

// Names, in the order of the enumerators.
template <typename Enum>
struct Names;
template <>
struct Names<DType> {
  static constexpr const char* kAll[] = {"bfloat16", "float16", "float32", "float64"};
};
template <>
struct Names<Op> {
  static constexpr const char* kAll[] = {"logit_statistics",
                                         "logit_statistics_backward",
                                         "sample_tokens",
                                         "gumbel_perturb",
                                         "relaxed_embedding",
                                         "logit_gradient",
                                         "adam_step_",
                                         "sgd_step_",
                                         "commit_"};
};
template <>
struct Names<Kernel> {
  static constexpr const char* kAll[] = {"vocab_pass",
                                         "vocab_pass_sm90",
                                         "statistics_backward",
                                         "gumbel_perturb",
                                         "relaxed_embedding_sm90",
                                         "relaxed_embedding_sm80",
                                         "relaxed_embedding_simt",
                                         "relaxed_embedding_matmul",
                                         "logit_update_sm90",
                                         "logit_update_sm80",
                                         "logit_update_simt",
                                         "logit_update_matmul",
                                         "commit"};
};
static_assert(std::size(Names<Op>::kAll) == static_cast<size_t>(Op::kCommit) + 1,
              "every operator has a name");
static_assert(std::size(Names<Kernel>::kAll) == static_cast<size_t>(Kernel::kCommit) + 1,
              "every kernel has a name");

template <typename Enum>
constexpr const char* name_of(Enum value) {
  return Names<Enum>::kAll[static_cast<size_t>(value)];
}

// How the main kernel of an operator is launched. `grid` is one-dimensional (rows and splits may each pass
// 65,535, the limit of the other two dimensions). The small kernels around it (merge, reduce) follow from it.
struct Plan {
  Kernel kernel;
  // Tile of the output and of the reduction; 0 where there is none.
  int block_m = 0, block_n = 0, block_k = 0;
  int stages = 0;  // depth of the pipeline of asynchronous copies
  int threads = 0;
  int cluster_m = 1, cluster_n = 1;  // CTAs of a cluster along the rows and along the columns of the output
  int64_t splits = 1;                // parts of the vocabulary that are reduced in a fixed order afterwards
  int64_t grid = 0;
  int64_t shared_bytes = 0;     // dynamic shared memory
  int64_t workspace_bytes = 0;  // scratch in device memory that the caller provides
};

// What a test or an experiment replaces in a plan; empty and 0 leave the plan's own choice.
struct PlanOverrides {
  std::string kernel;
  // Parts of the vocabulary, limited to what the shape allows; of logit_update_sm90, which has no parts, the
  // clusters of its persistent grid. Kernels with neither refuse more than one.
  int64_t splits = 0;
  int block_m = 0, block_n = 0, block_k = 0, stages = 0, cluster_m = 0, cluster_n = 0;
};

// visit(name, field) for every field, of one or of several overrides at once.
template <typename Visit, typename... Overrides>
void visit_fields(const Visit& visit, Overrides&... o) {
  visit("kernel", o.kernel...);
  visit("splits", o.splits...);
  visit("block_m", o.block_m...);
  visit("block_n", o.block_n...);
  visit("block_k", o.block_k...);
  visit("stages", o.stages...);
  visit("cluster_m", o.cluster_m...);
  visit("cluster_n", o.cluster_n...);
}

// Throws std::invalid_argument where the overrides ask for what was not built or cannot serve the shape.
Plan make_plan(Op op, const Shape& shape, const Device& device, const PlanOverrides& overrides = {});

// Bytes that must cross the memory bus and floating-point operations of the matrix product (2 N V d),
// counting every input and output once. Adam: `step` 1 reads no moments, `last` writes none.
struct Floor {
  int64_t bytes;
  int64_t flops;
};
Floor floor_of(Op op, const Shape& shape, int64_t step = 2, bool last = false);

// What the kernels of an operator ask of the memory system under a plan, where nothing depends on the data:
// bytes requested, before any cache. A simulator counts the same (benchmarks/simulated.py); `flops` are those
// issued to tensor cores or, for fp32 embeddings, to the ordinary ones, tile padding included. A word that
// all threads of a CTA read counts once for each of them. The products of the matmul kernels are torch's:
// their operands and results count once, and FLOPs without padding. commit_ has none: its rows per trajectory
// are data.
struct Requests {
  int64_t load_bytes;   // by threads: ordinary loads and cp.async
  int64_t bulk_bytes;   // by TMA and bulk copies, counted where they are issued
  int64_t store_bytes;  // by threads
  int64_t flops;
};
Requests requests_of(Op op, const Shape& shape, const Plan& plan, int64_t step = 2, bool last = false);

// What a CTA may have on Hopper and sm_100 (sm_120: 99 KB).
constexpr int kHopperSharedBytes = 227 * 1024;
// Of a partial [N, d] of the relaxed embedding, in floats.
constexpr int64_t pitch_of(int64_t dim) {
  return (dim + 3) / 4 * 4;
}

}  // namespace entrgi
