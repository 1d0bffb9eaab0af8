"""Train the sentiment reward: a teacher of six layers, then low-rank changes to the denoiser."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from corpus import Example, denials
from denoiser import Corpus
from diffusion import batches, collate, masked_logits
from loop import Plan, optimise
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
)

# Longer texts are cut; nine in ten are shorter.
MAX_READ = 48
RANK = 16
TEACHER_PLAN = Plan(steps=320, lr=8e-5, batch_size=36, seed=2)
STUDENT_PLAN = Plan(steps=500, lr=1e-3, batch_size=28, seed=3)
_DENIALS_PER_BATCH = 4
_TEACHER_SHARE = 0.6

Row = tuple[list[int], float]


def new_reward(denoiser: DistilBertForMaskedLM, dropout: float) -> DistilBertForSequenceClassification:
    """Return a regressor (one output, the valence) that starts from the denoiser's encoder."""
    config = DistilBertConfig.from_dict(denoiser.config.to_dict())
    config.num_labels = 1
    config.dropout = config.attention_dropout = config.seq_classif_dropout = dropout
    config._attn_implementation = "eager"
    model = DistilBertForSequenceClassification(config)
    model.distilbert.load_state_dict(denoiser.distilbert.state_dict())
    return model


def encode_rated(tokenizer: Tokenizer, examples: list[Example]) -> list[Row]:
    """Pair the token ids of every text with its valence."""
    rows = tokenizer.encode_batch([example.text for example in examples])
    cut = [r.ids if len(r.ids) <= MAX_READ else r.ids[: MAX_READ - 1] + r.ids[-1:] for r in rows]
    return [(ids, example.valence) for ids, example in zip(cut, examples, strict=True)]


def encode_denials(tokenizer: Tokenizer, held_out: bool) -> list[Row]:
    """Return the templated denials as rows."""
    return [(tokenizer.encode(text).ids, valence) for text, valence in denials(held_out)]


