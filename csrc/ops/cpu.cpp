// The CPU implementations: checks, allocation, then csrc/cpu with torch's threads and matrix products.
#include "../cpu/cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "checks.h"

// In the libraries of torch where its matrix products are MKL's.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace entrgi::ops {
namespace {

using cpu::DType;
using cpu::Matrix;

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

template <class T>
const T* pointer_to(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// torch's intra-op threads. An exception must not cross the C interface as one: it is carried around it.
cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int64_t count, int64_t cost, const cpu::Range& body) {
    constexpr int64_t kThreadCost = 16384;  // some 10 microseconds: what waking a thread costs
    const int64_t grain = std::max<int64_t>(1, kThreadCost / std::max<int64_t>(1, cost));
    if (count <= grain) {  // one thread's work, without a way through torch
      if (count > 0) body(0, count);
      return;
    }
    std::exception_ptr error;
    std::mutex mutex;
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      try {
        body(begin, end);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  };
  return parallel;
}

Tensor view_of(const Matrix& m, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  const int32_t dtype = m.dtype == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(m.data, 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The order of MKL's sums depends on how many threads it uses, in a parallel region too, since torch turns
// its dynamic choice off. Without MKL the product keeps the threads that it has in torch's own operators.
class OneThread {
 public:
  OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_ = 0;
};

// torch's matrix product on memory that is not a tensor's. The CPU kernel is called directly, below autograd
// and autocast: neither may change what happens inside an operator.
void torch_gemm(const cpu::GemmProblem& p) {
  const OneThread one_thread;
  const Tensor a = view_of(p.a, p.m, p.k, p.a.stride, 1);
  const Tensor b =
      p.b_transposed ? view_of(p.b, p.k, p.n, 1, p.b.stride) : view_of(p.b, p.k, p.n, p.b.stride, 1);
  const Tensor c = view_of(p.c, p.m, p.n, p.c.stride, 1);
  if (p.accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(c.get(), a.get(), b.get()));
  }
}

cpu::Statistics pointers_of(const Tensor& logsumexp, const Tensor& entropy, const Tensor& tempered_entropy,
                            const Tensor& argmax) {
  return {logsumexp.data_ptr(), entropy.data_ptr(), tempered_entropy.data_ptr(),
          static_cast<int64_t*>(argmax.data_ptr())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_statistics(const Tensor& logits, double temperature) {
  check_logit_statistics(logits, temperature);
  auto out = empty_statistics(logits);
  cpu::logit_statistics(matrix_of(logits), logits.size(0), logits.size(1), temperature,
                        std::apply(pointers_of, out), torch_threads());
  return out;
}

Tensor logit_statistics_backward(OptionalTensor grad_logsumexp, OptionalTensor grad_entropy,
                                 OptionalTensor grad_tempered_entropy, const Tensor& logits,
                                 const Tensor& logsumexp, const Tensor& unit_logsumexp, const Tensor& entropy,
                                 const Tensor& tempered_entropy, double temperature) {
  check_logit_statistics_backward(grad_logsumexp, grad_entropy, grad_tempered_entropy, logits, logsumexp,
                                  unit_logsumexp, entropy, tempered_entropy, temperature);
  grad_logsumexp = dense(grad_logsumexp);
  grad_entropy = dense(grad_entropy);
  grad_tempered_entropy = dense(grad_tempered_entropy);
  const Tensor values[] = {dense(logsumexp), dense(unit_logsumexp), dense(entropy), dense(tempered_entropy)};
  const Tensor out = empty_matrix(logits, logits.size(0), logits.size(1), dtype_of(logits));
  cpu::logit_statistics_backward(
      matrix_of(logits), logits.size(0), logits.size(1), temperature,
      {pointer_to<void>(grad_logsumexp), pointer_to<void>(grad_entropy),
       pointer_to<void>(grad_tempered_entropy)},
      {values[0].data_ptr(), values[1].data_ptr(), values[2].data_ptr(), values[3].data_ptr()},
      matrix_of(out), torch_threads());
  return out;
}

// error_flag is for devices that cannot raise: here a bad row raises and the flag is left alone.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits, const Tensor& keys, double temperature, double top_p, std::optional<int64_t> top_k,
    OptionalTensor forbidden, OptionalTensor error_flag) {
  check_sample_tokens(logits, keys, temperature, top_p, top_k, forbidden, error_flag);
  if (error_flag) count_as_written(*error_flag);
  const Tensor dense_keys = dense(keys);
  forbidden = dense(forbidden);
  auto out = empty_sample(logits);
  const auto& [logsumexp, entropy, tempered_entropy, argmax, token, probability, margin, filtered_entropy] =
      out;
  cpu::SampleOptions options;
  options.temperature = temperature;
  options.top_p = top_p;
  options.top_k = top_k.value_or(0);
  if (forbidden && dtype_of(*forbidden) == ScalarType::Int) {
    options.forbidden_ids = pointer_to<int32_t>(forbidden);
    options.num_forbidden = forbidden->size(0);
  } else {
    options.forbidden = pointer_to<uint8_t>(forbidden);
  }
  options.keys = static_cast<const int64_t*>(dense_keys.data_ptr());
  cpu::sample_tokens(matrix_of(logits), logits.size(0), logits.size(1), options,
                     pointers_of(logsumexp, entropy, tempered_entropy, argmax),
                     {static_cast<int64_t*>(token.data_ptr()), probability.data_ptr(), margin.data_ptr(),
                      filtered_entropy.data_ptr()},
                     torch_threads());
  return out;
}

Tensor gumbel_perturb(const Tensor& logits, const Tensor& keys, double scale) {
  check_gumbel_perturb(logits, keys, scale);
  const Tensor dense_keys = dense(keys);
  const Tensor out = empty_accumulator_rows(logits);
  cpu::gumbel_perturb(matrix_of(logits), logits.size(0), logits.size(1),
                      static_cast<const int64_t*>(dense_keys.data_ptr()), scale, matrix_of(out),
                      torch_threads());
  return out;
}

// A Relaxation together with what keeps its dense copies alive.
struct BoundRelaxation {
  Tensor logsumexp;
  OptionalTensor rows;
  cpu::Relaxation relaxation;

  BoundRelaxation(const Tensor& logits, const Tensor& logsumexp_, const Tensor& embedding, const Tensor& soft,
                  const OptionalTensor& rows_, int64_t target_rows, double temperature)
      : logsumexp(dense(logsumexp_)), rows(dense(rows_)) {
    relaxation.logits = matrix_of(logits);
    relaxation.rows = logits.size(0);
    relaxation.vocabulary = logits.size(1);
    relaxation.width = embedding.size(1);
    relaxation.temperature = temperature;
    relaxation.logsumexp = logsumexp.data_ptr();
    relaxation.embedding = matrix_of(embedding);
    relaxation.soft = matrix_of(soft);
    relaxation.row_index = pointer_to<int64_t>(rows);
    relaxation.target_rows = target_rows;
  }
};

void run_relaxed_embedding(const Tensor& output, const Tensor& soft, const Tensor& logits,
                           const Tensor& logsumexp, const Tensor& embedding,
                           const OptionalTensor& hard_tokens, const OptionalTensor& weight,
                           const OptionalTensor& rows, double temperature) {
  const BoundRelaxation bound(logits, logsumexp, embedding, soft, rows, output.size(0), temperature);
  const OptionalTensor hard = dense(hard_tokens), w = dense(weight);
  cpu::relaxed_embedding(bound.relaxation, matrix_of(output), pointer_to<int64_t>(hard), pointer_to<void>(w),
                         torch_threads(), torch_gemm);
}

std::tuple<Tensor, Tensor> relaxed_embedding(const Tensor& logits, const Tensor& logsumexp,
                                             const Tensor& embedding, OptionalTensor hard_tokens,
                                             OptionalTensor weight, double temperature) {
  check_relaxed_embedding(logits, logsumexp, embedding, hard_tokens, weight, temperature);
  const int64_t n = logits.size(0), d = embedding.size(1);
  const Tensor output = empty_matrix(logits, n, d, dtype_of(embedding));
  const Tensor soft = empty_matrix(logits, n, d, accumulator_dtype(logits));
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

Tensor logit_gradient(const Tensor& grad, const Tensor& logits, const Tensor& logsumexp,
                      const Tensor& embedding, const Tensor& soft, OptionalTensor rows, double temperature) {
  check_logit_gradient(grad, logits, logsumexp, embedding, soft, rows, temperature);
  const Tensor out = empty_accumulator_rows(logits);
  const BoundRelaxation bound(logits, logsumexp, embedding, soft, rows, grad.size(0), temperature);
  cpu::logit_gradient(bound.relaxation, matrix_of(grad), matrix_of(out), torch_threads(), torch_gemm);
  return out;
}

void adam_step_(const Tensor& logits, OptionalTensor exp_avg, OptionalTensor exp_avg_sq, const Tensor& grad,
                const Tensor& logsumexp, const Tensor& embedding, const Tensor& soft, OptionalTensor rows,
                double temperature, double lr, double beta1, double beta2, double eps, int64_t step,
                bool last) {
  check_adam_step_(logits, exp_avg, exp_avg_sq, grad, logsumexp, embedding, soft, rows, temperature, lr,
                   beta1, beta2, eps, step, last);
  count_as_written(logits, exp_avg, exp_avg_sq);
  const BoundRelaxation bound(logits, logsumexp, embedding, soft, rows, grad.size(0), temperature);
  cpu::Adam adam;
  if (exp_avg) adam.exp_avg = matrix_of(*exp_avg);
  if (exp_avg_sq) adam.exp_avg_sq = matrix_of(*exp_avg_sq);
  adam.lr = lr;
  adam.beta1 = beta1;
  adam.beta2 = beta2;
  adam.eps = eps;
  adam.step = step;
  adam.last = last;
  cpu::adam_step(bound.relaxation, matrix_of(grad), adam, torch_threads(), torch_gemm);
}

void sgd_step_(const Tensor& logits, const Tensor& grad, const Tensor& logsumexp, const Tensor& embedding,
               const Tensor& soft, OptionalTensor rows, double temperature, double lr) {
  check_sgd_step_(logits, grad, logsumexp, embedding, soft, rows, temperature, lr);
  count_as_written(logits);
  const BoundRelaxation bound(logits, logsumexp, embedding, soft, rows, grad.size(0), temperature);
  cpu::sgd_step(bound.relaxation, matrix_of(grad), lr, torch_threads(), torch_gemm);
}

void commit_(const Tensor& tokens, const Tensor& committed, const Tensor& candidates,
             const Tensor& confidence, const Tensor& positions, const Tensor& splits, const Tensor& counts,
             OptionalTensor keys, std::optional<int64_t> eos_token_id, double alg_temp) {
  check_commit_(tokens, committed, candidates, confidence, positions, splits, counts, keys, eos_token_id,
                alg_temp);
  count_as_written(tokens, committed);
  const Tensor dense_inputs[] = {dense(candidates), dense(confidence), dense(positions), dense(splits),
                                 dense(counts)};
  keys = dense(keys);
  const auto int64s = [](const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); };
  cpu::Commit c;
  c.tokens = {tokens.data_ptr(), tokens.stride(0), DType::kFloat64};
  c.trajectories = tokens.size(0);
  c.length = tokens.size(1);
  c.rows = candidates.size(0);
  c.committed = static_cast<uint8_t*>(committed.data_ptr());
  c.candidates = int64s(dense_inputs[0]);
  c.confidence = dense_inputs[1].data_ptr();
  c.confidence_is_double = dtype_of(confidence) == ScalarType::Double;
  c.positions = int64s(dense_inputs[2]);
  c.splits = int64s(dense_inputs[3]);
  c.counts = int64s(dense_inputs[4]);
  c.keys = pointer_to<int64_t>(keys);
  c.eos_token_id = eos_token_id ? &*eos_token_id : nullptr;
  c.alg_temp = committed_temperature(alg_temp);
  cpu::commit(c);
}

}  // namespace
}  // namespace entrgi::ops

STABLE_TORCH_LIBRARY_IMPL(entrgi, CPU, m) {
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
