"""The published EntRGi loop in PyTorch: what ``end_to_end.py`` measures entrgi against.

A port, in our own words, of the authors' public code: ``main_expts/entrgi.py`` and ``main_expts/utils.py`` of
github.com/atutej/entrgi-rgrl (commit 4592ddb; the same text as in github.com/atutej/entrgi, commit 3180f21), the code
behind arXiv 2602.05000. It was read in full. The operations and their order are the published ones; nothing is made
faster and nothing slower. Kept, with the function of the published code that does it:

``generate``
  - every one of the T steps is made and guided, also those in which the schedule commits nothing
  - the denoiser runs over whole sequences, ``lm_head`` at every position, behind a 4-D additive key mask that is passed
    even where nothing is padded; Dream's logits are shifted by concatenation, which copies [P, S, V]
  - masks are found trajectory by trajectory, counted by ``.item()``; padding lengths are read by ``.item()`` from a
    tensor on the device; prompts are padded on the left
  - the commit runs trajectory by trajectory: scale, filter, softmax, ``multinomial``, a second softmax of the initial
    logits for the confidence sum p log(p + 1e-10), ``topk``; t and s of the schedule are read by ``.item()`` for each
    (counts in fp64 arithmetic then; the same as entrgi's for all L and T up to 256)
  - the final score decodes, templates, tokenises and scores one text at a time
``optimize_logits``
  - z is cut out by boolean masks, concatenated, cloned twice; a fresh ``torch.optim.Adam`` in every denoising step,
    moments in z's dtype
  - each Adam step goes trajectory by trajectory over slices of z (so autograd scatters every slice's gradient into
    zeros of the size of all of z): softmax at temperature 1 and its entropy, softmax at tau, a matmul with the full
    probabilities, sort-based top-p, softmax, ``multinomial``; nothing is under ``no_grad``, so what autograd saves is
    kept as published
  - the reward model reads the whole sequence, prefix included, in every Adam step (no key/value reuse; ``use_cache``
    as the model's default), from embeddings concatenated as prefix, response, suffix
  - its 2-D attention mask is filled by a Python loop over all response positions with one ``.item()`` each
  - the reward model's own head pools (for causal models given ``inputs_embeds``: the last index)
``utils.py``
  - top-p: descending ``torch.sort`` (not stable), ``cumsum`` of its softmax in z's dtype, removal mask scattered back,
    ``masked_fill`` with the dtype's lowest value; top-k: ``torch.topk``
  - ids map through a dictionary of spellings, ids without a counterpart to ``unk_token_id or eos_token_id``

Not from there, because the published code serves Dream with a chat template only:
  - models without a chat template read ``[CLS] prompt response [SEP]``; BERT-type models get a 2-D mask and no shift
  - a prompt is text, and becomes one user message; the published code recovers it by splitting the decoded prompt at
    ``<|im_start|>user``, which gives the same for prompts without such markers
  - attention runs on the implementation that the models were built with (SDPA, the default of Dream's remote code and
    of transformers), whatever entrgi sets for itself on the same models
  - ``alg="origin"``, ``alg_temp`` and multi-GPU runs are left out; other options raise

How tokens are drawn is exchangeable: :class:`PublishedDraw` is what is timed, :class:`KeyedDraw` gives the draws of
entrgi's random keys, so that whole generations can be compared token for token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entrgi.config import SamplerConfig
from entrgi.timing import Recorder
from entrgi_ext.reference import gumbel

PLACEHOLDER = "<<PLACEHOLDER>>"
COMMIT = -1  # the iteration of a draw that commits; Adam iterations count from 0
SUPPORTED = ("entropy", "maskgit_plus", "topk_margin", "anchor")


@dataclass(frozen=True)
class Models:
    """Two models and how the loop calls them.

    Attributes:
        denoiser: (input_ids [P, S], attention_mask) -> ``.logits`` [P, S, V] at every position.
        reward: (inputs_embeds [P, S, d], attention_mask [P, S]) -> ``.logits`` [P, 1]; frozen.
        shift: the denoiser predicts the next position (Dream).
        key_mask: the denoiser takes a 4-D additive mask and has no absolute positions (Dream, LLaDA), otherwise a
            2-D one (BERT).
        token_map: int64 [V], the reward model's id of each id of the denoiser.
        embeddings: [V, d], the reward model's input embedding through ``token_map``.
        attention: transformers' name of the attention implementation of each model.
    """

    denoiser: nn.Module
    tokenizer: PreTrainedTokenizerBase
    reward: nn.Module
    reward_tokenizer: PreTrainedTokenizerBase
    mask_id: int
    eos_id: int | None
    pad_id: int | None
    shift: bool
    key_mask: bool
    token_map: Tensor
    embeddings: Tensor
    attention: tuple[str, str]

    @property
    def device(self) -> torch.device:
        return self.token_map.device


@dataclass(frozen=True)
class Frame:
    """Embeddings of what the reward model reads around the response, [1, n, d] each."""

    prefix: Tensor
    suffix: Tensor


@dataclass(frozen=True)
class Result:
    """What a generation gives.

    Attributes:
        tokens: int64 [B, K, S] of the denoiser, prompts padded on the left.
        window: columns of the response, (first, stop).
        texts: [B][K], what was scored.
        rewards: fp32 [B, K].
    """

    tokens: Tensor
    window: tuple[int, int]
    texts: list[list[str]]
    rewards: Tensor

    @property
    def responses(self) -> Tensor:
        """int64 [B, K, L]."""
        return self.tokens[:, :, self.window[0] : self.window[1]]


@dataclass(frozen=True)
class Run:
    """What stays the same through a generation.

    Attributes:
        frames: B, one per prompt.
        window: columns of the response, (first, stop).
        padding: columns left of each of the P trajectories' own sequence.
    """

    models: Models
    config: SamplerConfig
    draw: Draw
    frames: list[Frame]
    window: tuple[int, int]
    padding: list[int]
    recorder: Recorder | None


def adapt(denoiser: object, reward: object, *, shift: bool, attention: tuple[str, str]) -> Models:
    """The models inside entrgi's adapters (``.model``, ``.tokenizer``, ids) for this loop, and the token map.

    Args:
        denoiser: an entrgi denoiser around a transformers model.
        reward: an entrgi sequence-classifier reward.
        shift, attention: see :class:`Models`; models that shift get the 4-D mask.
    """
    unknown = reward.tokenizer.unk_token_id or reward.tokenizer.eos_token_id
    theirs = reward.tokenizer.get_vocab()
    table = reward.model.get_input_embeddings().weight
    token_map = torch.full((denoiser.vocab_size,), unknown, dtype=torch.long)
    for spelling, token in denoiser.tokenizer.get_vocab().items():
        if token < denoiser.vocab_size and spelling in theirs:
            token_map[token] = theirs[spelling]
    token_map = token_map.to(table.device)
    return Models(
        denoiser=denoiser.model,
        tokenizer=denoiser.tokenizer,
        reward=reward.model,
        reward_tokenizer=reward.tokenizer,
        mask_id=denoiser.mask_token_id,
        eos_id=denoiser.eos_token_id,
        pad_id=denoiser.pad_token_id,
        shift=shift,
        key_mask=shift,
        token_map=token_map,
        embeddings=table[token_map].detach(),
        attention=attention,
    )


class Draw(Protocol):
    """How tokens are drawn: the part of the loop that is random."""

    def __call__(
        self, scaled: Tensor, trajectory: int, step: int, iteration: int, places: Tensor, shift: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 [n] and the filtered probabilities [n, V] they were drawn from.

        Args:
            scaled: [n, V], z / tau of the masked positions of one trajectory.
            iteration: Adam iteration, or ``COMMIT``.
            places, shift: ``places + shift``, int64 [n], are the positions in the trajectory's own sequence.
        """
        ...


