"""Raw launchers of the kernels, each under a forced plan, on small inputs; right or wrong by fp64.

Launches happen in a process of their own (``tests/support/worker.py``), on the GPU or in the simulator.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch  # noqa: E402
from avoid import announce, avoided  # noqa: E402
from judge import judge  # noqa: E402
from operator_bench.cases import BETAS, CHECKED_LR, CHECKED_SGD_LR, EPS, STEP, TEMPERATURE, TOP_P, Case, Inputs  # noqa: E402
from plan_variants import FAMILIES, fields_of, variants  # noqa: E402
from serve import Answers, serve  # noqa: E402

from support.cases import placed  # noqa: E402
from support.raw_kernels import RawKernels, _bytes_of  # noqa: E402

ADAM = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}


class Launchers(RawKernels):
    """Says which process holds the device; memory that a kernel must write begins as NaN."""

    def _start(self) -> None:
        super()._start()
        answers.note(device_pid=self.process.pid)

    def launch(self, launcher: str, arguments: dict, reads: dict, writes: dict) -> None:
        for name in arguments.pop("new", ()):
            if writes[name] is not None:
                _bytes_of(writes[name]).fill_(0xFF)
        super().launch(launcher, arguments, reads, writes)


def launched(x: Inputs, aligned: bool) -> dict[str, torch.Tensor]:
    """Results of one launch of the case's operator, by name."""
    operator, k = x.case.operator, kernels
    if operator == "commit":
        given = [x.commit[name] for name in ("candidates", "confidence", "positions", "splits", "counts")]
        tokens, committed = x.commit["tokens"].clone(), torch.empty(x.case.N, dtype=torch.bool)
        k.commit_(tokens, committed, *given, None, None, 0.0)
        return {"tokens": tokens}
    z = x.logits[0].clone() if aligned else placed(x.logits[0], 1, 1)
    if operator == "logit_statistics":
        names = ("logsumexp", "entropy", "tempered_entropy", "argmax")
        return dict(zip(names, k.logit_statistics(z, TEMPERATURE), strict=True))
    if operator == "sample_tokens":
        names = ("logsumexp", "entropy", "tempered_entropy", "argmax", "token")
        drawn = k.sample_tokens(z, x.keys, TEMPERATURE, TOP_P)
        return dict(zip(names, drawn, strict=False))
    if operator == "gumbel_perturb":
        return {"perturbed": k.gumbel_perturb(z, x.keys, TEMPERATURE)}
    lse = x.logsumexp[0]
    if operator == "relaxed_embedding":
        results = k.relaxed_embedding(z, lse, x.embedding, x.tokens, x.weight, TEMPERATURE)
        return dict(zip(("output", "soft"), results, strict=True))
    rest = (lse, x.embedding, x.soft, None, TEMPERATURE)
    if operator == "logit_gradient":
        return {"gradient": k.logit_gradient(x.grad, z, *rest)}
    if operator == "sgd_step":
        k.sgd_step_(z, x.grad, *rest, x.lr)
        return {"logits": z}
    m, v = x.moments(torch.float32)
    first, last = operator == "adam_step_first", operator == "adam_step_last"
    new = ("exp_avg", "exp_avg_sq") if first else ()
    k.adam_step_(z, m, v, x.grad, *rest, lr=x.lr, step=1 if first else STEP, last=last, new=new, **ADAM)
    return {"logits": z} if last else {"logits": z, "exp_avg": m}


def enumerate_all(arch: int, small: bool) -> dict:
    """The cases of every family, the most telling ones first."""
    found = [(family, variant) for family in FAMILIES for variant in variants(family, arch, small)]
    found.sort(key=lambda pair: (pair[1].rank, pair[1].case.N))
    return {"status": "right", "cases": [{"family": family, **variant.as_dict()} for family, variant in found]}


def check(variant: dict, avoid: list[dict], planted: str = "") -> dict:
    """``planted``: what goes wrong in a dry run; a stopped process answers as little as a kernel that hangs."""
    case, plan = Case(**variant["case"]), variant["plan"]
    announce([plan], case, answers)
    if why := avoided(plan, case, avoid):
        return {"status": "skipped", "why": why}
    x = Inputs(case, torch.device("cpu"), lr=CHECKED_SGD_LR if case.operator == "sgd_step" else CHECKED_LR)
    if planted == "hang":
        if kernels.process is None:
            kernels._start()
        os.kill(kernels.process.pid, signal.SIGSTOP)
    kernels.overrides = variant["overrides"]
    results = launched(x, variant["aligned"])
    if planted == "wrong":
        next(iter(results.values()))[-1] += 50
    ran = fields_of(*(kernels.plan[name] for name in ("kernel", "tile", "cluster", "splits")))
    answer = judge(x, results)
    # What was not asked for depends on the device.
    if any(ran[name] != value for name, value in {"kernel": plan["kernel"], **variant["overrides"]}.items()):
        answer = {**answer, "status": "wrong", "why": f"another plan ran: {ran}"}
    return answer


def findings() -> dict:
    """Ends the worker: under a tool such as compute-sanitizer its exit status says whether it found something."""
    try:
        kernels.close()
    except RuntimeError as failure:
        return {"status": "wrong", "why": str(failure)[-3000:]}
    return {"status": "right"}


if __name__ == "__main__":
    answers = Answers()
    torch.set_num_threads(int(os.environ.get("GPU_DAY_THREADS", "1")))
    prefix = shlex.split(os.environ.get("GPU_DAY_PREFIX", ""))
    bindings = Path(os.environ["GPU_DAY_BINDINGS"])
    if bindings.is_dir():
        bindings = bindings / f"_bindings{sysconfig.get_config_var('EXT_SUFFIX')}"
    kernels = Launchers(bindings, prefix, dict(os.environ))
    serve(answers, {"enumerate": enumerate_all, "check": check, "findings": findings})
