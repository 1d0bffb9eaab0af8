// The operators, for every device: arguments are checked, outputs allocated and parameters filled in; the
// rest is the backend's. Compiled once into each library, where ENTRGI_DISPATCH_KEY is CPU or CUDA.
//
// Nothing here reads the memory of a tensor or waits for a device, so that every operator can be captured in
// a CUDA graph.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "backend.h"
#include "checks.h"

namespace entrgi::ops {
namespace {

void bind_logits(LogitsParams& p, const Argument& logits) {
  p.logits = logits.matrix();
  p.n = logits.sizes[0];
  p.vocab = logits.sizes[1];
}

// ---- the vocabulary pass ----------------------------------------------------------------------------------

struct Statistics {
  Tensor logsumexp, entropy, tempered_entropy, argmax;

  explicit Statistics(const Argument& logits)
      : logsumexp(row_values(logits)),
        entropy(row_values(logits)),
        tempered_entropy(row_values(logits)),
        argmax(row_ids(logits)) {}

  static Tensor row_values(const Argument& logits) {
    return empty_vector(logits, logits.sizes[0], logits.accumulator());
  }
  static Tensor row_ids(const Argument& logits) {
    return empty_vector(logits, logits.sizes[0], ScalarType::Long);
  }

  void bind(LogitStatisticsParams& p, const Argument& logits, double temperature) const {
    bind_logits(p, logits);
    p.temperature = temperature;
    p.logsumexp = logsumexp.data_ptr();
    p.entropy = entropy.data_ptr();
    p.tempered_entropy = tempered_entropy.data_ptr();
    p.argmax = static_cast<int64_t*>(argmax.data_ptr());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_statistics(const Tensor& logits_, double temperature) {
  const Argument logits("logits", logits_);
  check_logits(logits);
  check_temperature(temperature);
  const Statistics out(logits);
  LogitStatisticsParams p{};
  out.bind(p, logits, temperature);
  backend::run(p, logits);
  return {out.logsumexp, out.entropy, out.tempered_entropy, out.argmax};
}

Tensor logit_statistics_backward(OptionalTensor grad_logsumexp_, OptionalTensor grad_entropy_,
                                 OptionalTensor grad_tempered_entropy_, const Tensor& logits_,
                                 const Tensor& logsumexp_, const Tensor& unit_logsumexp_,
                                 const Tensor& entropy_, const Tensor& tempered_entropy_,
                                 double temperature) {
  const Argument logits("logits", logits_);
  check_logits(logits);
  check_temperature(temperature);
  const Argument rows[] = {{"grad_logsumexp", grad_logsumexp_},
                           {"grad_entropy", grad_entropy_},
                           {"grad_tempered_entropy", grad_tempered_entropy_},
                           {"logsumexp", logsumexp_},
                           {"unit_logsumexp", unit_logsumexp_},
                           {"entropy", entropy_},
                           {"tempered_entropy", tempered_entropy_}};
  for (const Argument& values : rows) check_row_values(values, logits);
  const Dense grad_logsumexp(rows[0]), grad_entropy(rows[1]), grad_tempered_entropy(rows[2]),
      logsumexp(rows[3]), unit_logsumexp(rows[4]), entropy(rows[5]), tempered_entropy(rows[6]);
  const Tensor out = empty_matrix(logits, logits.sizes[0], logits.sizes[1], logits.dtype);
  LogitStatisticsBackwardParams p{};
  bind_logits(p, logits);
  p.grad_logsumexp = grad_logsumexp.as();
  p.grad_entropy = grad_entropy.as();
  p.grad_tempered_entropy = grad_tempered_entropy.as();
  p.logsumexp = logsumexp.as();
  p.unit_logsumexp = unit_logsumexp.as();
  p.entropy = entropy.as();
  p.tempered_entropy = tempered_entropy.as();
  p.temperature = temperature;
  p.gradient = out.data_ptr();
  backend::run(p, logits);
  return out;
}

// Bad rows and rows with nothing to draw raise on the CPU. A CUDA kernel cannot: it sets a bit of error_flag,
// which the caller reads where it synchronises.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_tokens(
    const Tensor& logits_, const Tensor& keys_, double temperature, double top_p,
    std::optional<int64_t> top_k, OptionalTensor forbidden_, OptionalTensor error_flag_) {
  const Argument logits("logits", logits_), keys("keys", keys_), forbidden("forbidden", forbidden_),
      error_flag("error_flag", error_flag_);
  check_logits(logits);
  check_temperature(temperature);
  ENTRGI_CHECK(top_p >= 0 && top_p <= 1, "top_p must be in [0, 1], got ", top_p);
  ENTRGI_CHECK(!top_k || *top_k >= 1, "top_k must be >= 1 or None, got ", *top_k);
  check_keys(keys, logits.sizes[0], logits);
  check_forbidden(forbidden, logits);
  check_vector(error_flag, 1, ScalarType::Int, logits);
  if (error_flag) {
    check_apart({&error_flag}, {&logits, &keys, &forbidden});
    count_as_written(error_flag);
  }

  const Dense dense_keys(keys), dense_forbidden(forbidden);
  const Statistics out(logits);
  const Tensor token = Statistics::row_ids(logits), probability = Statistics::row_values(logits),
               margin = Statistics::row_values(logits), filtered_entropy = Statistics::row_values(logits);
  SampleTokensParams p{};
  out.bind(p, logits, temperature);
  p.keys = dense_keys.as<int64_t>();
  p.top_p = top_p;
  p.top_k = top_k.value_or(0);
  if (forbidden && forbidden.dtype == ScalarType::Int) {
    p.forbidden_ids = dense_forbidden.as<int32_t>();
    p.num_forbidden = forbidden.sizes[0];
  } else {
    p.forbidden = dense_forbidden.as<bool>();
  }
  p.error_flag = error_flag.as<int32_t>();
  p.token = static_cast<int64_t*>(token.data_ptr());
  p.probability = probability.data_ptr();
  p.margin = margin.data_ptr();
  p.filtered_entropy = filtered_entropy.data_ptr();
  backend::run(p, logits);
  return {out.logsumexp, out.entropy, out.tempered_entropy, out.argmax, token,
          probability,   margin,      filtered_entropy};
}

Tensor gumbel_perturb(const Tensor& logits_, const Tensor& keys_, double scale) {
  const Argument logits("logits", logits_), keys("keys", keys_);
  check_logits(logits);
  check_keys(keys, logits.sizes[0], logits);
  ENTRGI_CHECK(scale >= 0 && scale <= 1e6, "scale must be between 0 and 1e6, got ", scale);
  const Dense dense_keys(keys);
  const Tensor out = empty_accumulator_rows(logits);
  GumbelPerturbParams p{};
  bind_logits(p, logits);
  p.keys = dense_keys.as<int64_t>();
  p.scale = scale;
  p.output = Argument("output", out).matrix();
  backend::run(p, logits);
  return out;
}

// ---- the relaxed embedding and the update of the logits ---------------------------------------------------

// What they share: q, from the logits and their logsumexp, and the reward model's table.
struct Relaxation {
  Argument logits, logsumexp, embedding;
  double temperature;