@dataclass(frozen=True)
class PublishedDraw:
    """Filter, softmax, ``torch.multinomial`` from the global generator, which :func:`generate` seeds."""

    top_p: float
    top_k: int | None = None

    def __call__(
        self, scaled: Tensor, trajectory: int, step: int, iteration: int, places: Tensor, shift: int
    ) -> tuple[Tensor, Tensor]:
        probabilities = F.softmax(filtered(scaled, self.top_p, self.top_k), dim=-1)
        return torch.multinomial(probabilities, 1)[:, 0], probabilities


@dataclass(frozen=True)
class KeyedDraw:
    """The same filter and softmax, then the Gumbel maximum with the noise of entrgi's keys.

    Attributes:
        seeds: int64 [P], trajectory seeds.
        forbidden: bool [V], ids that entrgi never draws and the published loop may.
    """

    top_p: float
    top_k: int | None
    seeds: Tensor
    forbidden: Tensor

    def __call__(
        self, scaled: Tensor, trajectory: int, step: int, iteration: int, places: Tensor, shift: int
    ) -> tuple[Tensor, Tensor]:
        allowed = scaled.detach().masked_fill(self.forbidden, -math.inf)
        probabilities = F.softmax(filtered(allowed, self.top_p, self.top_k), dim=-1)
        columns = places + shift
        words = [self.seeds[trajectory].to(columns.device), columns.new_tensor(step), columns.new_tensor(iteration)]
        keys = torch.stack([*(word.expand(len(columns)) for word in words), columns], dim=1)
        noise = gumbel(keys, torch.arange(scaled.shape[1], device=scaled.device))
        return (probabilities.double().log() + noise).argmax(dim=1), probabilities


