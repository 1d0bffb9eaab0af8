// The raw launchers and device memory, for tests; no wheel holds them. Each launcher runs to its end.
#include "launchers.h"

#include <cuda_runtime_api.h>

#include <vector>

#include "fields.h"
#include "kernels/kernels.h"
#include "kernels/plan_forced.h"

namespace entrgi {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  }
}

#define FIELD(name) fields(p.name, #name)

Device device_here() {
  Device device{};
  check(current_device(&device), "current_device");
  return device;
}

struct Scratch {  // freed after the launch has finished; never initialised
  void* pointer = nullptr;
  explicit Scratch(int64_t bytes) {
    if (bytes > 0) check(cudaMalloc(&pointer, static_cast<size_t>(bytes)), "cudaMalloc");
  }
  ~Scratch() { cudaFree(pointer); }
};

// Runs one launcher to its end on the default stream and returns the plan that it ran under.
template <typename Params, typename Launcher>
py::dict run(Params& p, Op op, const PlanOverrides& overrides, Launcher launcher) {
  const Plan plan = make_forced_plan(op, shape_of(p), device_here(), overrides);
  const Scratch scratch(plan.workspace_bytes);
  p.workspace = scratch.pointer;
  check(launcher(p, plan, nullptr), name_of(op));
  check(cudaDeviceSynchronize(), name_of(op));
  return as_dict(plan);
}

template <typename Params>
void read_statistics(const Fields& fields, Params& p) {
  FIELD(logits), FIELD(n), FIELD(vocab), FIELD(temperature);
}

py::dict run_vocab_pass(bool draw, const py::kwargs& kwargs) {
  SampleTokensParams p{};
  const Fields fields{kwargs};
  read_statistics(fields, p);
  FIELD(logsumexp), FIELD(entropy), FIELD(tempered_entropy), FIELD(argmax);
  const PlanOverrides overrides = read_overrides(fields);
  if (draw) {
    FIELD(keys), FIELD(top_p), FIELD(top_k), FIELD(forbidden), FIELD(forbidden_ids), FIELD(num_forbidden);
    FIELD(error_flag);
    FIELD(token), FIELD(probability), FIELD(margin), FIELD(filtered_entropy);
  }
  fields.done();
  if (draw) return run(p, Op::kSampleTokens, overrides, sample_tokens);
  return run(p, Op::kLogitStatistics, overrides,
             [](const auto& q, const Plan& plan, cudaStream_t s) { return logit_statistics(q, plan, s); });
}

py::dict run_gumbel_perturb(const py::kwargs& kwargs) {
  GumbelPerturbParams p{};
  const Fields fields{kwargs};
  FIELD(logits), FIELD(n), FIELD(vocab), FIELD(keys), FIELD(scale), FIELD(output);
  const PlanOverrides overrides = read_overrides(fields);
  fields.done();
  return run(p, Op::kGumbelPerturb, overrides, gumbel_perturb);
}

py::dict run_statistics_backward(const py::kwargs& kwargs) {
  LogitStatisticsBackwardParams p{};
  const Fields fields{kwargs};
  read_statistics(fields, p);
  FIELD(grad_logsumexp), FIELD(grad_entropy), FIELD(grad_tempered_entropy), FIELD(logsumexp);
  FIELD(unit_logsumexp), FIELD(entropy), FIELD(tempered_entropy), FIELD(gradient);
  const PlanOverrides overrides = read_overrides(fields);
  fields.done();
  return run(p, Op::kLogitStatisticsBackward, overrides, logit_statistics_backward);
}

// A product for the kernels that want one, in fp64 on the host: what is tested is what they give it and what
// they make of its results.
std::vector<float> rows_of(const Matrix& from, int64_t rows, int64_t columns) {
  std::vector<float> dense(static_cast<size_t>(rows * columns));
  const size_t width = static_cast<size_t>(columns) * sizeof(float);
  check(cudaMemcpy2D(dense.data(), width, from.data, static_cast<size_t>(from.stride) * sizeof(float), width,
                     static_cast<size_t>(rows), cudaMemcpyDeviceToHost),
        "gemm");
  return dense;
}

void host_gemm(const MatrixProduct& p, cudaStream_t stream) {
  check(cudaStreamSynchronize(stream), "gemm");
  const std::vector<float> a = rows_of(p.a, p.m, p.k);
  const std::vector<float> b = p.b_transposed ? rows_of(p.b, p.n, p.k) : rows_of(p.b, p.k, p.n);
  std::vector<float> c(static_cast<size_t>(p.m * p.n));
  if (p.accumulate) c = rows_of(p.c, p.m, p.n);
  const int64_t of_k = p.b_transposed ? 1 : p.n, of_n = p.b_transposed ? p.k : 1;
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) {
      double sum = c[i * p.n + j];
      for (int64_t k = 0; k < p.k; ++k) sum += double{a[i * p.k + k]} * b[j * of_n + k * of_k];
      c[i * p.n + j] = static_cast<float>(sum);
    }
  }
  const size_t width = static_cast<size_t>(p.n) * sizeof(float);
  check(cudaMemcpy2D(p.c.data, static_cast<size_t>(p.c.stride) * sizeof(float), c.data(), width, width,
                     static_cast<size_t>(p.m), cudaMemcpyHostToDevice),
        "gemm");
}

