// The schema of every operator. Documentation of the arguments: entrgi_ext/ops.py. An argument that is added
// goes last and has a default, so that calls of before stay valid.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(entrgi, m) {
  m.def(
      "logit_statistics(Tensor logits, float temperature)"
      " -> (Tensor logsumexp, Tensor entropy, Tensor tempered_entropy, Tensor argmax)");
  m.def(
      "logit_statistics_backward(Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor? grad_tempered_entropy,"
      " Tensor logits, Tensor logsumexp, Tensor unit_logsumexp, Tensor entropy, Tensor tempered_entropy,"
      " float temperature) -> Tensor");
  m.def(
      "sample_tokens(Tensor logits, Tensor keys, float temperature, float top_p, int? top_k=None,"
      " Tensor? forbidden=None, Tensor(a!)? error_flag=None)"
      " -> (Tensor logsumexp, Tensor entropy, Tensor tempered_entropy, Tensor argmax,"
      " Tensor token, Tensor probability, Tensor margin, Tensor filtered_entropy)");
  m.def("gumbel_perturb(Tensor logits, Tensor keys, float scale) -> Tensor");
  m.def(
      "relaxed_embedding(Tensor logits, Tensor logsumexp, Tensor embedding, Tensor? hard_tokens,"
      " Tensor? weight, float temperature) -> (Tensor output, Tensor soft)");
  m.def(
      "relaxed_embedding_(Tensor(a!) output, Tensor(b!) soft, Tensor logits, Tensor logsumexp,"
      " Tensor embedding, Tensor? hard_tokens, Tensor? weight, Tensor? row_index, float temperature) -> ()");
  m.def(
      "logit_gradient(Tensor grad, Tensor logits, Tensor logsumexp, Tensor embedding, Tensor soft,"
      " Tensor? row_index, float temperature) -> Tensor");
  m.def(
      "adam_step_(Tensor(a!) logits, Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, Tensor grad,"
      " Tensor logsumexp, Tensor embedding, Tensor soft, Tensor? row_index, float temperature, float lr,"
      " float beta1, float beta2, float eps, int step, bool last=False) -> ()");
  m.def(
      "sgd_step_(Tensor(a!) logits, Tensor grad, Tensor logsumexp, Tensor embedding, Tensor soft,"
      " Tensor? row_index, float temperature, float lr) -> ()");
  m.def(
      "commit_(Tensor(a!) tokens, Tensor(b!) committed, Tensor candidates, Tensor confidence,"
      " Tensor positions, Tensor splits, Tensor counts, Tensor? keys=None, int? eos_token_id=None,"
      " float alg_temp=0.0)"
      " -> ()");
  m.def("warm_up(int device) -> ()");
  m.def("cuda_versions() -> (int driver, int runtime)");
}