  void check() const {
    check_logits(logits);
    check_temperature(temperature);
    check_row_values(logsumexp, logits);
    check_embedding(embedding, logits);
  }
  int64_t rows() const { return logits.sizes[0]; }
  int64_t width() const { return embedding.sizes[1]; }

  void check_soft(const Argument& soft) const {
    check_matrix(soft, rows(), width(), logits.accumulator(), logits);
  }
};

// The parameters of an operator, and the dense copies that they may point to.
template <typename Params>
struct Bound {
  Dense logsumexp, row_index;
  Params p{};

  Bound(const Relaxation& relaxation, const Argument& soft, const Argument& row_index_)
      : logsumexp(relaxation.logsumexp), row_index(row_index_) {
    bind_logits(p, relaxation.logits);
    p.logsumexp = logsumexp.as();
    p.embedding = relaxation.embedding.matrix();
    p.dim = relaxation.width();
    p.temperature = relaxation.temperature;
    p.soft = soft.matrix();
    p.row_index = row_index.as<int64_t>();
  }
};

// The hard part of the embedding: these tokens' rows of it, by weight.
struct Blend {
  Argument hard_tokens, weight;

  void check(const Argument& logits) const {
    check_vector(hard_tokens, logits.sizes[0], ScalarType::Long, logits);
    check_row_values(weight, logits);
    ENTRGI_CHECK(!weight || hard_tokens, "weight must be None when hard_tokens is None");
  }
};

struct BoundEmbedding : Bound<RelaxedEmbeddingParams> {
  Dense tokens, weight;

