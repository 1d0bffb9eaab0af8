"""One call of an operator in the simulator, and what its launch plan and its floor say of it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from simulated_traffic.shapes import Shape  # noqa: E402
from support.build_simulated import build_bindings, simulator_command  # noqa: E402
from support.raw_kernels import RawKernels  # noqa: E402

BUILDS = {"compute_80": 80, "compute_90a": 90}
SM_COUNT = 132  # of the simulated device
TEMPERATURE, TOP_P = 0.7, 0.95


@dataclass
class Counted:
    """A shape's launches on one build, as the simulator counted them, what was planned and the floor."""

    shape: Shape
    build: str
    plan: dict
    launches: list[dict]
    planned: dict = field(default_factory=dict)
    floor: dict = field(default_factory=dict)

    def total(self, *names: str) -> int:
        return sum(launch[name] for launch in self.launches for name in names)

    @property
    def issued(self) -> dict[str, int]:
        """As ``_bindings.requests`` names them."""
        return {
            "load_bytes": self.total("global_load_bytes", "cp_async_bytes"),
            "bulk_bytes": self.total("tma_load_bytes", "tma_store_bytes"),
            "store_bytes": self.total("global_store_bytes"),
            "flops": self.total("mma_flop", "wgmma_flop"),
        }

    @property
    def touched_by_loads(self) -> int:
        """Bytes that are asked for, of each launch; by sectors where that is less, as a word for a whole warp is."""
        by_threads = sum(min(one["global_load_bytes"], 32 * one["global_load_sectors"]) for one in self.launches)
        return by_threads + self.total("cp_async_bytes", "tma_load_bytes")

    @property
    def stored(self) -> int:
        return self.total("global_store_bytes", "tma_store_bytes")


class Simulator:
    """Runs shapes on one build; close it afterwards.

    Raises:
        Unavailable: the simulator, nvcc or a header it needs is not on this machine.
    """

    def __init__(self, build: str):
        command, environment = simulator_command()
        self.build, self.bindings, self.environment = build, build_bindings(build), environment
        self.folder = tempfile.TemporaryDirectory()
        self.statistics = Path(self.folder.name) / "launches.jsonl"
        self.statistics.touch()
        self.prefix = [command[0], "--stats", str(self.statistics)]  # without --check, which takes several times longer
        self.kernels = RawKernels(self.bindings, self.prefix, environment)

    def count(self, shape: Shape) -> Counted:
        before = len(self.statistics.read_text().splitlines())
        launch(self.kernels, shape)
        lines = self.statistics.read_text().splitlines()[before:]
        return Counted(shape, self.build, self.kernels.plan, [json.loads(line) for line in lines])

    def ask(self, counted: list[Counted]) -> None:
        """Fills in plan requests and floors, in a process of its own that holds the same bindings."""
        questions = [
            {
                "shape": [c.shape.operator, c.shape.N, c.shape.V, c.shape.d, c.shape.logits, c.shape.embedding],
                "options": dict(c.shape.options),
                "device": {"arch": BUILDS[self.build], "num_sms": SM_COUNT},
                "alignment": {} if c.shape.aligned else {"logits_aligned": False},
            }
            for c in counted
        ]
        command = [self.prefix[0], sys.executable, "-c", ASK, str(self.bindings)]
        run = subprocess.run(
            command, input=json.dumps(questions), capture_output=True, text=True, env=self.environment, check=True
        )
        for each, answer in zip(counted, ast.literal_eval(run.stdout), strict=True):
            each.floor, each.planned = answer["floor"], answer["requests"]

    def close(self) -> None:
        self.kernels.close()
        self.folder.cleanup()


ASK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_bindings", sys.argv[1])
b = importlib.util.module_from_spec(spec)
spec.loader.exec_module(b)
answers = []
for q in json.load(sys.stdin):
    requests = b.requests(*q["shape"], **q["options"], **q["device"], **q["alignment"])
    answers.append({"floor": b.floor(*q["shape"], **q["options"]), "requests": requests})
print(answers)
"""


def launch(kernels: RawKernels, shape: Shape) -> None:
    """One call on random inputs."""
    torch.manual_seed(0)
    n, v, d = shape.N, shape.V, shape.d
    z = torch.randn(n, v).mul_(3.0).to(getattr(torch, shape.logits))
    keys = torch.zeros(n, 4, dtype=torch.long)
    keys[:, 3] = torch.arange(n)
    if shape.operator == "logit_statistics":
        kernels.logit_statistics(z, TEMPERATURE)
        return
    if shape.operator == "sample_tokens":
        kernels.sample_tokens(z, keys, TEMPERATURE, TOP_P)
        return
    if shape.operator == "gumbel_perturb":
        kernels.gumbel_perturb(z, keys, TEMPERATURE)
        return
    if shape.operator == "logit_statistics_backward":
        row = torch.ones(n)
        kernels.logit_statistics_backward((row, row, row), z, row, row, row, row, TEMPERATURE)
        return
    lse = (z.float() / TEMPERATURE).logsumexp(dim=1)
    e = torch.randn(v, d).to(getattr(torch, shape.embedding))
    if shape.operator == "relaxed_embedding":
        kernels.relaxed_embedding(z, lse, e, torch.randint(v, (n,)), torch.rand(n), TEMPERATURE)
        return
    g, soft = torch.randn(n, d).to(e.dtype), torch.randn(n, d)
    inputs = (g, z, lse, e, soft, None, TEMPERATURE)
    if shape.operator == "logit_gradient":
        kernels.logit_gradient(*inputs)
    elif shape.operator == "sgd_step_":
        z = z.clone()
        kernels.sgd_step_(z, g, lse, e, soft, None, TEMPERATURE, 0.5)
    else:
        options = dict(shape.options)
        moments = torch.randn(n, v), torch.rand(n, v)
        if options == {"step": 1, "last": True}:
            moments = None, None
        rest = (0.5, 0.9, 0.999, 1e-8, options["step"], options["last"])
        kernels.adam_step_(z, *moments, g, lse, e, soft, None, TEMPERATURE, *rest)