def never_drawn(models: Models, extra: Sequence[int] = ()) -> Tensor:
    """bool [V]: the mask id, ids that the tokenizer does not know, and ``extra``."""
    forbidden = torch.ones(len(models.token_map), dtype=torch.bool)
    known = [token for token in models.tokenizer.get_vocab().values() if token < len(forbidden)]
    forbidden[known] = False
    forbidden[[models.mask_id, *extra]] = True
    return forbidden.to(models.device)


@contextmanager
def own_attention(models: Models) -> Iterator[None]:
    """Both models on the implementation that they were built with, for as long as the context lasts."""
    pairs = list(zip((models.denoiser, models.reward), models.attention, strict=True))
    before = [model.config._attn_implementation for model, _ in pairs]
    try:
        for model, name in pairs:
            model.set_attn_implementation(name)
        yield
    finally:
        for (model, _), name in zip(pairs, before, strict=True):
            model.set_attn_implementation(name)


def generate(
    prompts: Sequence[str],
    models: Models,
    config: SamplerConfig,
    *,
    seed: int = 0,
    draw: Draw | None = None,
    recorder: Recorder | None = None,
) -> Result:
    """Sample K responses to each of B prompts with the published loop.

    Args:
        prompts: texts.
        config: K, L, T, M, learning rate, temperature, filters, ``alg`` and ``guidance``; other options must be
            at their defaults.
        seed: of the global generator, as published.
        draw: None is :class:`PublishedDraw`.
        recorder: times the parts under entrgi's span names.

    Raises:
        ValueError: for an option that the published loop does not have, or prompts of different lengths for a
            model with absolute positions.
    """
    _check_config(config)
    torch.manual_seed(seed)
    with own_attention(models):
        return _generate(prompts, models, config, draw or PublishedDraw(config.top_p, config.top_k), recorder)