@torch.inference_mode()
def score(model: nn.Module, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Return the model's valence for each row, fp32 ``[len(rows)]``, computed in bf16."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    result = torch.empty(len(rows))
    for start in range(0, len(order), 128):
        chosen = order[start : start + 128]
        ids, attention_mask = collate([rows[index] for index in chosen], pad_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=attention_mask).logits
        result[chosen] = logits[:, 0].float()
    return result


@torch.inference_mode()
def rewrite(denoiser: DistilBertForMaskedLM, corpus: Corpus, count: int, seed: int = 5) -> list[list[int]]:
    """Return ``count`` training texts with 15 to 60 % of their tokens redrawn by the denoiser.

    The reward must also judge what the denoiser writes, which nobody has rated.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = random.Random(seed).sample(corpus.train, min(count, len(corpus.train)))
    chosen.sort(key=len)
    rows = []
    for start in range(0, len(chosen), 128):
        part = chosen[start : start + 128]
        ids, attention_mask = collate(part, corpus.pad_id)
        share = 0.15 + 0.45 * torch.rand(len(part), 1, generator=generator)
        column = torch.arange(ids.shape[1])
        inner = (column > 0) & (column < attention_mask.sum(1, keepdim=True) - 1)
        masked = (torch.rand(ids.shape, generator=generator) < share) & inner
        noisy = torch.where(masked, corpus.mask_id, ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = masked_logits(denoiser, noisy, attention_mask, masked).float()
        ids[masked] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        lengths = attention_mask.sum(1).tolist()
        rows.extend(row[:length] for row, length in zip(ids.tolist(), lengths, strict=True))
    return rows


def train_teacher(
    denoiser: DistilBertForMaskedLM, rows: list[Row], drills: list[Row], pad_id: int, stage: Path
) -> DistilBertForSequenceClassification:
    """Fine-tune the denoiser teacher's encoder by regression on valence (mean squared error)."""
    model = new_reward(denoiser, dropout=0.1)
    model.distilbert.embeddings.requires_grad_(False)
    model.train()
    optimise(model, TEACHER_PLAN, _regression(model, rows, drills, pad_id, TEACHER_PLAN), stage)
    return model.eval()


def train_student(
    teacher: DistilBertForSequenceClassification,
    denoiser: DistilBertForMaskedLM,
    rows: list[Row],
    drills: list[Row],
    rewritten: list[list[int]],
    pad_id: int,
    stage: Path,
) -> DistilBertForSequenceClassification:
    """Fit rank-``RANK`` changes of the student denoiser's encoder to labels and teacher.

    Word and position embeddings stay the denoiser's, so a token means the same vector to both.
    """
    unrated = [(ids, math.nan) for ids in rewritten]
    student = new_reward(denoiser, dropout=0.0)
    student.distilbert.embeddings.word_embeddings.requires_grad_(False)
    student.distilbert.embeddings.position_embeddings.requires_grad_(False)
    torch.manual_seed(STUDENT_PLAN.seed)
    add_low_rank(student.distilbert.transformer)
    # The pooled state's head keeps what the teacher learnt.
    student.pre_classifier.load_state_dict(teacher.pre_classifier.state_dict())
    student.classifier.load_state_dict(teacher.classifier.state_dict())
    student.train()
    loss_at = _regression(student, rows + unrated, drills, pad_id, STUDENT_PLAN, teacher)
    optimise(student, STUDENT_PLAN, loss_at, stage)
    return student.eval()


class LowRank(nn.Module):
    """Add ``up @ down`` to a frozen weight: ``[out, RANK] @ [RANK, in]``."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def add_low_rank(module: nn.Module) -> None:
    """Freeze every linear weight below ``module`` and give it a trainable low-rank change."""
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))


def _regression(
    model: nn.Module,
    rows: list[Row],
    drills: list[Row],
    pad_id: int,
    plan: Plan,
    teacher: nn.Module | None = None,
) -> Callable[[int], torch.Tensor]:
    """Return the loss by step number; a text whose valence is nan is judged by the teacher."""
    stream = None

    def loss_at(step: int) -> torch.Tensor:
        nonlocal stream
        if stream is None:
            stream = batches([ids for ids, _ in rows], plan.batch_size, plan.seed, step)
        batch = [rows[index] for index in next(stream)]
        batch += random.Random(step).sample(drills, _DENIALS_PER_BATCH)
        ids, attention_mask = collate([ids for ids, _ in batch], pad_id)
        target = torch.tensor([valence for _, valence in batch])
        if teacher is not None:
            # Asked batch by batch: a short run reads only part of the texts.
            with torch.no_grad():
                guess = teacher(input_ids=ids, attention_mask=attention_mask).logits[:, 0].float()
            target = torch.where(target.isnan(), guess, target.lerp(guess, _TEACHER_SHARE))
        logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, 0].float()
        return F.mse_loss(logits, target)

    return loss_at


def evaluate_reward(model: nn.Module, tokenizer: Tokenizer, held_out: list[Example], pad_id: int) -> dict[str, float]:
    """Return Pearson's r on rated texts, sign accuracy on labelled ones and on new denials."""
    rated = encode_rated(tokenizer, [e for e in held_out if e.rated])
    labelled = encode_rated(tokenizer, [e for e in held_out if not e.rated])
    reviews = encode_rated(tokenizer, [e for e in held_out if e.rated and e.domain in ("movie", "amazon")])
    drills = encode_denials(tokenizer, held_out=True)

    def compare(rows: list[Row]) -> tuple[float, float, float]:
        guess = score(model, [ids for ids, _ in rows], pad_id)
        truth = torch.tensor([valence for _, valence in rows])
        pearson = float(torch.corrcoef(torch.stack((guess, truth)))[0, 1])
        sign = float(((guess > 0) == (truth > 0)).float().mean())
        return pearson, sign, float((guess - truth).square().mean())

    return {
        "pearson_rated": compare(rated)[0],
        "mse_rated": compare(rated)[2],
        "rated_texts": len(rated),
        "pearson_reviews": compare(reviews)[0],
        "review_texts": len(reviews),
        "sign_accuracy_labelled": compare(labelled)[1],
        "labelled_texts": len(labelled),
        "sign_accuracy_denials": compare(drills)[1],
        "denial_texts": len(drills),
    }