  BoundEmbedding(const Relaxation& relaxation, const Blend& blend, const Argument& output,
                 const Argument& soft, const Argument& row_index_)
      : Bound(relaxation, soft, row_index_), tokens(blend.hard_tokens), weight(blend.weight) {
    p.hard_tokens = tokens.as<int64_t>();
    p.weight = weight.as();
    p.output = output.matrix();
    p.target_rows = output.sizes[0];
  }
};

std::tuple<Tensor, Tensor> relaxed_embedding(const Tensor& logits, const Tensor& logsumexp,
                                             const Tensor& embedding, OptionalTensor hard_tokens,
                                             OptionalTensor weight, double temperature) {
  const Relaxation relaxation{
      {"logits", logits}, {"logsumexp", logsumexp}, {"embedding", embedding}, temperature};
  const Blend blend{{"hard_tokens", hard_tokens}, {"weight", weight}};
  relaxation.check();
  blend.check(relaxation.logits);
  const auto empty = [&](ScalarType dtype) {
    return empty_matrix(relaxation.logits, relaxation.rows(), relaxation.width(), dtype);
  };
  const Tensor output = empty(relaxation.embedding.dtype), soft = empty(relaxation.logits.accumulator());
  BoundEmbedding bound(relaxation, blend, {"output", output}, {"soft", soft}, {"row_index", std::nullopt});
  backend::run(bound.p, relaxation.logits);
  return {output, soft};
}

void relaxed_embedding_(const Tensor& output_, const Tensor& soft_, const Tensor& logits,
                        const Tensor& logsumexp, const Tensor& embedding, OptionalTensor hard_tokens,
                        OptionalTensor weight, OptionalTensor row_index_, double temperature) {
  const Relaxation relaxation{
      {"logits", logits}, {"logsumexp", logsumexp}, {"embedding", embedding}, temperature};
  const Blend blend{{"hard_tokens", hard_tokens}, {"weight", weight}};
  const Argument output("output", output_), soft("soft", soft_), row_index("row_index", row_index_);
  relaxation.check();
  blend.check(relaxation.logits);
  check_target(output, row_index, relaxation.logits, relaxation.embedding);
  check_rows_disjoint(output);
  relaxation.check_soft(soft);
  check_rows_disjoint(soft);
  check_apart({&output, &soft}, {&relaxation.logits, &relaxation.logsumexp, &relaxation.embedding,
                                 &blend.hard_tokens, &blend.weight, &row_index});
  count_as_written(output, soft);
  BoundEmbedding bound(relaxation, blend, output, soft, row_index);
  backend::run(bound.p, relaxation.logits);
}

// What every update begins with.
struct Update {
  Argument grad;
  Relaxation relaxation;
  Argument soft, row_index;

