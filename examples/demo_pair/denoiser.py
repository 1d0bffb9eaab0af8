"""Train the masked-diffusion denoiser: a teacher of all six layers, then a student of four."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusion import batches, collate, corrupt, masked_logits, weighted_mean
from loop import Plan, optimise
from quantize import fake_quantize_linears, settle
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertForMaskedLM

POSITIONS = 128
# Of the teacher's six; the last feeds the head and must stay.
STUDENT_LAYERS = (0, 1, 3, 5)
TEACHER_PLAN = Plan(steps=700, lr=2e-4)
STUDENT_PLAN = Plan(steps=500, lr=2e-4, batch_size=40, seed=1)
# Rounding slows a step and costs 0.04 nats where nothing adapts to it: the last steps are enough.
_ROUNDED_SHARE = 0.3
_PREFIX_SHARE = 0.3
_DISTILLATION_WEIGHT = 0.7


@dataclass(frozen=True)
class Corpus:
    """Token rows with specials, for training and held out, and the ids that masking needs."""

    train: list[list[int]]
    held_out: list[list[int]]
    mask_id: int
    pad_id: int

    @classmethod
    def encode(cls, tokenizer: Tokenizer, train: list[str], held_out: list[str]) -> Corpus:
        """Tokenise the texts as ``[CLS] text [SEP]``."""
        return cls(
            [encoding.ids for encoding in tokenizer.encode_batch(train)],
            [encoding.ids for encoding in tokenizer.encode_batch(held_out)],
            tokenizer.token_to_id("[MASK]"),
            tokenizer.token_to_id("[PAD]"),
        )


def new_denoiser(vocab_size: int, layers: int) -> DistilBertForMaskedLM:
    """Return an untrained model without dropout; its head's transform starts as the identity."""
    config = DistilBertConfig(
        vocab_size=vocab_size,
        n_layers=layers,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        # On CPUs the eager backward takes about half the time of the fused one.
        attn_implementation="eager",
        pad_token_id=0,
    )
    model = DistilBertForMaskedLM(config)
    torch.nn.init.eye_(model.vocab_transform.weight)
    torch.nn.init.zeros_(model.vocab_transform.bias)
    return model


def train_teacher(
    base: dict[str, torch.Tensor], kept_ids: list[int], corpus: Corpus, stage: Path
) -> DistilBertForMaskedLM:
    """Fine-tune the base encoder, cut to the kept tokens, on the masked-diffusion loss."""
    model = new_denoiser(len(kept_ids), layers=6)
    state = dict(base)
    words = state["distilbert.embeddings.word_embeddings.weight"][kept_ids]
    state["distilbert.embeddings.word_embeddings.weight"] = words
    positions = "distilbert.embeddings.position_embeddings.weight"
    state[positions] = state[positions][:POSITIONS]
    state["vocab_projector.weight"] = words
    model.load_state_dict(state, strict=False)

    feed = _Feed(corpus, TEACHER_PLAN)

    def loss_at(step: int) -> torch.Tensor:
        ids, attention_mask, noisy, masked, weight = feed(step)
        logits = masked_logits(model, noisy, attention_mask, masked).float()
        loss = F.cross_entropy(logits, ids[masked], reduction="none")
        return weighted_mean(loss, masked, weight, attention_mask)

    model.train()
    optimise(model, TEACHER_PLAN, loss_at, stage)
    return model.eval()


def cut_layers(teacher: DistilBertForMaskedLM, layers: tuple[int, ...] = STUDENT_LAYERS) -> DistilBertForMaskedLM:
    """Copy the teacher with only the named layers."""
    student = new_denoiser(teacher.config.vocab_size, len(layers))
    state = {}
    for name, tensor in teacher.state_dict().items():
        head, dot, tail = name.partition("transformer.layer.")
        if dot:
            index, _, rest = tail.partition(".")
            if int(index) not in layers:
                continue
            name = f"{head}{dot}{layers.index(int(index))}.{rest}"
        state[name] = tensor.clone()
    student.load_state_dict(state)
    return student


def train_student(teacher: DistilBertForMaskedLM, corpus: Corpus, stage: Path) -> DistilBertForMaskedLM:
    """Distil the teacher into the cut model, whose last steps compute with 4-bit layers."""
    student = cut_layers(teacher)
    rounding = fake_quantize_linears(student.distilbert.transformer)
    feed = _Feed(corpus, STUDENT_PLAN)

    def loss_at(step: int) -> torch.Tensor:
        ids, attention_mask, noisy, masked, weight = feed(step)
        rounding.enabled = step >= (1 - _ROUNDED_SHARE) * STUDENT_PLAN.steps
        with torch.no_grad():
            target = masked_logits(teacher, noisy, attention_mask, masked).float().log_softmax(-1)
        logits = masked_logits(student, noisy, attention_mask, masked).float()
        log_probs = logits.log_softmax(-1)
        truth = F.nll_loss(log_probs, ids[masked], reduction="none")
        imitation = F.kl_div(log_probs, target, log_target=True, reduction="none").sum(-1)
        loss = torch.lerp(truth, imitation, _DISTILLATION_WEIGHT)
        return weighted_mean(loss, masked, weight, attention_mask)

    student.train()
    optimise(student, STUDENT_PLAN, loss_at, stage)
    rounding.enabled = True
    settle(student)
    return student.eval()


class _Feed:
    """Corrupted batches by step number; asks must come in order, from any first step."""

    def __init__(self, corpus: Corpus, plan: Plan) -> None:
        self.corpus, self.plan, self.stream = corpus, plan, None

    def __call__(self, step: int) -> tuple[torch.Tensor, ...]:
        if self.stream is None:
            self.stream = batches(self.corpus.train, self.plan.batch_size, self.plan.seed, step)
        rows = [self.corpus.train[index] for index in next(self.stream)]
        ids, attention_mask = collate(rows, self.corpus.pad_id)
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        noisy, masked, weight = corrupt(ids, attention_mask, self.corpus.mask_id, generator, _PREFIX_SHARE)
        return ids, attention_mask, noisy, masked, weight
