// Python bindings of the kernel layer, for what is not an operator: launch plans, floors, the device at hand,
// the architectures compiled in and, in builds for tests (ENTRGI_LAUNCHERS), the raw launchers. Imports
// neither torch nor numpy. entrgi_ext/plans.py is their documented face.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "fields.h"
#include "kernels/plan_forced.h"
#ifdef ENTRGI_WITH_CUDA
#include <cuda_runtime_api.h>

#include "kernels/kernels.h"
#endif
#ifdef ENTRGI_WITH_LAUNCHERS
#include "launchers.h"
#endif

#ifndef ENTRGI_CUDA_ARCHITECTURES
#define ENTRGI_CUDA_ARCHITECTURES ""
#endif

namespace entrgi {
namespace {

// Far above any model and device. Floors and requests, whatever the padding of the tiles, fit 64 bits.
constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxVocab = int64_t{1} << 31, kMaxDim = 1 << 20;
constexpr int64_t kMaxProducts = int64_t{1} << 52, kMaxSms = 4096, kMaxStep = int64_t{1} << 31;

int64_t within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (least <= value && value <= most) return value;
  const bool small = value < least;
  throw py::value_error(std::string(name) + " must be " + (small ? ">= " : "<= ") +
                        std::to_string(small ? least : most) + ", got " + std::to_string(value));
}

Shape read_shape(const Fields& fields, py::handle n, py::handle vocab, py::handle dim,
                 const std::string& logits_dtype, const std::string& embedding_dtype) {
  Shape shape{within("n", read<int64_t>("n", n), 0, kMaxRows),
              within("vocab", read<int64_t>("vocab", vocab), 1, kMaxVocab),
              within("dim", read<int64_t>("dim", dim), 1, kMaxDim),
              1,
              parse_dtype("logits_dtype", logits_dtype),
              parse_dtype("embedding_dtype", embedding_dtype)};
  fields(shape.trajectories, "trajectories");
  fields(shape.logits_aligned, "logits_aligned");
  fields(shape.embedding_aligned, "embedding_aligned");
  within("trajectories", shape.trajectories, 0, kMaxRows);
  if (shape.n * shape.vocab > kMaxProducts / shape.dim) {
    throw py::value_error("shape must have n * vocab * dim <= " + std::to_string(kMaxProducts) + ", got " +
                          std::to_string(shape.n) + " * " + std::to_string(shape.vocab) + " * " +
                          std::to_string(shape.dim));
  }
  return shape;
}

Plan read_plan(const Fields& fields, Op op, const Shape& shape) {
  int arch = 90, num_sms = 132;
  fields(arch, "arch");
  fields(num_sms, "num_sms");
  within("arch", arch, 80, 100);
  within("num_sms", num_sms, 1, kMaxSms);
  Device device = typical_device(arch, num_sms);
  const auto clusters = [&](int& count, const char* name) {
    fields(count, name);
    within(name, count, 0, kMaxSms);
  };
  clusters(device.clusters_of_2, "clusters_of_2");
  clusters(device.clusters_of_4, "clusters_of_4");
  clusters(device.clusters_of_8, "clusters_of_8");
  return make_forced_plan(op, shape, device, read_overrides(fields));
}

struct AdamStep {
  int64_t step = 2;
  bool last = false;

