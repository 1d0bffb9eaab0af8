// The operators, for every device: arguments are checked, outputs allocated and parameters filled in; the
// rest is the backend's. Compiled once into each library, where ENTRGI_DISPATCH_KEY is CPU or CUDA.
//
// Nothing here reads the memory of a tensor or waits for a device, so that every operator can be captured in
// a CUDA graph.
#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "checks.h"

namespace entrgi::ops {
namespace {

DType kernel_dtype(const Tensor& t) {
  switch (dtype_of(t)) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return DType::kFloat32;
  }
}

// Checked floating matrices only. A tensor of one row may have any stride.
Matrix matrix_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), kernel_dtype(t)};
}
Matrix matrix_of(const OptionalTensor& t) {
  return t ? matrix_of(*t) : Matrix{};
}

template <class T>
T* pointer_to(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* pointer_to(const OptionalTensor& t) {
  return t ? pointer_to<T>(*t) : nullptr;
}

void bind_logits(LogitsParams& p, const Tensor& logits) {
  p.logits = matrix_of(logits);
  p.n = logits.size(0);
  p.vocab = logits.size(1);
}

void bind_statistics(LogitStatisticsParams& p, const Tensor& logits, double temperature,
                     const Tensor& logsumexp, const Tensor& entropy, const Tensor& tempered_entropy,
                     const Tensor& argmax) {
  bind_logits(p, logits);
  p.temperature = temperature;
  p.logsumexp = logsumexp.data_ptr();
  p.entropy = entropy.data_ptr();
  p.tempered_entropy = tempered_entropy.data_ptr();
  p.argmax = pointer_to<int64_t>(argmax);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_statistics(const Tensor& logits, double temperature) {
  check_logit_statistics(logits, temperature);
  auto out = empty_statistics(logits);
  const auto& [logsumexp, entropy, tempered_entropy, argmax] = out;
  LogitStatisticsParams p{};
  bind_statistics(p, logits, temperature, logsumexp, entropy, tempered_entropy, argmax);
  backend::run(p, logits);
  return out;
}

Tensor logit_statistics_backward(OptionalTensor grad_logsumexp, OptionalTensor grad_entropy,
                                 OptionalTensor grad_tempered_entropy, const Tensor& logits,
                                 const Tensor& logsumexp, const Tensor& unit_logsumexp, const Tensor& entropy,
                                 const Tensor& tempered_entropy, double temperature) {
  check_logit_statistics_backward(grad_logsumexp, grad_entropy, grad_tempered_entropy, logits, logsumexp,
                                  unit_logsumexp, entropy, tempered_entropy, temperature);
  const OptionalTensor grads[] = {dense(grad_logsumexp), dense(grad_entropy), dense(grad_tempered_entropy)};
  const Tensor values[] = {dense(logsumexp), dense(unit_logsumexp), dense(entropy), dense(tempered_entropy)};
  const Tensor out = empty_matrix(logits, logits.size(0), logits.size(1), dtype_of(logits));
  LogitStatisticsBackwardParams p{};
  bind_logits(p, logits);
  p.grad_logsumexp = pointer_to<void>(grads[0]);
  p.grad_entropy = pointer_to<void>(grads[1]);
  p.grad_tempered_entropy = pointer_to<void>(grads[2]);
  p.logsumexp = values[0].data_ptr();
  p.unit_logsumexp = values[1].data_ptr();
  p.entropy = values[2].data_ptr();
  p.tempered_entropy = values[3].data_ptr();
  p.temperature = temperature;
  p.gradient = out.data_ptr();
  backend::run(p, logits);
  return out;
}

// Bad rows and rows with nothing to draw raise on the CPU. A CUDA kernel cannot: it sets a bit of error_flag,
// which the caller reads where it synchronises.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const Tensor& keys, double temperature, double top_p, std::optional<int64_t> top_k,
    OptionalTensor forbidden, OptionalTensor error_flag) {
  check_sample_tokens(logits, keys, temperature, top_p, top_k, forbidden, error_flag);
  if (error_flag) count_as_written(*error_flag);
  const Tensor dense_keys = dense(keys);
  const OptionalTensor dense_forbidden = dense(forbidden);
  auto out = empty_sample(logits);
  const auto& [logsumexp, entropy, tempered_entropy, argmax, token, probability, margin, filtered_entropy] =
      out;
  SampleTokensParams p{};
  bind_statistics(p, logits, temperature, logsumexp, entropy, tempered_entropy, argmax);
  p.keys = pointer_to<int64_t>(dense_keys);
  p.top_p = top_p;
  p.top_k = top_k.value_or(0);
  if (forbidden && dtype_of(*forbidden) == ScalarType::Int) {
    p.forbidden_ids = pointer_to<int32_t>(dense_forbidden);
    p.num_forbidden = forbidden->size(0);
  } else {
    p.forbidden = pointer_to<bool>(dense_forbidden);
  }
  p.error_flag = pointer_to<int32_t>(error_flag);
  p.token = pointer_to<int64_t>(token);
  p.probability = probability.data_ptr();
  p.margin = margin.data_ptr();
  p.filtered_entropy = filtered_entropy.data_ptr();
  backend::run(p, logits);
  return out;
}

Tensor gumbel_perturb(const Tensor& logits, const Tensor& keys, double scale) {
  check_gumbel_perturb(logits, keys, scale);
  const Tensor dense_keys = dense(keys);
  const Tensor out = empty_accumulator_rows(logits);
  GumbelPerturbParams p{};
  bind_logits(p, logits);
  p.keys = pointer_to<int64_t>(dense_keys);
  p.scale = scale;
  p.output = matrix_of(out);
  backend::run(p, logits);
  return out;
}

// A relaxation's parameters, and the dense copies that some of them may point to.
template <typename Params>
struct Relaxation {
  Tensor logsumexp;
  OptionalTensor row_index;
  Params p{};

  Relaxation(const Tensor& logits, const Tensor& logsumexp_, const Tensor& embedding, const Tensor& soft,
             const OptionalTensor& row_index_, double temperature)
      : logsumexp(dense(logsumexp_)), row_index(dense(row_index_)) {
    bind_logits(p, logits);
    p.logsumexp = logsumexp.data_ptr();
    p.embedding = matrix_of(embedding);
    p.dim = embedding.size(1);
    p.temperature = temperature;
    p.soft = matrix_of(soft);
    p.row_index = pointer_to<int64_t>(row_index);
  }
};

void embed(const Tensor& output, const Tensor& soft, const Tensor& logits, const Tensor& logsumexp,
           const Tensor& embedding, const OptionalTensor& hard_tokens, const OptionalTensor& weight,
           const OptionalTensor& row_index, double temperature) {
  Relaxation<RelaxedEmbeddingParams> relaxation(logits, logsumexp, embedding, soft, row_index, temperature);
  const OptionalTensor dense_tokens = dense(hard_tokens), dense_weight = dense(weight);
  RelaxedEmbeddingParams& p = relaxation.p;
  p.hard_tokens = pointer_to<int64_t>(dense_tokens);
  p.weight = pointer_to<void>(dense_weight);
  p.output = matrix_of(output);
  p.target_rows = output.size(0);
  backend::run(p, logits);
}

std::tuple<Tensor, Tensor> relaxed_embedding(const Tensor& logits, const Tensor& logsumexp,
                                             const Tensor& embedding, OptionalTensor hard_tokens,
                                             OptionalTensor weight, double temperature) {
  check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature);
  const int64_t n = logits.size(0), d = embedding.size(1);
  const Tensor output = empty_matrix(logits, n, d, dtype_of(embedding));
  const Tensor soft = empty_matrix(logits, n, d, accumulator_dtype(logits));
  embed(output, soft, logits, logsumexp, embedding, hard_tokens, weight, std::nullopt, temperature);
  return {output, soft};
}

