"""On larger models rounding may change a draw: where two ways to compute the same thing part, a draw was undecided.

A denoiser and a causal reward of 8,192 words in fp32, with a long prompt, so that keeping the prefix, micro-batches
and buckets change the shapes of the products and with them the last bits.
"""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Qwen3Config, Qwen3ForSequenceClassification

import entrgi.sampler
from entrgi import MaskedLM, SequenceClassifierReward, generate
from entrgi_ext.reference import gumbel
from support import tiny

WORDS = [*tiny.SPECIAL, "user", "assistant", ":", *(f"w{i}" for i in range(8184))]
OPTIONS = {"num_return_sequences": 2, "max_new_tokens": 8, "steps": 8, "seed": 5}
PROMPTS = [" ".join(f"w{7 * i}" for i in range(30)), " ".join(f"w{11 * i}" for i in range(9))]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 256, "max_position_embeddings": 128, "initializer_range": 0.1}
    denoiser = BertForMaskedLM(BertConfig(**shape))
    reward = Qwen3Config(**shape, num_key_value_heads=2, head_dim=32, num_labels=1, pad_token_id=0)
    words = tiny.tokenizer(WORDS, chat=tiny.CHAT.replace("[SEP] ", ""))
    return MaskedLM(denoiser, tiny.tokenizer(WORDS)), Qwen3ForSequenceClassification(reward), words


def run(monkeypatch, models, reuse_prefix=True, **options):
    """The output and, per step, the optimised logits of every masked position: {(trajectory, column): z}."""
    denoiser, network, words = models
    reward, logits_of, commit = SequenceClassifierReward(network, words, reuse_prefix=reuse_prefix), [], []
    plain = entrgi.sampler.commit

    def recorded(task, step, batch, sequences, rows, logits, trace):
        here = {}
        for n in range(batch.rows):
            trajectory = batch.trajectories[int(rows.trajectories[n])]
            here[trajectory, int(rows.columns[n])] = logits[n].clone()
        if commit and commit[-1] == step.index:
            logits_of[-1].update(here)
        else:
            logits_of.append(here)
        commit.append(step.index)
        return plain(task, step, batch, sequences, rows, logits, trace)

    monkeypatch.setattr(entrgi.sampler, "commit", recorded)
    output = generate(PROMPTS, denoiser, reward, output_history=True, **OPTIONS, **options)
    monkeypatch.setattr(entrgi.sampler, "commit", plain)
    return output, logits_of


@pytest.mark.parametrize(
    "options",
    [{"reuse_prefix": False}, {"max_rows": 8}, {"row_bucket": 32}, {"max_rows": 20, "row_bucket": 7}],
    ids=str,
)
def test_first_difference_is_an_undecided_draw(monkeypatch, models, options):
    expected, logits = run(monkeypatch, models)
    output, others = run(monkeypatch, models, **options)
    for step, (a, b) in enumerate(zip(expected.steps, output.steps, strict=True)):
        # Up to here both had the same tokens, so their logits differ by rounding alone.
        distances = torch.stack([(logits[step][key] - others[step][key]).abs().max() for key in logits[step]])
        assert distances.median() < 1e-3
        if torch.equal(a.tokens, b.tokens):
            continue
        assert undecided(expected, step, logits[step], others[step])
        return
    assert torch.equal(expected.sequences, output.sequences)
    torch.testing.assert_close(expected.rewards, output.rewards, rtol=1e-4, atol=1e-4)


def undecided(output, step, logits, others):
    """Whether some draw, or the ranking of positions, was closer than the two runs' logits are to each other."""
    seeds = output.seeds.flatten()
    for (trajectory, column), z in logits.items():
        keys = torch.tensor([[int(seeds[trajectory]), output.steps[step].step, -1, column]])
        score = z.double() / 0.7 + gumbel(keys, torch.arange(z.shape[0]))[0]
        best = score.topk(2).values
        if best[0] - best[1] <= 2 * (z - others[trajectory, column]).abs().max() / 0.7:
            return True
    entropies = output.steps[step].entropy
    return any(row.sort().values.diff().nan_to_num(1).min() < 1e-4 for row in entropies)


def test_logits_that_differ_by_more_than_rounding_would_be_seen(monkeypatch, models):
    """The test above can fail: another learning rate is not rounding."""
    _, logits = run(monkeypatch, models)
    _, others = run(monkeypatch, models, guidance_lr=0.51)
    distances = torch.stack([(logits[0][key] - others[0][key]).abs().max() for key in logits[0]])
    assert distances.median() > 1e-3