  explicit AdamStep(const Fields& fields) {
    fields(step, "step");
    fields(last, "last");
    within("step", step, 1, kMaxStep);
  }
};

py::dict plan(const Fields& fields, Op op, const Shape& shape) {
  return as_dict(read_plan(fields, op, shape));
}

py::dict floor(const Fields& fields, Op op, const Shape& shape) {
  const AdamStep adam(fields);
  const Floor floor = floor_of(op, shape, adam.step, adam.last);
  return py::dict(py::arg("bytes") = floor.bytes, py::arg("flops") = floor.flops);
}

py::dict requests(const Fields& fields, Op op, const Shape& shape) {
  const AdamStep adam(fields);
  const Plan plan = read_plan(fields, op, shape);
  const Requests r = requests_of(op, shape, plan, adam.step, adam.last);
  return py::dict(py::arg("load_bytes") = r.load_bytes, py::arg("bulk_bytes") = r.bulk_bytes,
                  py::arg("store_bytes") = r.store_bytes, py::arg("flops") = r.flops,
                  py::arg("plan") = as_dict(plan));
}

// {operator: {field: value}}, which entrgi_ext/plans.py has checked.
void force(const py::dict& plans, const std::string& refusal) {
  ForcedPlans forced{{}, refusal};
  for (const auto& [op, given] : plans) {
    const py::kwargs options(py::reinterpret_borrow<py::dict>(given));
    forced.plans[parse<Op>("op", read<std::string>("op", op))] = read_overrides(Fields(options));
  }
  force_plans(std::move(forced));
}

py::dict forced() {
  const ForcedPlans forced = forced_plans();
  if (!forced.refusal.empty()) throw py::value_error(forced.refusal);
  py::dict result;
  for (auto& [op, overrides] : forced.plans) {
    py::dict fields;
    const auto add = [&](const char* name, const auto& value) {
      if (value != std::decay_t<decltype(value)>{}) fields[name] = value;
    };
    visit_fields(add, overrides);
    result[name_of(op)] = fields;
  }
  return result;
}

// The GPU that launches go to, or None.
py::object device() {
#ifdef ENTRGI_WITH_CUDA
  int count = 0;
  Device device{};
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0 && current_device(&device) == cudaSuccess) {
    return py::dict(py::arg("arch") = device.arch, py::arg("num_sms") = device.num_sms,
                    py::arg("clusters_of_2") = device.clusters_of_2,
                    py::arg("clusters_of_4") = device.clusters_of_4,
                    py::arg("clusters_of_8") = device.clusters_of_8);
  }
#endif
  return py::none();
}

void define(py::module_& m, const char* name, py::dict (*function)(const Fields&, Op, const Shape&),
            const char* doc) {
  const auto call = [function](const std::string& op, const py::object& n, const py::object& vocab,
                               const py::object& dim, const std::string& logits_dtype,
                               const std::string& embedding_dtype, const py::kwargs& options) {
    const Fields fields(options);
    const Op parsed = parse<Op>("op", op);
    const Shape shape = read_shape(fields, n, vocab, dim, logits_dtype, embedding_dtype);
    const py::dict result = function(fields, parsed, shape);
    fields.done();
    return result;
  };
  m.def(name, call, doc, py::arg("op"), py::arg("n"), py::arg("vocab"), py::arg("dim") = 1,
        py::arg("logits_dtype") = "bfloat16", py::arg("embedding_dtype") = "bfloat16");
}

std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  std::istringstream list(ENTRGI_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

}  // namespace
}  // namespace entrgi

PYBIND11_MODULE(_bindings, m) {
  using namespace entrgi;
  m.doc() =
      "Launch plans and floors of the entrgi kernels, for tests their raw launchers; entrgi_ext.plans is the "
      "documented face.";
  define(
      m, "plan", &plan,
      "How an operator is launched for a shape: kernel, tile (m, n, k), stages, threads, cluster (m, n), "
      "splits, grid, shared_bytes, workspace_bytes. By keyword: trajectories, logits_aligned, "
      "embedding_aligned, "
      "arch, num_sms, clusters_of_2, clusters_of_4, clusters_of_8, and what replaces the plan's choices: "
      "kernel, splits, block_m, block_n, block_k, stages, cluster_m, cluster_n. What is forced stands below "
      "these.");
  define(m, "floor", &entrgi::floor,
         "The least device-memory traffic (bytes) and matrix arithmetic (flops) of an operator. By keyword: "
         "trajectories, and of adam_step_ step (1 reads no moments) and last (writes none).");
  define(m, "requests", &requests,
         "What the kernels of an operator ask of the memory system under its plan, before any cache: "
         "load_bytes, bulk_bytes (TMA), store_bytes, flops; and that plan. Takes what plan and floor take.");
  m.def("force_plans", &force,
        "Forces {operator: {field: value}} in place of what was forced before, or has every plan refused.",
        py::arg("plans"), py::arg("refusal") = "");
  m.def("forced_plans", &forced, "What is forced, by operator and field; raises the refusal.");
  m.attr("KERNELS") =
      std::vector<std::string>(std::begin(Names<Kernel>::kAll), std::end(Names<Kernel>::kAll));
  m.def("device", &device, "The GPU that launches go to, as plans take it; None without one.");
  m.def("compiled_architectures", &compiled_architectures,
        "Architectures the CUDA kernels were compiled for; empty in a build without CUDA.");
#ifdef ENTRGI_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
#ifdef ENTRGI_WITH_LAUNCHERS
  define_launchers(m);
#endif
}