def _generate(
    prompts: Sequence[str], models: Models, config: SamplerConfig, draw: Draw, recorder: Recorder | None
) -> Result:
    device, copies = models.device, config.num_return_sequences

    encoded = [_encode(models, prompt) for prompt in prompts]
    suffix = encoded[0][1]
    lengths = [len(ids) for ids, _ in encoded]
    if len(set(lengths)) > 1 and not models.key_mask:
        raise ValueError(f"prompts of {lengths} tokens: a model with absolute positions cannot be padded on the left")
    first, stop = max(lengths), max(lengths) + config.max_new_tokens
    tokens = torch.full((len(prompts) * copies, stop + len(suffix)), models.mask_id, dtype=torch.long, device=device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    padding = [first - lengths[p // copies] for p in range(len(tokens))]
    for b, (ids, _) in enumerate(encoded):
        for p in range(b * copies, (b + 1) * copies):
            tokens[p, : padding[p]] = 0 if models.pad_id is None else models.pad_id
            valid[p, : padding[p]] = False
            tokens[p, padding[p] : first] = torch.tensor(ids, device=device)
            tokens[p, stop:] = torch.tensor(suffix, device=device)
    on_device = torch.tensor(padding, device=device)
    mask = _denoiser_mask(models, valid)
    frames = [_frame(models, prompt) for prompt in prompts]
    run = Run(models, config, draw, frames, (first, stop), padding, recorder)
    timesteps = torch.linspace(1, 1e-3, config.steps + 1, device=device)

    for step in range(config.steps):
        with _span(recorder, "step"):
            with _span(recorder, "denoiser"), torch.no_grad():
                logits = models.denoiser(tokens, attention_mask=mask).logits
                if models.shift:
                    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            masked = []
            for p in range(len(tokens)):
                is_mask = tokens[p] == models.mask_id
                is_mask[: on_device[p].item()] = False
                masked.append(is_mask)
            counts = [is_mask.sum().item() for is_mask in masked]
            if sum(counts) == 0:
                break
            optimized, initial = optimize_logits(run, logits, masked, tokens, step)
            with _span(recorder, "commit"):
                _commit(run, tokens, masked, counts, optimized, initial, timesteps, step)

    texts, rewards = [], torch.empty(len(prompts), copies)
    for b, prompt in enumerate(prompts):
        texts.append([])
        for k in range(copies):
            row = tokens[b * copies + k]
            text = models.tokenizer.decode(row[first:stop], skip_special_tokens=True)
            if not _is_chat(models.reward_tokenizer) and not _is_chat(models.tokenizer):
                text = models.tokenizer.decode(row[padding[b * copies] : stop], skip_special_tokens=True)
            texts[b].append(text)
            rewards[b, k] = _score(models, prompt, text)
    return Result(tokens.view(len(prompts), copies, -1), (first, stop), texts, rewards)


def optimize_logits(run: Run, logits: Tensor, masked: list[Tensor], tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """M Adam steps on the logits of all masked positions.

    Args:
        logits: [P, S, V], the denoiser's.
        masked: P of bool [S].
        tokens: int64 [P, S].

    Returns:
        the optimised and the initial logits, [N, V].
    """
    models, config, frames, recorder = run.models, run.config, run.frames, run.recorder
    count, (first, stop) = len(tokens), run.window
    length, copies = stop - first, config.num_return_sequences
    device, width, dtype = tokens.device, models.embeddings.shape[1], models.embeddings.dtype
    chosen = []
    for p in range(count):
        if masked[p].sum().item() > 0:
            chosen.append(logits[p][masked[p]])
    z = torch.cat(chosen, dim=0).detach().clone().requires_grad_(True)
    initial = z.detach().clone()
    adam = torch.optim.Adam([z], lr=config.guidance_lr)

    before = max(frame.prefix.shape[1] for frame in frames)
    after = max(frame.suffix.shape[1] for frame in frames)
    prefix = torch.zeros(len(frames), before, width, device=device, dtype=dtype)
    suffix = torch.zeros(len(frames), after, width, device=device, dtype=dtype)
    for b, frame in enumerate(frames):
        prefix[b, before - frame.prefix.shape[1] :] = frame.prefix[0]
        suffix[b, : frame.suffix.shape[1]] = frame.suffix[0]
    prefix, suffix = prefix.repeat_interleave(copies, dim=0), suffix.repeat_interleave(copies, dim=0)
    table = models.reward.get_input_embeddings()

    for iteration in range(config.guidance_steps):
        with _span(recorder, "vocabulary forward"):
            adam.zero_grad()
            response = torch.zeros(count, length, width, device=device, dtype=dtype)
            ids = tokens[:, first:stop].clone()
            row = 0
            for p in range(count):
                here = masked[p][first:stop]
                places = torch.where(here)[0]
                n = len(places)
                if n > 0:
                    part = slice(row, row + n)
                    response[p, places] = _relax(run, z, part, p, step, iteration, places)
                    ids[p, places] = z[part].argmax(dim=-1)
                    row += n
                fixed = ~here
                if fixed.any():
                    response[p, fixed] = table(models.token_map[tokens[p, first:stop][fixed]]).detach()
            embeds = torch.cat([prefix, response, suffix], dim=1)
        with _span(recorder, "attention mask"):
            mask = _reward_mask(run, ids, before, after)
        with _span(recorder, "reward forward"):
            rewards = models.reward(inputs_embeds=embeds, attention_mask=mask).logits[:, 0]
            loss = -rewards.sum()
        with _span(recorder, "reward backward"):
            if recorder is not None:  # from where the gradient leaves the reward model, it is vocabulary work
                embeds.register_hook(lambda _gradient: (recorder.end(), recorder.begin("vocabulary backward"), None)[2])
            loss.backward()
        with _span(recorder, "logit_update"):
            adam.step()
    return z.detach(), initial


def _relax(run: Run, z: Tensor, part: slice, trajectory: int, step: int, iteration: int, places: Tensor) -> Tensor:
    """Relaxed embeddings [n, d] of one trajectory's masked positions, rows ``part`` of z."""
    config, embeddings = run.config, run.models.embeddings
    if config.guidance == "entrgi":
        p = F.softmax(z[part], dim=-1)
        entropy = -torch.sum(p * torch.log(p + 1e-10), dim=-1)
        most = torch.log(torch.tensor(p.shape[-1], device=p.device, dtype=p.dtype))
        weight = (entropy / most).detach()
    scaled = z[part] / config.temperature
    q = F.softmax(scaled, dim=-1)
    soft = torch.matmul(q, embeddings)
    if config.guidance == "expectation":
        return soft
    hard_tokens, _ = run.draw(scaled, trajectory, step, iteration, places, run.window[0] - run.padding[trajectory])
    hard = embeddings[hard_tokens[:, None]].mean(dim=1)
    if config.guidance == "aps":
        return soft + (hard - soft).detach()
    return soft + weight.unsqueeze(-1) * (hard - soft).detach()


def _reward_mask(run: Run, ids: Tensor, before: int, after: int) -> Tensor:
    """int64 [P, S], 0 on padding, on the pad id and after the first end-of-sequence token of the response ``ids``."""
    models, length = run.models, ids.shape[1]
    mask = torch.ones(len(ids), before + length + after, device=ids.device, dtype=torch.long)
    for p in range(len(ids)):
        frame = run.frames[p // run.config.num_return_sequences]
        left, right = before - frame.prefix.shape[1], frame.suffix.shape[1]
        if left > 0:
            mask[p, :left] = 0
        if right < after:
            mask[p, before + length + right :] = 0
        ended = False
        for i in range(length):
            token = ids[p, i].item()
            if ended or (models.pad_id is not None and token == models.pad_id):
                mask[p, before + i] = 0
            if token == models.eos_id:
                ended = True
    return mask


def _commit(
    run: Run,
    tokens: Tensor,
    masked: list[Tensor],
    counts: list[int],
    optimized: Tensor,
    initial: Tensor,
    timesteps: Tensor,
    step: int,
) -> None:
    """Draw at every masked position, write the most confident; trajectory by trajectory."""
    models, config = run.models, run.config
    t, s = timesteps[step], timesteps[step + 1]
    row = 0
    for p in range(len(tokens)):
        n = counts[p]
        if n == 0:
            continue
        places = torch.where(masked[p])[0]
        z, z0 = optimized[row : row + n], initial[row : row + n]
        row += n
        with _span(run.recorder, "sample_tokens"):
            drawn, probabilities = run.draw(z / config.temperature, p, step, COMMIT, places, -run.padding[p])
        if config.alg == "entropy":
            p0 = F.softmax(z0 / config.temperature, dim=-1)
            confidence = torch.sum(p0 * torch.log(p0 + 1e-10), dim=-1)
        elif config.alg == "topk_margin":
            ranked, _ = torch.sort(probabilities, dim=-1, descending=True)
            confidence = ranked[:, 0] - ranked[:, 1]
        elif config.alg == "anchor":
            confidence = z.gather(-1, drawn[:, None])[:, 0]
        else:
            confidence = probabilities.gather(-1, drawn[:, None])[:, 0]
        if config.deprioritize_eos:
            ends = drawn == models.eos_id
            if ends.any():
                confidence = confidence.clone()
                confidence[ends] = -math.inf
        number = int(n * (1 - s.item() / t.item())) if step < config.steps - 1 else n
        if number > 0:
            _, best = torch.topk(confidence, min(number, n))
            tokens[p, places[best]] = drawn[best]


def filtered(scaled: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """``scaled`` [n, V] with the dtype's lowest value where top-p or top-k removes an id."""
    lowest = torch.finfo(scaled.dtype).min
    if top_p < 1.0:
        ranked, order = torch.sort(scaled, descending=True)
        remove = torch.cumsum(F.softmax(ranked, dim=-1), dim=-1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        removed = torch.zeros_like(scaled, dtype=torch.bool).scatter_(-1, order, remove)
        scaled = scaled.masked_fill(removed, lowest)
    if top_k is not None:
        smallest = torch.topk(scaled, min(top_k, scaled.shape[-1]))[0][..., -1, None]
        scaled = scaled.masked_fill(scaled < smallest, lowest)
    return scaled


def _check_config(config: SamplerConfig) -> None:
    if config.alg not in SUPPORTED:
        raise ValueError(f"alg must be one of {', '.join(SUPPORTED)} in the published loop here, got {config.alg!r}")
    if config.guidance not in ("entrgi", "aps", "expectation"):
        raise ValueError(f"guidance must be entrgi, aps or expectation in the published loop, got {config.guidance!r}")
    taken = {
        *("num_return_sequences", "max_new_tokens", "steps", "temperature", "top_p", "top_k", "alg", "guidance"),
        *("guidance_steps", "guidance_lr", "deprioritize_eos"),
        *("cuda_graphs", "row_bucket", "max_rows"),  # change no result
    }
    default = SamplerConfig()
    for name in SamplerConfig.__dataclass_fields__:
        if name not in taken and getattr(config, name) != getattr(default, name):
            raise ValueError(f"{name} is no option of the published loop, got {getattr(config, name)!r}")


def _span(recorder: Recorder | None, name: str) -> AbstractContextManager[object]:
    return nullcontext() if recorder is None else _Part(recorder, name)


class _Part:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __enter__(self) -> None:
        self.recorder.begin(self.name)

    def __exit__(self, *_exception: object) -> None:
        self.recorder.end()


def _is_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.chat_template is not None


def _encode(models: Models, prompt: str) -> tuple[list[int], list[int]]:
    """The denoiser's ids before and after the response."""
    tokenizer = models.tokenizer
    if _is_chat(tokenizer):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False).input_ids, []
    body = tokenizer(prompt, add_special_tokens=False).input_ids
    return [tokenizer.cls_token_id, *body], [tokenizer.sep_token_id]


def _denoiser_mask(models: Models, valid: Tensor) -> Tensor:
    if not models.key_mask:
        return valid.long()
    dtype = models.denoiser.dtype
    zero, lowest = (torch.tensor(x, dtype=dtype, device=valid.device) for x in (0.0, -math.inf))
    return torch.where(valid[:, None, None, :], zero, lowest)


@torch.no_grad()
def _frame(models: Models, prompt: str) -> Frame:
    """The reward model's own template around the response, embedded."""
    tokenizer, table = models.reward_tokenizer, models.reward.get_input_embeddings()
    if _is_chat(tokenizer):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": PLACEHOLDER}]
        texts = tokenizer.apply_chat_template(messages, tokenize=False).split(PLACEHOLDER)
        before, after = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
    else:
        body = tokenizer(prompt, add_special_tokens=False).input_ids
        before, after = torch.tensor([[tokenizer.cls_token_id, *body]]), torch.tensor([[tokenizer.sep_token_id]])
    return Frame(table(before.to(models.device)), table(after.to(models.device)))


@torch.no_grad()
def _score(models: Models, prompt: str, text: str) -> float:
    """Reward of one decoded text."""
    tokenizer = models.reward_tokenizer
    if _is_chat(tokenizer):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        inputs = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
        ids = inputs.input_ids
    else:
        body = tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.cls_token_id, *body, tokenizer.sep_token_id]])
    ids = ids.to(models.device)
    return models.reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0].item()