template <typename Launcher>
auto with_host_gemm(Launcher launcher) {
  return [launcher](const auto& p, const Plan& plan, cudaStream_t stream) {
    return launcher(p, plan, host_gemm, stream);
  };
}

template <typename Params>
void read_embedding(const Fields& fields, Params& p) {
  FIELD(embedding), FIELD(dim), FIELD(logsumexp), FIELD(row_index), FIELD(target_rows), FIELD(soft);
}

py::dict run_relaxed_embedding(const py::kwargs& kwargs) {
  RelaxedEmbeddingParams p{};
  const Fields fields{kwargs};
  read_statistics(fields, p);
  read_embedding(fields, p);
  FIELD(hard_tokens), FIELD(weight), FIELD(output);
  const PlanOverrides overrides = read_overrides(fields);
  fields.done();
  return run(p, Op::kRelaxedEmbedding, overrides, with_host_gemm(relaxed_embedding));
}

py::dict run_logit_update(Op op, UpdateRule rule, const py::kwargs& kwargs) {
  LogitUpdateParams p{};
  p.rule = rule;
  const Fields fields{kwargs};
  read_statistics(fields, p);
  read_embedding(fields, p);
  FIELD(grad), FIELD(gradient), FIELD(exp_avg), FIELD(exp_avg_sq);
  FIELD(lr), FIELD(beta1), FIELD(beta2), FIELD(eps), FIELD(step), FIELD(last);
  const PlanOverrides overrides = read_overrides(fields);
  fields.done();
  return run(p, op, overrides, with_host_gemm(logit_update));
}

py::dict run_commit(const py::kwargs& kwargs) {
  CommitParams p{};
  const Fields fields{kwargs};
  FIELD(tokens), FIELD(trajectories), FIELD(length), FIELD(tokens_stride), FIELD(committed),
      FIELD(candidates);
  FIELD(confidence), FIELD(positions), FIELD(n), FIELD(splits), FIELD(counts), FIELD(keys);
  FIELD(has_eos), FIELD(eos_token_id), FIELD(alg_temp);
  fields.done();
  return run(p, Op::kCommit, {}, commit);
}
#undef FIELD

// Device memory for tests: what comes from here is bounds-checked in a simulator or under compute-sanitizer.
void define_memory(py::module_& m) {
  m.def("malloc", [](size_t bytes) {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    return reinterpret_cast<uintptr_t>(p);
  });
  m.def("free", [](uintptr_t p) { check(cudaFree(reinterpret_cast<void*>(p)), "cudaFree"); });
  m.def("copy_to_device", [](uintptr_t to, const py::buffer& from) {
    const py::buffer_info info = from.request();
    check(cudaMemcpy(reinterpret_cast<void*>(to), info.ptr, static_cast<size_t>(info.size * info.itemsize),
                     cudaMemcpyHostToDevice),
          "copy_to_device");
  });
  m.def("copy_to_host", [](const py::buffer& to, uintptr_t from) {
    const py::buffer_info info = to.request(true);
    check(cudaMemcpy(info.ptr, reinterpret_cast<void*>(from), static_cast<size_t>(info.size * info.itemsize),
                     cudaMemcpyDeviceToHost),
          "copy_to_host");
  });
  m.def("memset", [](uintptr_t p, int value, size_t bytes) {
    check(cudaMemset(reinterpret_cast<void*>(p), value, bytes), "cudaMemset");
  });
  m.def("synchronize", [] { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); });
}

}  // namespace

void define_launchers(py::module_& m) {
  py::module_ launch = m.def_submodule("launch",
                                       "Raw launchers: keyword arguments are the fields of params.h, "
                                       "pointers as integers. Each runs to its end and returns its plan.");
  launch.def("logit_statistics", [](const py::kwargs& k) { return run_vocab_pass(false, k); });
  launch.def("sample_tokens", [](const py::kwargs& k) { return run_vocab_pass(true, k); });
  launch.def("gumbel_perturb", &run_gumbel_perturb);
  launch.def("logit_statistics_backward", &run_statistics_backward);
  launch.def("relaxed_embedding", &run_relaxed_embedding);
  launch.def("logit_gradient", [](const py::kwargs& k) {
    return run_logit_update(Op::kLogitGradient, UpdateRule::kGradient, k);
  });
  launch.def("adam_step",
             [](const py::kwargs& k) { return run_logit_update(Op::kAdamStep, UpdateRule::kAdam, k); });
  launch.def("sgd_step",
             [](const py::kwargs& k) { return run_logit_update(Op::kSgdStep, UpdateRule::kSgd, k); });
  launch.def("commit", &run_commit);
  py::module_ memory = m.def_submodule("memory", "Device memory, for tests of the raw launchers.");
  define_memory(memory);
}

}  // namespace entrgi
