// The CUDA backend: a plan, its workspace and a launch of csrc/kernels on torch's current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/kernels.h"
#include "../kernels/plan_forced.h"
#include "backend.h"
#include "checks.h"

namespace entrgi::ops {
namespace {

void report(const char* what, cudaError_t error) {
  ENTRGI_CHECK(error == cudaSuccess, what, ": CUDA error ", cudaGetErrorName(error), ", ",
               cudaGetErrorString(error));
}

// Makes the device of `like` current, takes its stream and the plan for the shape (ENTRGI_FORCE_PLAN
// included), allocates the workspace that the plan asks for, and launches.
template <typename Params, typename Launcher>
void launch(Op op, Params& p, const Argument& like, Launcher launcher) {
  const torch::stable::accelerator::DeviceGuard guard(like.device_index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device_index, &stream));
  Device device{};
  report(name_of(op), current_device(&device));
  ENTRGI_CHECK(device.arch >= 80, name_of(op), " needs a GPU of compute capability 8.0 or newer, got ",
               device.arch / 10, ".", device.arch % 10);
  Plan plan;
  try {
    plan = make_forced_plan(op, shape_of(p), device);
  } catch (const std::invalid_argument& error) {
    fail(error.what());
  }
  OptionalTensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty_vector(like, (plan.workspace_bytes + 3) / 4, ScalarType::Int);
    p.workspace = workspace->data_ptr();
  }
  report(name_of(op), launcher(p, plan, static_cast<cudaStream_t>(stream)));
}

// torch's matrix product on memory that is not a tensor's, on its current stream, which is the launch's. The
// CUDA kernel is called directly, below autograd and autocast: neither may change what happens inside an
// operator.
void torch_gemm(const MatrixProduct& p, cudaStream_t) {
  int device = 0;
  report("gemm", cudaGetDevice(&device));
  const auto view = [&](const Matrix& matrix, int64_t rows, int64_t columns, bool transposed) {
    const int64_t row_stride = transposed ? 1 : matrix.stride, column_stride = transposed ? matrix.stride : 1;
    return torch::stable::from_blob(matrix.data, {rows, columns}, {row_stride, column_stride},
                                    {torch::headeronly::DeviceType::CUDA, static_cast<int8_t>(device)},
                                    ScalarType::Float);
  };
  const Tensor a = view(p.a, p.m, p.k, false), b = view(p.b, p.k, p.n, p.b_transposed),
               c = view(p.c, p.m, p.n, false);
  if (p.accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(c.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(c.get(), a.get(), b.get()));
  }
}

template <typename Launcher>
auto with_torch_gemm(Launcher launcher) {
  return [launcher](const auto& p, const Plan& plan, cudaStream_t stream) {
    return launcher(p, plan, torch_gemm, stream);
  };
}

Op op_of(UpdateRule rule) {
  switch (rule) {
    case UpdateRule::kGradient:
      return Op::kLogitGradient;
    case UpdateRule::kAdam:
      return Op::kAdamStep;
    case UpdateRule::kSgd:
      return Op::kSgdStep;
  }
  return Op::kSgdStep;
}

void warm_up(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  report("warm_up", entrgi::warm_up());
}

// Of what the driver supports, 0 without one, and of the runtime built in: 13020 is 13.2.
std::tuple<int64_t, int64_t> cuda_versions() {
  int driver = 0, runtime = 0;
  report("cuda_versions", cudaDriverGetVersion(&driver));
  report("cuda_versions", cudaRuntimeGetVersion(&runtime));
  return {driver, runtime};
}

}  // namespace

namespace backend {

void run(LogitStatisticsParams& p, const Argument& like) {
  launch(Op::kLogitStatistics, p, like, logit_statistics);
}
void run(SampleTokensParams& p, const Argument& like) {
  launch(Op::kSampleTokens, p, like, sample_tokens);
}
void run(GumbelPerturbParams& p, const Argument& like) {
  launch(Op::kGumbelPerturb, p, like, gumbel_perturb);
}
void run(LogitStatisticsBackwardParams& p, const Argument& like) {
  launch(Op::kLogitStatisticsBackward, p, like, logit_statistics_backward);
}
void run(RelaxedEmbeddingParams& p, const Argument& like) {
  launch(Op::kRelaxedEmbedding, p, like, with_torch_gemm(relaxed_embedding));
}
void run(LogitUpdateParams& p, const Argument& like) {
  launch(op_of(p.rule), p, like, with_torch_gemm(logit_update));
}
void run(CommitParams& p, const Argument& like) {
  launch(Op::kCommit, p, like, commit);
}

}  // namespace backend
}  // namespace entrgi::ops

// They have no tensor whose device could choose an implementation.
STABLE_TORCH_LIBRARY_IMPL(entrgi, CompositeExplicitAutograd, m) {
  m.impl("warm_up", TORCH_BOX(&entrgi::ops::warm_up));
  m.impl("cuda_versions", TORCH_BOX(&entrgi::ops::cuda_versions));
}