void relaxed_embedding_(const Tensor& output, const Tensor& soft, const Tensor& logits,
                        const Tensor& logsumexp, const Tensor& embedding, OptionalTensor hard_tokens,
                        OptionalTensor weight, OptionalTensor row_index, double temperature) {
  check_relaxed_embedding_(output, soft, logits, logsumexp, embedding, hard_tokens, weight, row_index,
                           temperature);
  count_as_written(output, soft);
  embed(output, soft, logits, logsumexp, embedding, hard_tokens, weight, row_index, temperature);
}

using Update = Relaxation<LogitUpdateParams>;

void update(Update& update, UpdateRule rule, const Tensor& grad, const Tensor& logits) {
  update.p.rule = rule;
  update.p.grad = matrix_of(grad);
  update.p.target_rows = grad.size(0);
  backend::run(update.p, logits);
}

Tensor logit_gradient(const Tensor& grad, const Tensor& logits, const Tensor& logsumexp,
                      const Tensor& embedding, const Tensor& soft, OptionalTensor row_index,
                      double temperature) {
  check_logit_gradient(grad, logits, logsumexp, embedding, soft, row_index, temperature);
  const Tensor out = empty_accumulator_rows(logits);
  Update gradient(logits, logsumexp, embedding, soft, row_index, temperature);
  gradient.p.gradient = matrix_of(out);
  update(gradient, UpdateRule::kGradient, grad, logits);
  return out;
}

