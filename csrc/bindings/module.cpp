// Python bindings of the kernel layer, for what is not an operator: launch plans, floors, the architectures
// compiled in and, where CUDA is built, the raw launchers. Imports neither torch nor numpy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels/plan.h"
#ifdef ENTRGI_WITH_CUDA
#include <cuda_runtime_api.h>

#include "kernels/kernels.h"
#endif

#ifndef ENTRGI_CUDA_ARCHITECTURES
#define ENTRGI_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace entrgi {
namespace {

template <typename Enum>
Enum parse(const char* argument, const std::string& name, std::initializer_list<Enum> values) {
  std::string expected;
  for (const Enum value : values) {
    if (name == name_of(value)) return value;
    expected += std::string(expected.empty() ? "" : ", ") + name_of(value);
  }
  throw py::value_error(std::string(argument) + " must be one of " + expected + ", got " + name);
}

DType parse_dtype(const char* argument, const std::string& name) {
  return parse(argument, name, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
}

Op parse_op(const std::string& name) {
  return parse("op", name,
               {Op::kLogitStatistics, Op::kLogitStatisticsBackward, Op::kSampleTokens, Op::kGumbelPerturb,
                Op::kRelaxedEmbedding, Op::kLogitGradient, Op::kAdamStep, Op::kSgdStep, Op::kCommit});
}

Shape make_shape(int64_t n, int64_t vocab, int64_t dim, const std::string& logits_dtype,
                 const std::string& embedding_dtype, int64_t trajectories) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    if (value < least) {
      throw py::value_error(std::string(name) + " must be >= " + std::to_string(least) + ", got " +
                            std::to_string(value));
    }
  };
  at_least("n", n, 0);
  at_least("vocab", vocab, 1);
  at_least("dim", dim, 1);
  at_least("trajectories", trajectories, 0);
  return {n,
          vocab,
          dim,
          trajectories,
          parse_dtype("logits_dtype", logits_dtype),
          parse_dtype("embedding_dtype", embedding_dtype)};
}

py::dict as_dict(const Plan& plan) {
  py::dict d;
  d["kernel"] = name_of(plan.kernel);
  d["tile"] = py::make_tuple(plan.block_m, plan.block_n, plan.block_k);
  d["stages"] = plan.stages;
  d["threads"] = plan.threads;
  d["cluster"] = py::make_tuple(plan.cluster_m, plan.cluster_n);
  d["splits"] = plan.splits;
  d["grid"] = plan.grid;
  d["shared_bytes"] = plan.shared_bytes;
  d["workspace_bytes"] = plan.workspace_bytes;
  return d;
}

std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  std::istringstream list(ENTRGI_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

#ifdef ENTRGI_WITH_CUDA
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  }
}

// Keyword arguments of a launcher, one for each field: pointers as integers (0 or absent: null), dtypes by
// name.
struct Fields {
  const py::kwargs& given;
  mutable size_t used = 0;

  template <typename T>
  void operator()(T& field, const char* name) const {
    if (!given.contains(name)) return;
    ++used;
    const py::handle value = given[name];
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(value.cast<uintptr_t>());
    } else if constexpr (std::is_same_v<T, DType>) {
      field = parse_dtype(name, value.cast<std::string>());
    } else {
      field = value.cast<T>();
    }
  }

  void done() const {
    if (used != given.size()) throw py::type_error("unknown keyword argument of a raw launcher");
  }
};
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
py::dict run(Params& p, const Shape& shape, Op op, const PlanOverrides& overrides, Launcher launcher) {
  const Plan plan = make_plan(op, shape, device_here(), overrides);
  const Scratch scratch(plan.workspace_bytes);
  p.workspace = scratch.pointer;
  check(launcher(p, plan, nullptr), name_of(op));
  check(cudaDeviceSynchronize(), name_of(op));
  return as_dict(plan);
}

template <typename Params>
void read_statistics(const Fields& fields, Params& p) {
  FIELD(logits), FIELD(logits_dtype), FIELD(n), FIELD(vocab), FIELD(logits_stride), FIELD(temperature);
}

