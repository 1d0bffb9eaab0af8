"""Runs the tiny models through a transcription of the method and through the driver, and compares the tokens.

Options are written out here as well, so that the driver's defaults and presets are tested too.
"""

import math

import torch

from entrgi import generate
from support import method, tiny

PAPER = {"steps": 128}  # the defaults of method.Options are this preset's
RGRL = {
    "steps": 128,
    "guidance_steps": 1,
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 50,
    "schedule": "rgrl",
    "entropy_rule": "filtered",
    "deprioritize_eos": False,
}
# Options of the driver that are none of a single trajectory's method.
NOT_OF_THE_METHOD = ("num_return_sequences", "best_of", "max_new_tokens", "infill", "max_rows", "row_bucket")

PROMPTS = ["the movie", "w3 was"]
SEEDS = torch.tensor([[3, -(2**40), 17, 90], [5, 2**61, -8, 44]])
MASK, EOS = 4, 3


def ids_of(text):
    return [tiny.WORDS.index(word) for word in text.split()]


def trajectory(prompt, max_new_tokens, chat):
    """Tokens with masks, the response window, and the ids around the response for the reward model."""
    tokens = [2, *ids_of(prompt), *[MASK] * max_new_tokens, 3]
    window = (tokens.index(MASK), len(tokens) - 1)
    if chat:
        return tokens, window, ids_of(f"user : {prompt} [SEP] assistant :"), [3]
    return tokens, window, tokens[: window[0]], [3]


def forbidden_ids(infill=False):
    """Ids without a token, the mask, and in a text to be infilled the end that would cut off what follows."""
    forbidden = torch.arange(tiny.LOGITS_WIDTH) >= len(tiny.WORDS)
    forbidden[MASK] = True
    forbidden[EOS] = infill
    return forbidden


def aligned_embedding(reward):
    embedding = reward.model.get_input_embeddings().weight.detach().clone()
    embedding[len(tiny.WORDS) :] = embedding[1]  # ids without a token read as [UNK]
    return embedding


def model_calls(denoiser, reward):
    """Full forward passes of both models over one unpadded trajectory."""

    def logits_of(tokens):
        with torch.no_grad():
            return denoiser.model(input_ids=torch.tensor([list(map(int, tokens))])).logits[0]

    def reward_model(embeds, mask):
        return reward.model(inputs_embeds=embeds[None], attention_mask=mask[None].long()).logits[0, 0]

    return logits_of, reward_model


def method_options(preset="paper", pad=0, **options):
    own = {name: value for name, value in options.items() if name not in NOT_OF_THE_METHOD}
    return method.Options(**{**(PAPER if preset == "paper" else RGRL), "pad": pad, **own})


def transcribed(denoiser, reward, prompts, seeds, options, max_new_tokens, infill=False, walk=method.generate):
    """Every trajectory by itself: its tokens and the steps that ``walk`` recorded, prompt by prompt."""
    logits_of, reward_model = model_calls(denoiser, reward)
    chat = reward.tokenizer.chat_template is not None
    result = []
    for prompt, row in zip(prompts, seeds.tolist(), strict=True):
        tokens, window, prefix, suffix = trajectory(prompt, max_new_tokens, chat)
        for seed in row:
            record = []
            final = walk(
                tokens,
                seed,
                window,
                options,
                logits_of,
                aligned_embedding(reward),
                prefix,
                suffix,
                reward_model,
                forbidden_ids(infill),
                record=record,
            )
            result.append((final, record))
    return result


def tiny_models(dtype, tok=None, eos_bias=0.0, reward="bert", logit_scale=1.0):
    """The pair, with a denoiser that likes to end the text (``eos_bias``) or that is less sure (``logit_scale``)."""
    denoiser = tiny.denoiser(dtype, tok)
    with torch.no_grad():
        denoiser.model.get_output_embeddings().bias[EOS] += eos_bias
        for parameter in denoiser.model.cls.predictions.transform.LayerNorm.parameters():
            parameter *= logit_scale
    return denoiser, tiny.bert_reward(dtype, tok) if reward == "bert" else tiny.qwen3_reward(dtype)


SMALL = {"max_new_tokens": 5, "steps": 4}


def sample(models=None, prompts=PROMPTS[:1], copies=2, preset="paper", eos_bias=0.0, ends=(EOS,), **options):
    """The driver's generation alone."""
    models = models or tiny_models(torch.float64, eos_bias=eos_bias)
    models[0].end_token_ids = ends
    return generate(
        prompts,
        *models,
        preset,
        trajectory_seeds=SEEDS[: len(prompts), :copies],
        num_return_sequences=copies,
        **{**SMALL, **options},
    )


def check(
    dtype=torch.float64,
    prompts=PROMPTS[:1],
    copies=2,
    preset="paper",
    tok=None,
    eos_bias=0.0,
    reward="bert",
    logit_scale=1.0,
    unlike=None,
    walk=method.generate,
    **options,
):
    """The driver's generation, asserted to hold the transcription's tokens.

    Args:
        unlike: options that must make another text, so that no test passes where an option is ignored.
    """
    options = {**SMALL, **options}
    models = tiny_models(dtype, tok, eos_bias, reward, logit_scale)
    seeds = SEEDS[: len(prompts), :copies]
    output = sample(models, prompts, copies, preset, **options)
    expected = transcribed(
        *models,
        prompts,
        seeds,
        method_options(preset, models[0].tokenizer.pad_token_id, **options),
        options["max_new_tokens"],
        bool(options.get("infill")),
        walk,
    )
    got = output.sequences.flatten(0, 1).tolist()
    for row, (tokens, _) in zip(got, expected, strict=True):
        assert row[: len(tokens)] == list(tokens)
        assert MASK not in row
    if unlike is not None:
        other = sample(models, prompts, copies, preset, **{**options, **unlike})
        assert not torch.equal(output.sequences, other.sequences), f"{unlike} makes no difference"
    return output


def text_read(prompt, tokens, window):
    """What the reward model is given in the end: the prompt and the response up to its end, decoded."""
    response = list(tokens[window[0] : window[1]])
    response = response[: response.index(EOS)] if EOS in response else response
    words = [tiny.WORDS[token] for token in response if token >= len(tiny.SPECIAL)]
    return " ".join([*prompt.split(), *words])


def final_reward(reward, text):
    with torch.no_grad():
        return reward.model(input_ids=torch.tensor([[2, *ids_of(text), 3]])).logits[0, 0].item()


def nan_like(values, width):
    """{column: value} as a row with NaN elsewhere."""
    row = [math.nan] * width
    for column, value in values.items():
        row[column] = value
    return torch.tensor(row)
