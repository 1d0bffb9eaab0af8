"""What the CUDA kernels ask of the memory system, counted in a simulator: ``benchmarks/simulated.py`` on few shapes."""

import copy
import sys

import pytest
from build_simulated import ROOT, Unavailable

sys.path.insert(0, str(ROOT / "benchmarks"))
import simulated
from simulated import FP32, MIXED, Shape, adam

SHAPES = [
    Shape("logit_statistics", 1, 61_440),
    Shape("logit_statistics", 150, 4096),
    Shape("logit_statistics", 8, 20_001, **MIXED),
    Shape("sample_tokens", 8, 16_384),
    Shape("gumbel_perturb", 4, 20_000),
    Shape("relaxed_embedding", 16, 8192, 256),
    Shape("relaxed_embedding", 130, 4096, 256),
    Shape("relaxed_embedding", 17, 4095, 264),
    Shape("relaxed_embedding", 16, 4096, 256, **FP32),
    Shape("logit_gradient", 64, 4096, 256),
    adam(16, 8192, 256),
    adam(130, 4096, 256, step=1),
    adam(130, 4096, 256, last=True),
    adam(17, 4095, 264),
    adam(16, 4096, 256, **MIXED),
    Shape("sgd_step_", 16, 4096, 256),
]


@pytest.fixture(scope="module", params=simulated.BUILDS)
def counted(request):
    """Every shape, run on one build."""
    try:
        simulator = simulated.Simulator(request.param)
    except Unavailable as reason:
        pytest.skip(f"CUDA kernels cannot be run here: {reason}")
    results = [simulator.count(shape) for shape in SHAPES]
    simulator.ask(results)
    simulator.close()
    return {str(each.shape): each for each in results}


@pytest.mark.simulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_issued_is_what_is_planned(counted, shape):
    each = counted[str(shape)]
    if each.planned is None:
        pytest.skip("these bindings do not state requests")
    if (shape.operator, each.plan["kernel"]) in simulated.DEPENDS_ON_DATA:
        pytest.skip("what the filter reads again depends on the data")
    assert each.planned["plan"] == each.plan
    assert simulated.against_the_plan(each) == []


@pytest.mark.simulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_are_touched_once(counted, shape):
    assert simulated.once(counted[str(shape)]) == []


@pytest.mark.simulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accesses_suit_the_hardware(counted, shape):
    assert simulated.hardware(counted[str(shape)]) == []


LAUNCH = {
    "kernel": "_ZN6entrgi12_GLOBAL__N_124logit_update_sm90_kernelI13__nv_bfloat16EEvi",
    "grid": [4, 1, 1],
    "warp_inst": {"alu_int": 1000},
    "global_load_bytes": 600_000,
    "global_load_sectors": 18_750,
    "global_load_efficiency": 1.0,
    "global_store_bytes": 655_360,
    "global_store_sectors": 20_480,
    "global_store_efficiency": 1.0,
    "cp_async_bytes": 0,
    "cp_async_sectors": 0,
    "tma_load_bytes": 4_300_000,
    "tma_store_bytes": 0,
    "shared_load_wavefronts": 1000,
    "shared_load_conflict_degree": 1.0,
    "shared_store_wavefronts": 1000,
    "shared_store_conflict_degree": 1.0,
    "ldmatrix_conflict_degree": 1.0,
    "mma_flop": 0,
    "ex2_count": 65_536,
    "lane_instructions": 6_553_600,
    "wgmma_flop": 268_435_456,
}
PLANNED = {"load_bytes": 600_000, "bulk_bytes": 4_300_000, "store_bytes": 655_360, "flops": 268_435_456}


def made_up(**changes):
    """An Adam step, N = 8, V = 8192, d = 256, all as it should be."""
    plan = {"kernel": "logit_update_sm90", "tile": (64, 256, 64), "splits": 1}
    launch = {**copy.deepcopy(LAUNCH), **changes}
    return simulated.Counted(adam(8, 8192, 256), "compute_90a", plan, [launch], PLANNED, {"bytes": 1, "flops": 1})


def test_nothing_is_said_where_all_is_well():
    assert simulated.complaints(made_up()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tma_load_bytes": 4_400_000}, "bulk_bytes: issued 4400000, planned 4300000"),
        ({"wgmma_flop": 300_000_000}, "flops: issued"),
        ({"tma_load_bytes": 8_600_000}, "reads 9200000 bytes"),
        ({"global_store_bytes": 700_000}, "writes 700000 bytes"),
        ({"global_store_efficiency": 0.5}, "of the touched sectors' bytes"),
        ({"shared_load_conflict_degree": 4.0}, "4.0-way bank conflicts of shared_load"),
        ({"ldmatrix_conflict_degree": 8.0}, "8.0-way bank conflicts of ldmatrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_fault_is_found(changes, words):
    found = simulated.complaints(made_up(**changes))
    assert any(words in complaint for complaint in found), found


def test_a_kernel_is_called_by_its_own_name():
    assert simulated.kernel_name(LAUNCH["kernel"]) == "logit_update_sm90_kernel"


def test_the_table_has_a_line_for_each_kernel_and_their_sum():
    rows = simulated.rows(made_up())
    assert [row["kernel"] for row in rows] == ["logit_update_sm90_kernel", "all"]
    assert rows[1]["planned_flops"] == PLANNED["flops"]
    assert "| 0.0% |" in simulated.markdown(rows)