template <typename Params>
Shape shape_of(const Params& p) {
  Shape shape{p.n, p.vocab, 1, 0, p.logits_dtype, p.logits_dtype};
  shape.logits_aligned = rows_aligned(p.logits, p.logits_stride, p.logits_dtype);
  if constexpr (requires { p.dim; }) {
    shape.dim = p.dim;
    shape.embedding = p.embedding_dtype;
    shape.embedding_aligned = rows_aligned(p.embedding, p.embedding_stride, p.embedding_dtype);
  }
  return shape;
}

PlanOverrides read_overrides(const Fields& fields) {
  PlanOverrides o;
  fields(o.kernel, "kernel");
  fields(o.splits, "splits");
  fields(o.block_m, "block_m");
  fields(o.block_n, "block_n");
  fields(o.block_k, "block_k");
  fields(o.stages, "stages");
  fields(o.cluster_m, "cluster_m");
  fields(o.cluster_n, "cluster_n");
  return o;
}

py::dict run_vocab_pass(bool draw, const py::kwargs& kwargs) {
  SampleTokensParams p{};
  const Fields fields{kwargs};
  read_statistics(fields, p);
  FIELD(logsumexp), FIELD(entropy), FIELD(tempered_entropy), FIELD(argmax);
  const PlanOverrides overrides = read_overrides(fields);
  if (draw) {
    FIELD(keys), FIELD(top_p), FIELD(top_k), FIELD(forbidden), FIELD(error_flag);
    FIELD(token), FIELD(probability), FIELD(margin), FIELD(filtered_entropy);
  }
  fields.done();
  if (draw) return run(p, shape_of(p), Op::kSampleTokens, overrides, sample_tokens);
  return run(p, shape_of(p), Op::kLogitStatistics, overrides,
             [](const auto& q, const Plan& plan, cudaStream_t s) { return logit_statistics(q, plan, s); });
}

py::dict run_gumbel_perturb(const py::kwargs& kwargs) {
  GumbelPerturbParams p{};
  const Fields fields{kwargs};
  FIELD(logits), FIELD(logits_dtype), FIELD(n), FIELD(vocab), FIELD(logits_stride);
  FIELD(keys), FIELD(scale), FIELD(output), FIELD(output_stride);
  fields.done();
  return run(p, shape_of(p), Op::kGumbelPerturb, {}, gumbel_perturb);
}

py::dict run_statistics_backward(const py::kwargs& kwargs) {
  LogitStatisticsBackwardParams p{};
  const Fields fields{kwargs};
  read_statistics(fields, p);
  FIELD(grad_logsumexp), FIELD(grad_entropy), FIELD(grad_tempered_entropy), FIELD(logsumexp);
  FIELD(unit_logsumexp), FIELD(entropy), FIELD(tempered_entropy), FIELD(gradient);
  fields.done();
  return run(p, shape_of(p), Op::kLogitStatisticsBackward, {}, logit_statistics_backward);
}

template <typename Params>
void read_embedding(const Fields& fields, Params& p) {
  FIELD(embedding), FIELD(embedding_dtype), FIELD(dim), FIELD(embedding_stride), FIELD(logsumexp);
  FIELD(rows), FIELD(soft), FIELD(soft_stride);
}

py::dict run_relaxed_embedding(const py::kwargs& kwargs) {
  RelaxedEmbeddingParams p{};
  const Fields fields{kwargs};
  read_statistics(fields, p);
  read_embedding(fields, p);
  FIELD(hard_tokens), FIELD(weight), FIELD(num_output_rows), FIELD(output), FIELD(output_stride);
  const PlanOverrides overrides = read_overrides(fields);
  fields.done();
  return run(p, shape_of(p), Op::kRelaxedEmbedding, overrides, relaxed_embedding);
}

