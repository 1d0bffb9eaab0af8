// The CUDA implementations: checks, allocation, then a launch of csrc/kernels on torch's current stream.
// Nothing here reads device memory or waits for it, so every operator can be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/kernels.h"
#include "../kernels/plan_forced.h"
#include "checks.h"

namespace entrgi::ops {
namespace {

DType kernel_dtype(const Tensor& t) {
  switch (dtype_of(t)) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;  // float64 was refused by the checks
  }
}

template <class T>
T* pointer_to(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* pointer_to(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

void report(const char* what, cudaError_t error) {
  ENTRGI_CHECK(error == cudaSuccess, what, ": CUDA error ", cudaGetErrorName(error), ", ",
               cudaGetErrorString(error));
}

// The device of a tensor made current, its stream, the plan for a shape (ENTRGI_FORCE_PLAN included) and the
// workspace that the plan asks for.
class Launch {
 public:
  Launch(Op op, const Shape& shape, const Tensor& like) : guard_(like.get_device_index()), op_(op) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    Device device{};
    report(name_of(op), current_device(&device));
    ENTRGI_CHECK(device.arch >= 80, name_of(op), " needs a GPU of compute capability 8.0 or newer, got ",
                 device.arch / 10, ".", device.arch % 10);
    try {
      plan_ = make_forced_plan(op, shape, device);
    } catch (const std::invalid_argument& error) {
      fail(error.what());
    }
    if (plan_.workspace_bytes > 0) {
      workspace_ = empty_vector(like, (plan_.workspace_bytes + 3) / 4, ScalarType::Int);
    }
  }

  template <typename Params, typename Launcher>
  void run(Params params, Launcher launcher) const {
    params.workspace = pointer_to<void>(workspace_);
    report(name_of(op_), launcher(params, plan_, stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Op op_;
  cudaStream_t stream_ = nullptr;
  Plan plan_;
  OptionalTensor workspace_;
};

bool rows_aligned(const Tensor& matrix) {
  return entrgi::rows_aligned(matrix.data_ptr(), matrix.stride(0), kernel_dtype(matrix));
}

Shape shape_of(const Tensor& logits) {
  return {logits.size(0),       logits.size(1),      1, 0, kernel_dtype(logits),
          kernel_dtype(logits), rows_aligned(logits)};
}

Shape shape_of(const Tensor& logits, const Tensor& embedding) {
  return {logits.size(0),       logits.size(1),          embedding.size(1),    0,
          kernel_dtype(logits), kernel_dtype(embedding), rows_aligned(logits), rows_aligned(embedding)};
}

template <typename Params>
void bind_logits(Params& p, const Tensor& logits, double temperature) {
  p.logits = logits.data_ptr();
  p.logits_dtype = kernel_dtype(logits);
  p.n = logits.size(0);
  p.vocab = logits.size(1);
  p.logits_stride = logits.stride(0);
  p.temperature = temperature;
}

template <typename Params>
void bind_statistics(Params& p, const Tensor& logsumexp, const Tensor& entropy,
                     const Tensor& tempered_entropy, const Tensor& argmax) {
  p.logsumexp = pointer_to<float>(logsumexp);
  p.entropy = pointer_to<float>(entropy);
  p.tempered_entropy = pointer_to<float>(tempered_entropy);
  p.argmax = pointer_to<int64_t>(argmax);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_statistics(const Tensor& logits, double temperature) {
  check_logit_statistics(logits, temperature);
  const Launch launch(Op::kLogitStatistics, shape_of(logits), logits);
  auto out = empty_statistics(logits);
  LogitStatisticsParams p{};
  bind_logits(p, logits, temperature);
  std::apply([&](const auto&... tensors) { bind_statistics(p, tensors...); }, out);
  launch.run(p, entrgi::logit_statistics);
  return out;
}

Tensor logit_statistics_backward(OptionalTensor grad_logsumexp, OptionalTensor grad_entropy,
                                 OptionalTensor grad_tempered_entropy, const Tensor& logits,
                                 const Tensor& logsumexp, const Tensor& unit_logsumexp, const Tensor& entropy,
                                 const Tensor& tempered_entropy, double temperature) {
  check_logit_statistics_backward(grad_logsumexp, grad_entropy, grad_tempered_entropy, logits, logsumexp,
                                  unit_logsumexp, entropy, tempered_entropy, temperature);
  const Launch launch(Op::kLogitStatisticsBackward, shape_of(logits), logits);
  grad_logsumexp = dense(grad_logsumexp);
  grad_entropy = dense(grad_entropy);
  grad_tempered_entropy = dense(grad_tempered_entropy);
  const Tensor values[] = {dense(logsumexp), dense(unit_logsumexp), dense(entropy), dense(tempered_entropy)};
  const Tensor out = empty_matrix(logits, logits.size(0), logits.size(1), dtype_of(logits));
  LogitStatisticsBackwardParams p{};
  bind_logits(p, logits, temperature);
  p.grad_logsumexp = pointer_to<float>(grad_logsumexp);
  p.grad_entropy = pointer_to<float>(grad_entropy);
  p.grad_tempered_entropy = pointer_to<float>(grad_tempered_entropy);
  p.logsumexp = pointer_to<float>(values[0]);
  p.unit_logsumexp = pointer_to<float>(values[1]);
  p.entropy = pointer_to<float>(values[2]);
  p.tempered_entropy = pointer_to<float>(values[3]);
  p.gradient = out.data_ptr();
  launch.run(p, entrgi::logit_statistics_backward);
  return out;
}

// Bad rows and rows with nothing to draw raise a bit in error_flag: the caller reads it where it
// synchronises.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const Tensor& keys, double temperature, double top_p, std::optional<int64_t> top_k,
    OptionalTensor forbidden, OptionalTensor error_flag) {
  check_sample_tokens(logits, keys, temperature, top_p, top_k, forbidden, error_flag);
  if (error_flag) count_as_written(*error_flag);
  const Launch launch(Op::kSampleTokens, shape_of(logits), logits);
  const Tensor dense_keys = dense(keys);
  forbidden = dense(forbidden);
  auto out = empty_sample(logits);
  const auto& [logsumexp, entropy, tempered_entropy, argmax, token, probability, margin, filtered_entropy] =
      out;
  SampleTokensParams p{};
  bind_logits(p, logits, temperature);
  bind_statistics(p, logsumexp, entropy, tempered_entropy, argmax);
  p.keys = pointer_to<int64_t>(dense_keys);
  p.top_p = top_p;
  p.top_k = top_k.value_or(0);
  if (forbidden && dtype_of(*forbidden) == ScalarType::Int) {
    p.forbidden_ids = pointer_to<int32_t>(forbidden);
    p.num_forbidden = forbidden->size(0);
  } else {
    p.forbidden = pointer_to<bool>(forbidden);
  }
  p.error_flag = pointer_to<int32_t>(error_flag);
  p.token = pointer_to<int64_t>(token);
  p.probability = pointer_to<float>(probability);
  p.margin = pointer_to<float>(margin);
  p.filtered_entropy = pointer_to<float>(filtered_entropy);
  launch.run(p, entrgi::sample_tokens);
  return out;
}

Tensor gumbel_perturb(const Tensor& logits, const Tensor& keys, double scale) {
  check_gumbel_perturb(logits, keys, scale);
  const Launch launch(Op::kGumbelPerturb, shape_of(logits), logits);
  const Tensor dense_keys = dense(keys);
  const Tensor out = empty_accumulator_rows(logits);
  GumbelPerturbParams p{};
  p.logits = logits.data_ptr();
  p.logits_dtype = kernel_dtype(logits);
  p.n = logits.size(0);
  p.vocab = logits.size(1);
  p.logits_stride = logits.stride(0);
  p.keys = pointer_to<int64_t>(dense_keys);
  p.scale = scale;
  p.output = pointer_to<float>(out);
  p.output_stride = out.stride(0);
  launch.run(p, entrgi::gumbel_perturb);
  return out;
}

// torch's matrix product on memory that is not a tensor's, on its current stream, which is the launch's. The
// CUDA kernel is called directly, below autograd and autocast: neither may change what happens inside an
// operator.
void torch_gemm(const Fp32Product& p, cudaStream_t) {
  int device = 0;
  report("gemm", cudaGetDevice(&device));
  const auto view = [&](const float* data, int64_t rows, int64_t columns, int64_t row_stride,
                        int64_t column_stride) {
    return torch::stable::from_blob(const_cast<float*>(data), {rows, columns}, {row_stride, column_stride},
                                    {torch::headeronly::DeviceType::CUDA, static_cast<int8_t>(device)},
                                    ScalarType::Float);
  };
  const Tensor a = view(p.a, p.m, p.k, p.a_stride, 1), c = view(p.c, p.m, p.n, p.c_stride, 1);
  const Tensor b = p.b_transposed ? view(p.b, p.k, p.n, 1, p.b_stride) : view(p.b, p.k, p.n, p.b_stride, 1);
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

template <typename Params>
void bind_embedding(Params& p, const Tensor& embedding, const Tensor& logsumexp, const Tensor& soft,
                    const OptionalTensor& rows) {
  p.embedding = embedding.data_ptr();
  p.embedding_dtype = kernel_dtype(embedding);
  p.dim = embedding.size(1);
  p.embedding_stride = embedding.stride(0);
  p.logsumexp = pointer_to<float>(logsumexp);
  p.soft = pointer_to<float>(soft);
  p.soft_stride = soft.stride(0);
  p.rows = pointer_to<int64_t>(rows);
}

void run_relaxed_embedding(const Tensor& output, const Tensor& soft, const Tensor& logits,
                           const Tensor& logsumexp, const Tensor& embedding,
                           const OptionalTensor& hard_tokens, const OptionalTensor& weight,
                           const OptionalTensor& rows, double temperature) {
  const Launch launch(Op::kRelaxedEmbedding, shape_of(logits, embedding), logits);
  const Tensor lse = dense(logsumexp);
  const OptionalTensor hard = dense(hard_tokens), w = dense(weight), row_index = dense(rows);
  RelaxedEmbeddingParams p{};
  bind_logits(p, logits, temperature);
  bind_embedding(p, embedding, lse, soft, row_index);
  p.hard_tokens = pointer_to<int64_t>(hard);
  p.weight = pointer_to<float>(w);
  p.num_output_rows = output.size(0);
  p.output = output.data_ptr();
  p.output_stride = output.stride(0);
  launch.run(p, with_torch_gemm(entrgi::relaxed_embedding));
}

std::tuple<Tensor, Tensor> relaxed_embedding(const Tensor& logits, const Tensor& logsumexp,
                                             const Tensor& embedding, OptionalTensor hard_tokens,
                                             OptionalTensor weight, double temperature) {
  check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature);
  const int64_t n = logits.size(0), d = embedding.size(1);
  const Tensor output = empty_matrix(logits, n, d, dtype_of(embedding));
  const Tensor soft = empty_matrix(logits, n, d, ScalarType::Float);
  run_relaxed_embedding(output, soft, logits, logsumexp, embedding, hard_tokens, weight, std::nullopt,
                        temperature);
  return {output, soft};
}

void relaxed_embedding_(const Tensor& output, const Tensor& soft, const Tensor& logits,
                        const Tensor& logsumexp, const Tensor& embedding, OptionalTensor hard_tokens,
                        OptionalTensor weight, OptionalTensor rows, double temperature) {
  check_relaxed_embedding_(output, soft, logits, logsumexp, embedding, hard_tokens, weight, rows,
                           temperature);
  count_as_written(output, soft);
  run_relaxed_embedding(output, soft, logits, logsumexp, embedding, hard_tokens, weight, rows, temperature);
}

// `configure` fills in what the update rule needs.
template <typename Configure>
void run_logit_update(Op op, UpdateRule rule, const Tensor& logits, const Tensor& grad,
                      const Tensor& logsumexp, const Tensor& embedding, const Tensor& soft,
                      const OptionalTensor& rows, double temperature, Configure configure) {
  const Tensor lse = dense(logsumexp);
  const OptionalTensor row_index = dense(rows);
  LogitUpdateParams p{};
  p.rule = rule;
  bind_logits(p, logits, temperature);
  bind_embedding(p, embedding, lse, soft, row_index);
  p.grad = grad.data_ptr();
  p.num_grad_rows = grad.size(0);
  p.grad_stride = grad.stride(0);
  configure(p);
  Shape shape = shape_of(logits, embedding);
  shape.logits_aligned = entrgi::rows_aligned(p);
  const Launch launch(op, shape, logits);
  launch.run(p, with_torch_gemm(entrgi::logit_update));
}

Tensor logit_gradient(const Tensor& grad, const Tensor& logits, const Tensor& logsumexp,
                      const Tensor& embedding, const Tensor& soft, OptionalTensor rows, double temperature) {
  check_logit_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature);
  const Tensor out = empty_accumulator_rows(logits);
  run_logit_update(Op::kLogitGradient, UpdateRule::kGradient, logits, grad, logsumexp, embedding, soft, rows,
                   temperature, [&](LogitUpdateParams& p) {
                     p.gradient = pointer_to<float>(out);
                     p.gradient_stride = out.stride(0);
                   });
  return out;
}

void adam_step_(const Tensor& logits, OptionalTensor exp_avg, OptionalTensor exp_avg_sq, const Tensor& grad,
                const Tensor& logsumexp, const Tensor& embedding, const Tensor& soft, OptionalTensor rows,
                double temperature, double lr, double beta1, double beta2, double eps, int64_t step,
                bool last) {
  check_adam_step_(logits, exp_avg, exp_avg_sq, grad, logsumexp, embedding, soft, rows, temperature, lr,
                   beta1, beta2, eps, step, last);
  count_as_written(logits, exp_avg, exp_avg_sq);
  run_logit_update(Op::kAdamStep, UpdateRule::kAdam, logits, grad, logsumexp, embedding, soft, rows,
                   temperature, [&](LogitUpdateParams& p) {
                     p.exp_avg = pointer_to<float>(exp_avg);
                     p.exp_avg_sq = pointer_to<float>(exp_avg_sq);
                     if (exp_avg) p.exp_avg_stride = exp_avg->stride(0);
                     if (exp_avg_sq) p.exp_avg_sq_stride = exp_avg_sq->stride(0);
                     p.lr = lr;
                     p.beta1 = beta1;
                     p.beta2 = beta2;
                     p.eps = eps;
                     p.step = step;
                     p.last = last;
                   });
}

void sgd_step_(const Tensor& logits, const Tensor& grad, const Tensor& logsumexp, const Tensor& embedding,
               const Tensor& soft, OptionalTensor rows, double temperature, double lr) {
  check_sgd_step_(logits, grad, logsumexp, embedding, soft, rows, temperature, lr);
  count_as_written(logits);
  run_logit_update(Op::kSgdStep, UpdateRule::kSgd, logits, grad, logsumexp, embedding, soft, rows,
                   temperature, [&](LogitUpdateParams& p) { p.lr = lr; });
}

void commit_(const Tensor& tokens, const Tensor& committed, const Tensor& candidates,
             const Tensor& confidence, const Tensor& positions, const Tensor& splits, const Tensor& counts,
             OptionalTensor keys, std::optional<int64_t> eos_token_id, double alg_temp) {
  check_commit_(tokens, committed, candidates, confidence, positions, splits, counts, keys, eos_token_id,
                alg_temp);
  count_as_written(tokens, committed);
  const int64_t n = candidates.size(0), trajectories = tokens.size(0);
  const Launch launch(Op::kCommit, {n, 1, 1, trajectories, DType::kFloat32, DType::kFloat32}, tokens);
  const Tensor inputs[] = {dense(candidates), dense(confidence), dense(positions), dense(splits),
                           dense(counts)};
  keys = dense(keys);
  CommitParams p{};
  p.tokens = pointer_to<int64_t>(tokens);
  p.trajectories = trajectories;
  p.length = tokens.size(1);
  p.tokens_stride = tokens.stride(0);
  p.committed = pointer_to<bool>(committed);
  p.candidates = pointer_to<int64_t>(inputs[0]);
  p.confidence = pointer_to<float>(inputs[1]);
  p.positions = pointer_to<int64_t>(inputs[2]);
  p.n = n;
  p.splits = pointer_to<int64_t>(inputs[3]);
  p.counts = pointer_to<int64_t>(inputs[4]);
  p.keys = pointer_to<int64_t>(keys);
  p.has_eos = eos_token_id.has_value();
  p.eos_token_id = eos_token_id.value_or(0);
  p.alg_temp = committed_temperature(alg_temp);
  launch.run(p, entrgi::commit);
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
}  // namespace entrgi::ops

// They have no tensor whose device could choose an implementation.
STABLE_TORCH_LIBRARY_IMPL(entrgi, CompositeExplicitAutograd, m) {
  m.impl("warm_up", TORCH_BOX(&entrgi::ops::warm_up));
  m.impl("cuda_versions", TORCH_BOX(&entrgi::ops::cuda_versions));
}

STABLE_TORCH_LIBRARY_IMPL(entrgi, CUDA, m) {
  using namespace entrgi::ops;
  m.impl("logit_statistics", TORCH_BOX(&logit_statistics));
  m.impl("logit_statistics_backward", TORCH_BOX(&logit_statistics_backward));
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
  m.impl("gumbel_perturb", TORCH_BOX(&gumbel_perturb));
  m.impl("relaxed_embedding", TORCH_BOX(&relaxed_embedding));
  m.impl("relaxed_embedding_", TORCH_BOX(&relaxed_embedding_));
  m.impl("logit_gradient", TORCH_BOX(&logit_gradient));
  m.impl("adam_step_", TORCH_BOX(&adam_step_));
  m.impl("sgd_step_", TORCH_BOX(&sgd_step_));
  m.impl("commit_", TORCH_BOX(&commit_));
}