  void check() const {
    relaxation.check();
    check_target(grad, row_index, relaxation.logits, relaxation.embedding);
    relaxation.check_soft(soft);
  }
  // In place.
  void check_step(double lr) const {
    check();
    check_rows_disjoint(relaxation.logits);
    ENTRGI_CHECK(std::isfinite(lr), "lr must be finite, got ", lr);
  }
  void check_step_apart(std::initializer_list<const Argument*> written) const {
    check_apart(written, {&grad, &relaxation.logsumexp, &relaxation.embedding, &soft, &row_index});
  }
};

struct BoundUpdate : Bound<LogitUpdateParams> {
  BoundUpdate(const Update& update, UpdateRule rule)
      : Bound(update.relaxation, update.soft, update.row_index) {
    p.rule = rule;
    p.grad = update.grad.matrix();
    p.target_rows = update.grad.sizes[0];
  }
};

Tensor logit_gradient(const Tensor& grad, const Tensor& logits, const Tensor& logsumexp,
                      const Tensor& embedding, const Tensor& soft, OptionalTensor row_index,
                      double temperature) {
  const Update update{{"grad", grad},
                      {{"logits", logits}, {"logsumexp", logsumexp}, {"embedding", embedding}, temperature},
                      {"soft", soft},
                      {"row_index", row_index}};
  update.check();
  const Tensor out = empty_accumulator_rows(update.relaxation.logits);
  BoundUpdate bound(update, UpdateRule::kGradient);
  bound.p.gradient = Argument("gradient", out).matrix();
  backend::run(bound.p, update.relaxation.logits);
  return out;
}

void adam_step_(const Tensor& logits, OptionalTensor exp_avg_, OptionalTensor exp_avg_sq_, const Tensor& grad,
                const Tensor& logsumexp, const Tensor& embedding, const Tensor& soft,
                OptionalTensor row_index, double temperature, double lr, double beta1, double beta2,
                double eps, int64_t step, bool last) {
  const Update update{{"grad", grad},
                      {{"logits", logits}, {"logsumexp", logsumexp}, {"embedding", embedding}, temperature},
                      {"soft", soft},
                      {"row_index", row_index}};
  const Argument exp_avg("exp_avg", exp_avg_), exp_avg_sq("exp_avg_sq", exp_avg_sq_);
  const Argument& z = update.relaxation.logits;
  update.check_step(lr);
  ENTRGI_CHECK(beta1 >= 0 && beta1 < 1, "beta1 must be in [0, 1), got ", beta1);
  ENTRGI_CHECK(beta2 >= 0 && beta2 < 1, "beta2 must be in [0, 1), got ", beta2);
  ENTRGI_CHECK(std::isfinite(eps) && eps >= 0, "eps must be >= 0 and finite, got ", eps);
  ENTRGI_CHECK(step >= 1, "step counts from 1, got ", step);
  // The only step of its denoising step neither reads nor writes moments.
  ENTRGI_CHECK((exp_avg && exp_avg_sq) || (step == 1 && last),
               "exp_avg and exp_avg_sq may be None only when step == 1 and last, got step ", step, ", last ",
               last ? "true" : "false");
  for (const Argument* moment : {&exp_avg, &exp_avg_sq}) {
    if (!*moment) continue;
    check_matrix(*moment, z.sizes[0], z.sizes[1], z.accumulator(), z);
    check_rows_disjoint(*moment);
  }
  update.check_step_apart({&z, &exp_avg, &exp_avg_sq});
  count_as_written(z, exp_avg, exp_avg_sq);
  BoundUpdate bound(update, UpdateRule::kAdam);
  LogitUpdateParams& p = bound.p;
  p.exp_avg = exp_avg.matrix();
  p.exp_avg_sq = exp_avg_sq.matrix();
  p.lr = lr;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.step = step;
  p.last = last;
  backend::run(p, z);
}

void sgd_step_(const Tensor& logits, const Tensor& grad, const Tensor& logsumexp, const Tensor& embedding,
               const Tensor& soft, OptionalTensor row_index, double temperature, double lr) {
  const Update update{{"grad", grad},
                      {{"logits", logits}, {"logsumexp", logsumexp}, {"embedding", embedding}, temperature},
                      {"soft", soft},
                      {"row_index", row_index}};
  update.check_step(lr);
  update.check_step_apart({&update.relaxation.logits});
  count_as_written(update.relaxation.logits);
  BoundUpdate bound(update, UpdateRule::kSgd);
  bound.p.lr = lr;
  backend::run(bound.p, update.relaxation.logits);
}

// ---- commit -----------------------------------------------------------------------------------------------

void commit_(const Tensor& tokens_, const Tensor& committed_, const Tensor& candidates_,
             const Tensor& confidence_, const Tensor& positions_, const Tensor& splits_,
             const Tensor& counts_, OptionalTensor keys_, std::optional<int64_t> eos_token_id,
             double alg_temp) {
  const Argument tokens("tokens", tokens_), committed("committed", committed_),
      candidates("candidates", candidates_), confidence("confidence", confidence_),
      positions("positions", positions_), splits("splits", splits_), counts("counts", counts_),
      keys("keys", keys_);
  ENTRGI_CHECK(tokens.dim == 2, "tokens must be a matrix [P, S], got ", describe(tokens));
  check_matrix(tokens, tokens.sizes[0], tokens.sizes[1], ScalarType::Long, tokens);
  check_rows_disjoint(tokens);
  ENTRGI_CHECK(candidates.dim == 1, "candidates must be a vector [N], got ", describe(candidates));
  const int64_t trajectories = tokens.sizes[0], n = candidates.sizes[0];
  check_vector(candidates, n, ScalarType::Long, tokens);
  check_vector(committed, n, ScalarType::Bool, tokens);
  ENTRGI_CHECK(n <= 1 || committed.strides[0] == 1, "committed must be contiguous, got stride ",
               committed.strides[0]);
  const bool is_double = confidence.dtype == ScalarType::Double && confidence.is_cpu();
  check_vector(confidence, n, is_double ? ScalarType::Double : ScalarType::Float, tokens);
  check_vector(positions, n, ScalarType::Long, tokens);
  check_vector(splits, trajectories + 1, ScalarType::Long, tokens);
  check_vector(counts, trajectories, ScalarType::Long, tokens);
  ENTRGI_CHECK(std::isfinite(alg_temp) && alg_temp >= 0, "alg_temp must be >= 0 and finite, got ", alg_temp);
  ENTRGI_CHECK(alg_temp == 0 || keys, "keys must be given when alg_temp > 0, got None with alg_temp ",
               alg_temp);
  check_keys(keys, n, tokens);
  check_apart({&tokens, &committed}, {&candidates, &confidence, &positions, &splits, &counts, &keys});
  count_as_written(tokens, committed);

  const Dense dense_candidates(candidates), dense_confidence(confidence), dense_positions(positions),
      dense_splits(splits), dense_counts(counts), dense_keys(keys);
  CommitParams p{};
  p.tokens = tokens.as<int64_t>();
  p.trajectories = trajectories;
  p.length = tokens.sizes[1];
  p.tokens_stride = tokens.strides[0];
  p.committed = committed.as<bool>();
  p.candidates = dense_candidates.as<int64_t>();
  p.confidence = dense_confidence.as();
  p.confidence_dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  p.positions = dense_positions.as<int64_t>();
  p.n = n;
  p.splits = dense_splits.as<int64_t>();
  p.counts = dense_counts.as<int64_t>();
  p.keys = dense_keys.as<int64_t>();
  p.has_eos = eos_token_id.has_value();
  p.eos_token_id = eos_token_id.value_or(0);
  // Below, a confidence divided by it leaves fp32, and all of them rank alike; and Gumbel noise decides
  // between equal confidences alone, as it does at this.
  constexpr double kLeastTemperature = 1e-30;
  p.alg_temp = alg_temp > 0 ? std::max(alg_temp, kLeastTemperature) : 0;
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