py::dict run_logit_update(Op op, UpdateRule rule, const py::kwargs& kwargs) {
  LogitUpdateParams p{};
  p.rule = rule;
  const Fields fields{kwargs};
  read_statistics(fields, p);
  read_embedding(fields, p);
  FIELD(grad), FIELD(num_grad_rows), FIELD(grad_stride), FIELD(gradient), FIELD(gradient_stride);
  FIELD(exp_avg), FIELD(exp_avg_sq), FIELD(exp_avg_stride), FIELD(exp_avg_sq_stride);
  FIELD(lr), FIELD(beta1), FIELD(beta2), FIELD(eps), FIELD(step), FIELD(last);
  const PlanOverrides overrides = read_overrides(fields);
  fields.done();
  return run(p, shape_of(p), op, overrides, logit_update);
}

py::dict run_commit(const py::kwargs& kwargs) {
  CommitParams p{};
  const Fields fields{kwargs};
  FIELD(tokens), FIELD(trajectories), FIELD(length), FIELD(tokens_stride), FIELD(committed),
      FIELD(candidates);
  FIELD(confidence), FIELD(positions), FIELD(n), FIELD(splits), FIELD(counts), FIELD(keys);
  FIELD(has_eos), FIELD(eos_token_id), FIELD(alg_temp);
  fields.done();
  return run(p, {p.n, 1, 1, p.trajectories, DType::kFloat32, DType::kFloat32}, Op::kCommit, {}, commit);
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
  m.def("device_count", [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
  });
  m.def("device", [] {
    const Device device = device_here();
    return py::dict(py::arg("arch") = device.arch, py::arg("num_sms") = device.num_sms);
  });
}
#endif

}  // namespace
}  // namespace entrgi

PYBIND11_MODULE(_bindings, m) {
  using namespace entrgi;
  m.doc() = "Launch plans, floors and raw launchers of the entrgi kernels.";
  m.def(
      "plan",
      [](const std::string& op, int64_t n, int64_t vocab, int64_t dim, const std::string& logits_dtype,
         const std::string& embedding_dtype, int arch, int num_sms, int64_t splits, int64_t trajectories) {
        PlanOverrides overrides;
        overrides.splits = splits;
        return as_dict(make_plan(parse_op(op),
                                 make_shape(n, vocab, dim, logits_dtype, embedding_dtype, trajectories),
                                 {arch, num_sms}, overrides));
      },
      "How an operator is launched for a shape: kernel, tile (m, n, k), stages, threads, splits, grid, "
      "shared_bytes, workspace_bytes. splits > 0 asks for that many parts of the vocabulary.",
      py::arg("op"), py::arg("n"), py::arg("vocab"), py::arg("dim") = 1, py::arg("logits_dtype") = "bfloat16",
      py::arg("embedding_dtype") = "bfloat16", py::kw_only(), py::arg("arch") = 90, py::arg("num_sms") = 132,
      py::arg("splits") = 0, py::arg("trajectories") = 1);
  m.def(
      "floor",
      [](const std::string& op, int64_t n, int64_t vocab, int64_t dim, const std::string& logits_dtype,
         const std::string& embedding_dtype, int64_t step, bool last, int64_t trajectories) {
        const Floor floor = floor_of(
            parse_op(op), make_shape(n, vocab, dim, logits_dtype, embedding_dtype, trajectories), step, last);
        return py::dict(py::arg("bytes") = floor.bytes, py::arg("flops") = floor.flops);
      },
      "The least device-memory traffic (bytes) and matrix arithmetic (flops) of an operator. For adam_step_, "
      "step 1 reads no moments and last writes none.",
      py::arg("op"), py::arg("n"), py::arg("vocab"), py::arg("dim") = 1, py::arg("logits_dtype") = "bfloat16",
      py::arg("embedding_dtype") = "bfloat16", py::kw_only(), py::arg("step") = 2, py::arg("last") = false,
      py::arg("trajectories") = 1);
  m.def("compiled_architectures", &compiled_architectures,
        "Architectures the CUDA kernels were compiled for; empty in a build without CUDA.");
#ifdef ENTRGI_WITH_CUDA
  m.attr("has_cuda") = true;
  py::module_ launch = m.def_submodule("launch",
                                       "Raw launchers: keyword arguments are the fields of kernels.h, "
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
#else
  m.attr("has_cuda") = false;
#endif
}