void adam_step_(const Tensor& logits, OptionalTensor exp_avg, OptionalTensor exp_avg_sq, const Tensor& grad,
                const Tensor& logsumexp, const Tensor& embedding, const Tensor& soft,
                OptionalTensor row_index, double temperature, double lr, double beta1, double beta2,
                double eps, int64_t step, bool last) {
  check_adam_step_(logits, exp_avg, exp_avg_sq, grad, logsumexp, embedding, soft, row_index, temperature, lr,
                   beta1, beta2, eps, step, last);
  count_as_written(logits, exp_avg, exp_avg_sq);
  Update adam(logits, logsumexp, embedding, soft, row_index, temperature);
  adam.p.exp_avg = matrix_of(exp_avg);
  adam.p.exp_avg_sq = matrix_of(exp_avg_sq);
  adam.p.lr = lr;
  adam.p.beta1 = beta1;
  adam.p.beta2 = beta2;
  adam.p.eps = eps;
  adam.p.step = step;
  adam.p.last = last;
  update(adam, UpdateRule::kAdam, grad, logits);
}

void sgd_step_(const Tensor& logits, const Tensor& grad, const Tensor& logsumexp, const Tensor& embedding,
               const Tensor& soft, OptionalTensor row_index, double temperature, double lr) {
  check_sgd_step_(logits, grad, logsumexp, embedding, soft, row_index, temperature, lr);
  count_as_written(logits);
  Update sgd(logits, logsumexp, embedding, soft, row_index, temperature);
  sgd.p.lr = lr;
  update(sgd, UpdateRule::kSgd, grad, logits);
}

void commit_(const Tensor& tokens, const Tensor& committed, const Tensor& candidates,
             const Tensor& confidence, const Tensor& positions, const Tensor& splits, const Tensor& counts,
             OptionalTensor keys, std::optional<int64_t> eos_token_id, double alg_temp) {
  check_commit_(tokens, committed, candidates, confidence, positions, splits, counts, keys, eos_token_id,
                alg_temp);
  count_as_written(tokens, committed);
  const Tensor inputs[] = {dense(candidates), dense(confidence), dense(positions), dense(splits),
                           dense(counts)};
  const OptionalTensor dense_keys = dense(keys);
  CommitParams p{};
  p.tokens = pointer_to<int64_t>(tokens);
  p.trajectories = tokens.size(0);
  p.length = tokens.size(1);
  p.tokens_stride = tokens.stride(0);
  p.committed = pointer_to<bool>(committed);
  p.candidates = pointer_to<int64_t>(inputs[0]);
  p.confidence = inputs[1].data_ptr();
  p.confidence_dtype = kernel_dtype(confidence);
  p.positions = pointer_to<int64_t>(inputs[2]);
  p.n = candidates.size(0);
  p.splits = pointer_to<int64_t>(inputs[3]);
  p.counts = pointer_to<int64_t>(inputs[4]);
  p.keys = pointer_to<int64_t>(dense_keys);
  p.has_eos = eos_token_id.has_value();
  p.eos_token_id = eos_token_id.value_or(0);
  p.alg_temp = committed_temperature(alg_temp);
  backend::run(p, tokens);
}

}  // namespace
}  // namespace entrgi::ops

STABLE_TORCH_LIBRARY_IMPL(entrgi, ENTRGI_DISPATCH_KEY, m) {
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
