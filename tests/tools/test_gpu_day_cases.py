"""What the GPU day checks and measures: cases from the launch plans, and the judgement of a result."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "benchmarks"), str(ROOT / "tools" / "gpu_day" / "children")]
import judge  # noqa: E402
import plan_variants as variants  # noqa: E402
from avoid import avoided  # noqa: E402
from gpu_day import shapes  # noqa: E402
from operator_bench import ours  # noqa: E402
from operator_bench.cases import CHECKED_SGD_LR, OPERATORS, Case, Inputs  # noqa: E402

CPU = torch.device("cpu")
FIELDS = ("kernel", "block_m", "block_n", "cluster_m", "cluster_n")


def identity(plan):
    return tuple(plan[name] for name in FIELDS)


def all_variants(small=False):
    return [variant for family in variants.FAMILIES for variant in variants.variants(family, 90, small)]


@pytest.fixture(scope="module")
def found():
    return all_variants()


def test_every_plan_that_is_timed_was_checked_small(found):
    """Kernel, tile, cluster and dtypes of all cases of the benches, by operator."""
    checked = {(v.plan["op"], identity(v.plan), v.case.logits, v.case.embedding) for v in found}
    real = shapes.real()
    timed = [*real.bench, *(case for case, *_ in (*real.main, *real.draws, *real.steps))]
    for case in (Case(**each) for each in timed):
        for part in range(len(case.what.parts)):
            plan = variants.plan_of(case, 90, part)
            embedding = case.embedding if plan["op"] not in ("sample_tokens", "logit_statistics") else case.logits
            assert (plan["op"], identity(plan), case.logits, embedding) in checked, (case, plan)


def test_forced_plans_can_be_had():
    """Each asks for something, and for something else than its neighbours."""
    real, seen = shapes.real(), set()
    for each in real.forced:
        operator, _, fields = each.plan.partition(":")
        options = {name: int(v) if v.isdigit() else v for name, v in (f.split("=") for f in fields.split(","))}
        case = Case(**each.case)
        plan = variants.plan_of(case, 90, **options)
        assert plan["op"] == operator
        assert all(plan[name] == value for name, value in options.items())
        seen.add((case, identity(plan)))
    assert len(seen) == len(real.forced)


def test_cases_are_what_plans_accept_and_cover_tiles_clusters_and_dtypes(found):
    assert len({variant.name for variant in found}) == len(found)
    for variant in found:
        options = {"logits_aligned": variant.aligned, **variant.overrides}
        assert variants.plan_of(variant.case, 90, **options) == variant.plan
        assert variant.case.V <= 2000
        assert variant.case.N <= 800
    kernels = {variant.plan["kernel"] for variant in found}
    assert {name.rsplit("_", 1)[-1] for name in kernels} >= {"sm90", "sm80", "simt", "commit"}
    embed = [v for v in found if v.plan["kernel"] == "relaxed_embedding_sm90"]
    assert {v.plan["cluster_m"] for v in embed} == {1, 2, 4}
    assert len({v.plan["block_m"] for v in embed}) > 1
    assert {(v.case.logits, v.case.embedding) for v in embed} >= {("bfloat16",) * 2, ("float32", "bfloat16")}
    assert {v.aligned for v in found} == {True, False}
    # A cluster has whole row tiles to share, not padding alone.
    assert all(v.plan["block_m"] * v.plan["cluster_m"] <= v.case.N for v in embed)


def test_the_most_telling_cases_come_first_and_small_ones_are_few(found):
    order = [(variant.rank, variant.case.N) for variant in variants.variants("embedding", 90, False)]
    assert order == sorted(order)
    first = [variant for variant in found if variant.rank == 0]
    assert {v.plan["kernel"] for v in first} >= {v.plan["kernel"] for v in found if v.case.embedding == "bfloat16"}
    small = all_variants(small=True)
    assert len(small) < 40
    assert {v.plan["kernel"] for v in small} == {v.plan["kernel"] for v in found}


@pytest.mark.parametrize("arch", [100, 90, 80])
def test_every_architecture_has_cases(arch):
    for family in variants.FAMILIES:
        assert variants.variants(family, arch, small=True)


# ---- right or wrong --------------------------------------------------------------------------------------------


def results_of(operator, logits="bfloat16"):
    what = OPERATORS[operator]
    d = 24 if what.products else 0
    case = (
        Case(operator, 9, 300, d, logits, logits) if what.has_vocabulary else Case(operator, 9, 0, 0, *["float32"] * 2)
    )
    x = Inputs(case, CPU, lr=CHECKED_SGD_LR if operator == "sgd_step" else 0.5)
    return x, ours.CALLS[operator](x, 0)()


SINGLE = [operator for family in variants.FAMILIES.values() for operator in family]


@pytest.mark.parametrize("logits", ["bfloat16", "float32"])
@pytest.mark.parametrize("operator", SINGLE)
def test_right_results_are_right(operator, logits):
    answer = judge.judge(*results_of(operator, logits))
    assert answer["status"] == "right", answer


def last_row(tensor):
    tensor[-1] = -tensor[-1] - 1


def not_a_number(tensor):
    tensor.view(-1)[3] = torch.nan


def one_column(tensor):
    tensor[:, 5:6] = 0


@pytest.mark.parametrize(
    ("operator", "name", "spoil"),
    [
        ("logit_statistics", "entropy", last_row),
        ("logit_statistics", "argmax", last_row),
        ("logit_statistics", "logsumexp", not_a_number),
        ("sample_tokens", "token", last_row),
        ("relaxed_embedding", "soft", last_row),
        ("relaxed_embedding", "soft", one_column),
        ("relaxed_embedding", "output", not_a_number),
        ("logit_gradient", "gradient", last_row),
        ("adam_step_middle", "logits", last_row),
        ("adam_step_middle", "exp_avg", not_a_number),
        ("adam_step_first", "exp_avg", last_row),
        ("adam_step_last", "logits", not_a_number),
        ("sgd_step", "logits", last_row),
        ("gumbel_perturb", "perturbed", last_row),
        ("commit", "tokens", last_row),
    ],
)
def test_wrong_results_are_wrong(operator, name, spoil):
    x, results = results_of(operator, "float32")
    spoil(results[name])
    answer = judge.judge(x, results)
    assert answer["status"] == "wrong"
    assert answer["why"]


def test_one_wrong_row_of_many_is_seen():
    """Over all rows together it would pass: the bound of the worst row is its own."""
    case = Case("relaxed_embedding", 600, 300, 24, "bfloat16", "bfloat16")
    x = Inputs(case, CPU)
    results = ours.CALLS["relaxed_embedding"](x, 0)()
    results["soft"][17] *= 1.1
    answer = judge.judge(x, results)
    assert answer["status"] == "wrong"
    assert answer["errors"]["soft"] < 1e-2


def test_other_tokens_than_the_reference_are_counted():
    x, results = results_of("sample_tokens", "float32")
    second = x.logits[0].topk(2, dim=1).indices[:, 1]
    token = results["token"]
    moved = torch.where(token == second, x.logits[0].argmax(dim=1), second)
    results["token"] = torch.where(torch.arange(9) < 1, moved, token)
    assert judge.judge(x, results)["status"] == "right"  # one may be a matter of rounding
    results["token"] = moved
    answer = judge.judge(x, results)
    assert answer["status"] == "wrong"
    assert "9 of 9 tokens" in answer["why"]


def test_what_is_avoided_is_matched_field_by_field():
    case = Case("relaxed_embedding", 7, 300, 24, "bfloat16", "float16")
    plan = {"op": "relaxed_embedding", "kernel": "k", "block_m": 64, "cluster_m": 2}
    assert avoided(plan, case, []) == ""
    assert avoided(plan, case, [{"kernel": "k", "why": "hang"}]) == "hang"
    assert avoided(plan, case, [{"kernel": "k", "block_m": 64, "embedding": "float16", "why": "wrong"}]) == "wrong"
    assert avoided(plan, case, [{"kernel": "k", "block_m": 128, "why": "hang"}]) == ""
    assert avoided(plan, case, [{"kernel": "k", "embedding": "bfloat16", "why": "wrong"}]) == ""


def test_the_first_of_equal_maxima_is_asked_for():
    z = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    assert judge._first_maximum(z).tolist() == [1, 0, 3]
