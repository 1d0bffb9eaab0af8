"""How many positions a step commits and which ones compete, seen from outside: through whole generations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from entrgi import CallableDenoiser, SamplerConfig, SequenceClassifierReward, generate
from entrgi.commit import confidence
from entrgi.schedule import commit_count, plan
from entrgi_ext.reference import Sample, gumbel
from support import method, tiny

SCHEDULES = ["paper", "rgrl", "uniform"]
WIDEST = 140


@pytest.fixture(scope="module")
def models():
    """A denoiser that says the same at a position whatever stands beside it, and long contexts."""
    table = 2 * torch.randn(WIDEST, tiny.LOGITS_WIDTH, generator=torch.Generator().manual_seed(5))

    def logits(ids, attention_mask):
        return table[: ids.shape[1]].expand(len(ids), -1, -1)

    torch.manual_seed(6)
    config = tiny.bert_config(
        num_labels=1, max_position_embeddings=WIDEST, hidden_size=8, num_hidden_layers=1, intermediate_size=8
    )
    denoiser = CallableDenoiser(logits, tiny.tokenizer(), tiny.LOGITS_WIDTH, max_length=WIDEST)
    return denoiser, SequenceClassifierReward(BertForSequenceClassification(config), tiny.tokenizer())


def run(models, length, steps, copies=1, **options):
    return generate(
        "the",
        *models,
        seed=1,
        max_new_tokens=length,
        steps=steps,
        num_return_sequences=copies,
        guidance="none",
        **options,
    )


def counts(models, length, steps, **options):
    """Tokens committed in each of the steps, skipped ones included."""
    history = run(models, length, steps, **options).history
    assert 0 not in history.committed
    assert history.step == sorted(set(history.step))
    result = [0] * steps
    for step, committed in zip(history.step, history.committed, strict=True):
        result[step] = committed
    return result


# Each by hand from the formula of its schedule, n rounded as that says, the last step taking what is left.
BY_HAND = [
    # t = linspace(1, 1e-3, T + 1): n = int(left * (1 - t[j+1] / t[j]))
    ("paper", 8, 4, [1, 2, 2, 3]),
    ("paper", 4, 8, [0, 0, 0, 0, 0, 1, 1, 2]),
    ("paper", 10, 4, [2, 2, 2, 4]),
    ("paper", 1, 1, [1]),
    ("paper", 1, 5, [0, 0, 0, 0, 1]),
    ("paper", 10, 1, [10]),
    ("paper", 128, 128, [0] + [1] * 126 + [2]),
    # t = i / T, s = (i - 1) / T, r = s / t in fp32: n = rint(left * (1 - r)), half to even
    ("rgrl", 10, 4, [2, 3, 2, 3]),
    ("rgrl", 7, 2, [4, 3]),  # 3.5 goes up
    ("rgrl", 5, 2, [2, 3]),  # 2.5 goes down
    # 0.5 goes down in steps 0, 4 and 6; in step 2 it is 3 * (1 - fp32(5/6)) = 0.50000006 and goes up.
    ("rgrl", 4, 8, [0, 1, 1, 0, 0, 1, 0, 1]),
    ("rgrl", 1, 3, [0, 0, 1]),
    ("rgrl", 128, 128, [1] * 128),
    # m // T each, one more in the first m % T
    ("uniform", 10, 4, [3, 3, 2, 2]),
    ("uniform", 7, 2, [4, 3]),
    ("uniform", 3, 5, [1, 1, 1, 0, 0]),
    ("uniform", 128, 128, [1] * 128),
]


@pytest.mark.parametrize(("schedule", "length", "steps", "expected"), BY_HAND)
def test_counts(models, schedule, length, steps, expected):
    assert counts(models, length, steps, schedule=schedule) == expected


@pytest.mark.parametrize(("schedule", "length", "steps", "expected"), BY_HAND)
def test_commit_count(schedule, length, steps, expected):
    left, got = length, []
    for step in range(steps):
        got.append(commit_count(schedule, left, step, steps))
        left -= got[-1]
    assert got == expected


@pytest.mark.parametrize(
    ("length", "steps", "block", "schedule", "expected"),
    [
        (8, 8, 4, "paper", [0, 1, 1, 2] * 2),
        (8, 8, 4, "uniform", [1] * 8),
        (7, 7, 3, "uniform", [2, 1, 2, 1, 1, 0, 0]),  # groups of 3, 3, 1 in steps [0, 2), [2, 4), [4, 7)
        (7, 7, 3, "rgrl", [2, 1, 2, 1, 0, 0, 1]),
        (5, 5, 1, "paper", [1] * 5),
        (5, 3, 2, "paper", [2, 2, 1]),
        # 3 steps, then 4; of the three 7 * (1 - r) is just below 3.5, as 1 - (1 - 1/3) is not 1/3 in fp32
        (20, 7, 10, "rgrl", [3, 3, 4, 2, 3, 2, 3]),
    ],
)
def test_blocks(models, length, steps, block, schedule, expected):
    assert counts(models, length, steps, schedule=schedule, block_length=block) == expected


@given(st.sampled_from(SCHEDULES), st.integers(1, 40), st.integers(1, 50), st.one_of(st.none(), st.integers(1, 40)))
def test_counts_of_the_method(models, schedule, length, steps, block):
    """Whatever the sizes: every position is committed once, in the steps of its block, left to right."""
    if block is not None and -(-length // block) > steps:
        with pytest.raises(ValueError, match="steps"):
            run(models, length, steps, schedule=schedule, block_length=block)
        return
    states = []
    output = run(models, length, steps, schedule=schedule, block_length=block, callback_on_step_end=states.append)
    options = method.Options(steps=steps, schedule=schedule, block_length=block)
    expected, members = {}, {}
    for group, first, n_steps in method.blocks([4] * length, options):
        left = len(group)
        for i in range(n_steps):
            n = method.commit_count(left, i, n_steps, schedule)
            left -= n
            if n:
                expected[first + i], members[first + i] = n, set(group)
        assert left == 0
    assert dict(zip(output.history.step, output.history.committed, strict=True)) == expected
    start = output.windows[0][0]
    for state in states:
        columns = (state.committed[0].nonzero().flatten() - start).tolist()
        assert len(columns) == expected[state.step]
        assert set(columns) <= members[state.step]
    assert not (output.sequences == 4).any()


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["maskgit_plus", "entropy"]), st.floats(0.0, 1.0))
def test_threshold_never_commits_less_than_the_schedule(models, length, steps, alg, quantile):
    threshold = quantile if alg == "maskgit_plus" else -4 * quantile
    output = run(models, length, steps, alg=alg, threshold=threshold, schedule="rgrl")
    left = length
    assert output.history.step == list(range(len(output.history.step)))
    assert len(output.history.step) <= steps
    for i, committed in enumerate(output.history.committed):
        assert committed >= max(1, method.commit_count(left, i, steps, "rgrl"))
        left -= committed
    assert left == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_origin_commits_by_its_noise_alone(models, schedule):
    """Every position in the first step whose draw chooses it, at the latest in the last."""
    length, steps, block = 13, 10, 5
    states = []
    output = run(
        models,
        length,
        steps,
        copies=3,
        schedule=schedule,
        alg="origin",
        block_length=block,
        callback_on_step_end=lambda state: states.append((state.step, state.committed.clone())),
    )
    start = output.windows[0][0]
    options = method.Options(steps=steps, schedule=schedule, block_length=block)
    made = dict(states)
    steps_made = set()
    for k, seed in enumerate(output.seeds[0].tolist()):
        for group, first, n_steps in method.blocks([4] * length, options):
            for position in group:
                for i in range(n_steps):
                    ratio = method.kept_noise(schedule, i, n_steps)
                    if i == n_steps - 1 or method.origin_commits(seed, first + i, start + position, ratio):
                        break
                assert made[first + i][k, start + position]
                steps_made.add(first + i)
    assert set(output.history.step) == steps_made, "steps in which nothing is drawn are skipped"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_origin_probabilities(models, schedule):
    """Of 1200 positions each is committed when its own draw says, so to about 1e-3 the probabilities are right; and
    the steps are distributed as t_j - t_{j+1}, within 4 sigma."""
    length, steps, copies = 100, 5, 12
    made = {}
    output = run(
        models,
        length,
        steps,
        copies=copies,
        schedule=schedule,
        alg="origin",
        callback_on_step_end=lambda state: made.update({state.step: state.committed.clone()}),
    )
    start, stop = output.windows[0]
    waiting = torch.ones(copies, length, dtype=torch.bool)
    kept = [method.kept_noise(schedule, i, steps) for i in range(steps - 1)] + [0.0]
    left = 1.0
    for step, ratio in enumerate(kept):
        keys = [[seed, step, -2, column] for seed in output.seeds[0].tolist() for column in range(start, stop)]
        noise = gumbel(torch.tensor(keys), torch.zeros(1, dtype=torch.long)).view(copies, length)
        # u < p, and the Gumbel noise of u falls as u grows
        drawn = waiting & ((noise > -math.log(-math.log(ratio))) if ratio else True)
        assert torch.equal(made[step][:, start:stop], drawn)
        waiting &= ~drawn
        share, left = left * (1 - ratio), left * ratio
        n = length * copies
        assert abs(int(drawn.sum()) - n * share) <= 4 * (n * share * (1 - share)) ** 0.5


def test_trajectories_of_their_own_length(models):
    """Ragged holes: each trajectory has its own schedule and its own blocks, on the shared steps."""
    prompts = ["the [MASK] [MASK] [MASK] [MASK] [MASK]", "[MASK] w1 [MASK]", "w2 [MASK]"]
    states = []
    generate(
        prompts,
        *models,
        seed=1,
        max_new_tokens=0,
        infill=True,
        steps=6,
        num_return_sequences=1,
        guidance="none",
        block_length=2,
        schedule="uniform",
        callback_on_step_end=lambda state: states.append((state.step, state.committed.sum(1).tolist())),
    )
    # Blocks of 2, 2, 1 in two steps each; of 2 in six; of 1 in six.
    assert states == [(0, [1, 1, 1]), (1, [1, 1, 0]), (2, [1, 0, 0]), (3, [1, 0, 0]), (4, [1, 0, 0])]


def sample():
    fields = dict.fromkeys(Sample._fields, torch.zeros(2))
    fields |= {"token": torch.tensor([2, -1]), "probability": torch.tensor([0.5, 0.2])}
    fields |= {"margin": torch.tensor([0.1, 0.3]), "filtered_entropy": torch.tensor([1.0, 2.0])}
    return Sample(**fields)


@pytest.mark.parametrize(
    ("alg", "source", "expected"),
    [
        ("entropy", "initial", [-3.0, -4.0]),
        ("entropy", "filtered", [-1.0, -2.0]),
        ("maskgit_plus", "initial", [0.5, 0.2]),
        ("topk_margin", "filtered", [0.1, 0.3]),
        ("anchor", "initial", [7.0, -5.0]),
    ],
)
def test_confidence(alg, source, expected):
    logits = torch.tensor([[1.0, 2.0, 7.0], [-5.0, 8.0, 9.0]], dtype=torch.bfloat16)
    got = confidence(alg, sample(), logits, torch.tensor([3.0, 4.0]), source)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_unknown_confidence():
    with pytest.raises(ValueError, match="'loudness'"):
        confidence("loudness", sample(), torch.zeros(2, 3), torch.zeros(2), "initial")


def test_origin_draws_once_a_step(monkeypatch):
    """The noise of a step costs hundreds of small operations, however many trajectories share them."""
    calls = []
    monkeypatch.setattr("entrgi.schedule.gumbel", lambda keys, ids: calls.append(len(keys)) or gumbel(keys, ids))
    columns = [list(range(20)), list(range(5, 30)), list(range(3))]
    steps = list(plan(columns, [1, -2, 2**40], SamplerConfig(alg="origin", steps=8), torch.device("cpu")))
    assert len(calls) <= 8
    assert calls[0] == 48
    assert sum(int(batch.counts.sum()) for step in steps for batch in step.batches) == 48
