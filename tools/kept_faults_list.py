"""The faults of ``tools/kept_faults.py``: a line each, and the tests that must see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``line``, which ``file`` holds once, becomes ``instead``; one of ``tests`` (paths; ``-k only``) then fails."""

    name: str
    file: str
    line: str
    instead: str
    tests: str
    only: str = ""

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")


CPU, OPS, REWARDS = "csrc/cpu/", "tests/ops/", "python/entrgi/rewards/"
OPTIONS = "tests/sampler/test_options.py"
GENERATION = "tests/sampler/test_generation.py"
PREFIX = "tests/rewards/test_prefix_reuse.py"

FAULTS = (
    # The operators on the CPU.
    Fault(
        "top-p keeps ids whose mass ahead is less than the limit, not at most",
        f"{CPU}sample.cpp",
        "return static_cast<double>(ahead) <= limit;",
        "return static_cast<double>(ahead) < limit;",
        f"{OPS}test_sampling.py",
    ),
    Fault(
        "top-k drops ties",
        f"{CPU}sample.cpp",
        "kept = {least, c.p.vocab};",
        "kept = {least, -1};",
        f"{OPS}test_sampling.py",
    ),
    Fault(
        "the margin is that of the second probability to itself",
        f"{CPU}sample.cpp",
        "write(c.p.margin, c.row, (1.0 - runner_up) / draw.sum, acc);",
        "write(c.p.margin, c.row, (e - runner_up) / draw.sum, acc);",
        f"{OPS}test_sampling.py",
    ),
    Fault(
        "the two words of a draw change places",
        f"{CPU}philox.h",
        "return {c0, c1};",
        "return {c1, c0};",
        f"{OPS}test_commit.py",
    ),
    Fault(
        "the position does not enter the noise",
        f"{CPU}philox.h",
        "position(static_cast<uint32_t>(row[3])),",
        "position(0),",
        f"{OPS}test_sampling.py",
    ),
    Fault(
        "equal confidences commit the later row",
        f"{CPU}commit.cpp",
        "scores[a] > scores[b] : a < b;",
        "scores[a] > scores[b] : a > b;",
        f"{OPS}test_commit.py",
    ),
    Fault(
        "NaN confidences rank first",
        f"{CPU}commit.cpp",
        "return std::isnan(score) ? kLast : score;",
        "return std::isnan(score) ? -kLast : score;",
        f"{OPS}test_commit.py",
    ),
    Fault(
        "without a weight the hard part is left out",
        f"{CPU}relaxed_embedding.cpp",
        ": r.weight == nullptr ? 1.0",
        ": r.weight == nullptr ? 0.0",
        f"{OPS}test_relaxed_embedding.py",
    ),
    Fault(
        "the second moment is not corrected for its start",
        f"{CPU}logit_update.cpp",
        "1 / (1 - std::pow(p.beta2, step)),",
        "1.0,",
        f"{OPS}test_logit_update.py",
    ),
    Fault(
        "a padding row's gradient is left as it is",
        f"{CPU}logit_update.cpp",
        "if (target_row(p, n) < 0) std::memset(",
        "if (target_row(p, n) < -1) std::memset(",
        f"{OPS}test_logit_update.py",
    ),
    Fault(
        "few rows at a low temperature are multiplied as they are",
        f"{CPU}relaxation.h",
        "return r.temperature < kSharp ? std::max(rows, kMinRows) : rows;",
        "return rows;",
        f"{OPS}test_independence.py",
        "beside_it",
    ),
    # Their Python side.
    Fault(
        "a fake takes any small temperature",
        "entrgi_ext/fakes.py",
        "_check(1e-6 <= x <= 1e6,",
        "_check(x <= 1e6,",
        f"{OPS}test_fakes.py",
    ),
    # Guidance.
    Fault(
        "Adam's second beta",
        "python/entrgi/guidance.py",
        "BETAS, EPS = (0.9, 0.999), 1e-8",
        "BETAS, EPS = (0.9, 0.99), 1e-8",
        "tests/sampler/test_guidance.py",
    ),
    Fault(
        "all optimiser steps draw with the same noise",
        "python/entrgi/guidance.py",
        "        keys[:, 2].fill_(m)",
        "        keys[:, 2].fill_(0)",
        GENERATION,
    ),
    Fault(
        "the entropy weight is not divided by log V",
        "python/entrgi/guidance.py",
        "w = statistics.entropy / math.log(width) if",
        "w = statistics.entropy if",
        GENERATION,
    ),
    Fault(
        "the entropy weight is taken at tau",
        "python/entrgi/guidance.py",
        "w = statistics.entropy / math.log(width) if",
        "w = statistics.tempered_entropy / math.log(width) if",
        GENERATION,
    ),
    Fault(
        "straight-through estimates are blended as well",
        "python/entrgi/guidance.py",
        '"weight": w if guidance == "entrgi" else None',
        '"weight": w',
        GENERATION,
    ),
    Fault(
        "the reward sees the committed ids, not argmax z, at masked positions",
        "python/entrgi/guidance.py",
        "        seen[argmax_slot] = statistics.argmax",
        "        seen[argmax_slot] = seen[argmax_slot]",
        f"{OPTIONS} {GENERATION}",
    ),
    Fault(
        "lambda does not enter the temperature of Gumbel-softmax",
        "python/entrgi/guidance.py",
        "tau = temperature * gumbel_temperature",
        "tau = temperature",
        OPTIONS,
        "gumbel",
    ),
    # Drawing and committing.
    Fault(
        "the draw that is committed has the first optimiser step's noise",
        "python/entrgi/schedule.py",
        "COMMIT_DRAW, POSITION_DRAW = -1, -2",
        "COMMIT_DRAW, POSITION_DRAW = 0, -2",
        GENERATION,
    ),
    Fault(
        "the schedule's end is 0, not 1e-3",
        "python/entrgi/schedule.py",
        "t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float32)",
        "t = torch.linspace(1, 0, steps + 1, dtype=torch.float32)",
        "tests/sampler/test_schedule.py",
    ),
    Fault(
        "the last step leaves what the schedule leaves",
        "python/entrgi/schedule.py",
        "    if step == steps - 1:\n        return left",
        "    if step == steps:\n        return left",
        "tests/sampler/test_schedule.py",
    ),
    Fault(
        "a threshold may commit nothing",
        "python/entrgi/schedule.py",
        "return n if config.threshold is None else max(n, 1)",
        "return n",
        f"{OPTIONS} tests/sampler/test_schedule.py",
    ),
    Fault(
        "what waits for its block may be committed",
        "python/entrgi/commit.py",
        "score = score.masked_fill(~competing(batch, rows), -torch.inf)",
        "score = score.masked_fill(~rows.real, -torch.inf)",
        OPTIONS,
        "block_length",
    ),
    Fault(
        "an end of sequence counts as confident",
        "python/entrgi/commit.py",
        "confident &= ~holds_any(candidates, ends)",
        "pass",
        OPTIONS,
        "threshold",
    ),
    Fault(
        "ends beside the first are not ranked last",
        "python/entrgi/commit.py",
        "score = score.masked_fill(holds_any(sample.token, ends[1:]), -torch.inf)",
        "pass",
        OPTIONS,
        "ends",
    ),
    Fault(
        "a greedy token's probability is that of a drawn one",
        "python/entrgi/commit.py",
        "return sample._replace(token=best, probability=sample.probability * ratio)",
        "return sample._replace(token=best)",
        OPTIONS,
        "temperature",
    ),
    Fault(
        "padding rows are those of the next position",
        "python/entrgi/positions.py",
        "torch.where(real[:, None], positions, positions[:1])",
        "torch.where(real[:, None], positions, positions[:1] + 1)",
        "tests/sampler/test_micro_batching.py",
    ),
    # A generation.
    Fault(
        "seeds of different prompts coincide",
        "python/entrgi/generation.py",
        "rows = [[_mix(_mix(_mix(base) + b) + k) for k in range(num_trajectories)] for b in range(prompts)]",
        "rows = [[_mix(_mix(_mix(base) + b + k)) for k in range(num_trajectories)] for b in range(prompts)]",
        "tests/sampler/test_batch.py tests/sampler/test_api.py",
    ),
    Fault(
        "the mask token may be drawn",
        "python/entrgi/generation.py",
        '"mask_token_id": (denoiser.mask_token_id,),',
        "",
        f"{GENERATION} tests/sampler/test_api.py",
    ),
    Fault(
        "an end may be drawn in a hole",
        "python/entrgi/generation.py",
        '"ends": ends if config.infill else ()',
        '"ends": ()',
        "tests/vocabulary/test_end_tokens.py",
    ),
    Fault(
        "the best of the worst are returned",
        "python/entrgi/generation.py",
        ".sort(dim=1, descending=True, stable=True)",
        ".sort(dim=1, descending=False, stable=True)",
        f"{OPTIONS} tests/sampler/test_api.py",
    ),
    Fault(
        "shorter prompts of a batch attend to their padding",
        "python/entrgi/sequences.py",
        "mask = None if bool((lengths == width).all()) else",
        "mask = None if bool((lengths <= width).all()) else",
        "tests/sampler/test_batch.py",
    ),
    Fault(
        "a text begins with the special tokens before it",
        "python/entrgi/sequences.py",
        "text_start, stop = len(prompt.prefix), len(row) - len(prompt.suffix)",
        "text_start, stop = 0, len(row) - len(prompt.suffix)",
        f"{GENERATION} tests/rewards/test_rewards.py",
    ),
    Fault(
        "early_exit ends a text with masks before its end",
        "python/entrgi/commit.py",
        "finished = behind.any(dim=1) & ~(masked & ~behind).any(dim=1)",
        "finished = behind.any(dim=1)",
        OPTIONS,
        "early_exit",
    ),
    # Denoisers.
    Fault(
        "Dream's logits are not shifted",
        "python/entrgi/denoisers/dream.py",
        "shift = True",
        "shift = False",
        "tests/denoisers/test_dream_llada.py",
    ),
    Fault(
        "Dream and LLaDA see their padding",
        "python/entrgi/models/attention.py",
        "return _additive(visible[:, None, None, :].bool(), dtype)",
        "return _additive(visible[:, None, None, :] >= 0, dtype)",
        "tests/denoisers/test_dream_llada.py",
    ),
    Fault(
        "LLaDA's rotations are rounded to bfloat16",
        "python/entrgi/denoisers/llada.py",
        "wide = torch.promote_types(hidden.dtype, torch.float32)",
        "wide = hidden.dtype",
        "tests/denoisers/test_dream_llada.py",
    ),
    Fault(
        "one thread's positions are another's",
        "python/entrgi/denoisers/masked_lm.py",
        '_positions: ContextVar[Tensor | None] = ContextVar("entrgi.denoisers.positions", default=None)',
        '_positions = type("Shared", (), {"set": lambda self, x: setattr(self, "x", x), "get": lambda self: '
        'getattr(self, "x", None), "reset": lambda self, token: None})()',
        "tests/sampler/test_threads.py",
        "MaskedLM",
    ),
    Fault(
        "a wrapped model is set to evaluation mode",
        "python/entrgi/models/wrapping.py",
        "        self.source = source\n",
        "        self.source = source.eval()\n",
        "tests/models/test_wrapping.py",
    ),
    # Rewards.
    Fault(
        "a response's end is hidden, too",
        f"{REWARDS}masks.py",
        "hidden = is_eos.cumsum(dim=1) > is_eos  # an earlier one exists",
        "hidden = is_eos.cumsum(dim=1) > 0",
        "tests/rewards/test_rewards.py tests/vocabulary/test_end_tokens.py",
    ),
    Fault(
        "masks of our own are taken whatever the model computes with them",
        "python/entrgi/models/attention.py",
        "<= _CLOSE * expected.abs().max()",
        "<= 1e9 * expected.abs().max()",
        "tests/rewards/test_architectures.py",
        "left_alone",
    ),
    Fault(
        "a kept prefix is read as if it were all visible",
        f"{REWARDS}backbone.py",
        "torch.cat([cache.prefix.valid[cache.prompt], visible], dim=1)",
        "torch.cat([torch.ones_like(cache.prefix.valid[cache.prompt]), visible], dim=1)",
        PREFIX,
    ),
    Fault(
        "positions begin anew behind a kept prefix",
        f"{REWARDS}sequences.py",
        '"positions": kept[:, None] + index.minimum(length - 1),',
        '"positions": index.minimum(length - 1).expand(len(frames), -1),',
        PREFIX,
    ),
    Fault(
        "the likelihood is judged one position late",
        f"{REWARDS}likelihood.py",
        "previous = torch.cat([before, hidden[:, :-1]], dim=1)",
        "previous = hidden",
        "tests/rewards/test_likelihood_reward.py",
    ),
    Fault(
        "a weighted sum forgets its weights in guidance",
        f"{REWARDS}weighted.py",
        "total = total + weight * child(",
        "total = total + child(",
        "tests/rewards/test_weighted_reward.py",
    ),
    # Vocabularies, prompts, files.
    Fault(
        "id 0 is no unknown token",
        "python/entrgi/vocabulary/alignment.py",
        "if token_id is not None:  # id 0 is an id",
        "if token_id:",
        "tests/vocabulary/test_vocabulary.py",
    ),
    Fault(
        "a begun turn is closed and a second one opened",
        "python/entrgi/messages.py",
        'if isinstance(prompt, str) or prompt[-1]["role"] != ASSISTANT:',
        "if True:",
        "tests/vocabulary/test_messages.py",
    ),
    Fault(
        "the template's end of turn ends nothing",
        "python/entrgi/denoisers/ends.py",
        "ids = [own, *declared, turn_end(tokenizer, options)]",
        "ids = [own, *declared]",
        "tests/vocabulary/test_end_tokens.py",
    ),
    Fault(
        "an older index goes before a newer single file",
        "python/entrgi/models/files.py",
        "    if (folder / single).exists():\n        files = [single]",
        "    if (folder / single).exists() and not (folder / index).is_file():\n        files = [single]",
        "tests/models/test_weight_files.py",
    ),
)
