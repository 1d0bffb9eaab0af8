"""The raw launchers with the signatures of ``entrgi_ext.reference``, run by a worker process on CPU tensors."""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class RawKernels:
    """One worker process; a failed launch raises RuntimeError with the findings and the next call starts anew."""

    def __init__(self, bindings: Path, prefix: list[str], environment: dict[str, str]):
        self.command = [*prefix, sys.executable, str(Path(__file__).with_name("worker.py")), str(bindings)]
        self.environment = environment
        self.process = None
        self.plan: dict = {}  # of the last launch
        self.overrides: dict = {}  # fields of PlanOverrides for every launch, such as {"kernel": "vocab_pass"}
        self.forced: dict = {}  # of the process that launches, by operator
        self.absent: dict[str, int] = {}
        self.absent_rows = 0

    @contextlib.contextmanager
    def first_row_absent(self, strides: dict[str, int], rows: int = 1):
        """The matrices named start at row ``rows``, and their rows are that many elements apart.

        The launch gets so many rows more than they have and pointers to a row 0 that is not there: those must be
        padding.
        """
        self.absent, self.absent_rows = strides, rows
        yield
        self.absent, self.absent_rows = {}, 0

    @contextlib.contextmanager
    def overridden(self, **overrides):
        """These overrides of the plan, and no others, for the launches inside."""
        before, self.overrides = self.overrides, overrides
        try:
            yield
        finally:
            self.overrides = before

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            status = self.process.wait()
            self.process = None
            if status != 0:
                self.log.seek(0)
                raise RuntimeError(f"the worker process ended with status {status}\n{self.log.read()[-4000:]}")

    def _start(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=self.environment
        )

    def launch(self, launcher: str, arguments: dict, reads: dict, writes: dict) -> None:
        """Launches on copies of the tensors and copies ``writes`` back; "new" tensors start unwritten.

        ``reads`` and ``writes`` map field names to tensors or None. A dense tensor in ``writes`` whose name is in
        ``arguments["new"]`` is given to the device as unwritten memory.
        """
        new = arguments.pop("new", ())
        arguments = arguments | self.overrides
        buffers = {}
        for name, tensor in {**reads, **writes}.items():
            if tensor is None:
                continue
            storage = _bytes_of(tensor)
            content = storage.numel() if name in new else storage.numpy().tobytes()
            before = self.absent_rows * self.absent.get(name, 0)
            offset = (tensor.storage_offset() - before) * tensor.element_size()
            buffers[name] = (content, offset, name in writes)
        if self.absent:
            arguments["n"] += self.absent_rows
            for name, stride in self.absent.items():
                arguments[f"{name}_stride"] = stride
                if name in ("output", "grad"):
                    arguments["target_rows"] += self.absent_rows
        request = pickle.dumps((launcher, arguments, buffers, self.forced))
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(struct.pack("<q", len(request)) + request)
            self.process.stdin.flush()
            header = self.process.stdout.read(8)
            answer = pickle.loads(self.process.stdout.read(struct.unpack("<q", header)[0])) if header else None
        except BrokenPipeError:
            answer = None
        if answer is None or answer[0] == "error":
            with contextlib.suppress(RuntimeError):
                self.close()
            self.log.seek(0)
            message = answer[1] if answer else "the worker process ended"
            raise RuntimeError(f"{launcher}: {message}\n{self.log.read()[-4000:]}")
        _, self.plan, contents = answer
        for name, content in contents.items():
            if len(content) > 0:
                _bytes_of(writes[name]).copy_(torch.frombuffer(content, dtype=torch.uint8))

    # ---- the operators ------------------------------------------------------------------------------------

    def _vocab_pass(self, launcher, logits, temperature, reads, splits, **arguments):
        n = logits.shape[0]
        # Unwritten on the device, and on this side something no test expects.
        f = [torch.full((n,), -12345.0) for _ in range(6)]
        i = [torch.full((n,), -12345, dtype=torch.long) for _ in range(2)]
        writes = {"logsumexp": f[0], "entropy": f[1], "tempered_entropy": f[2], "argmax": i[0]}
        if launcher == "sample_tokens":
            writes |= {"token": i[1], "probability": f[3], "margin": f[4], "filtered_entropy": f[5]}
        new = tuple(writes)
        error_flag = arguments.pop("error_flag", None)
        if error_flag is not None:
            writes["error_flag"] = error_flag
        self.launch(
            launcher,
            dict(**_logits_arguments(logits, temperature), splits=splits, new=new, **arguments),
            dict(logits=logits, **reads),
            writes,
        )
        return tuple(writes[name] for name in new)

    def logit_statistics(self, logits, temperature, splits=0):
        return self._vocab_pass("logit_statistics", logits, temperature, {}, splits)

    def sample_tokens(
        self,
        logits,
        keys,
        temperature,
        top_p=1.0,
        top_k=None,
        forbidden=None,
        error_flag=None,
        splits=0,
        forbidden_ids=None,
    ):
        reads = {"keys": keys, "forbidden": forbidden, "forbidden_ids": forbidden_ids}
        arguments = {"top_p": top_p, "top_k": top_k or 0, "error_flag": error_flag}
        if forbidden_ids is not None:
            arguments["num_forbidden"] = len(forbidden_ids)
        return self._vocab_pass("sample_tokens", logits, temperature, reads, splits, **arguments)

    def gumbel_perturb(self, logits, keys, scale, output=None):
        new = ("output",) if output is None else ()
        output = torch.full(logits.shape, -12345.0) if output is None else output
        arguments = _logits_arguments(logits, None)
        del arguments["temperature"]
        arguments |= {"scale": scale, "output_stride": output.stride(0), "new": new}
        self.launch("gumbel_perturb", arguments, {"logits": logits, "keys": keys}, {"output": output})
        return output

    def logit_statistics_backward(self, grads, logits, logsumexp, unit_logsumexp, entropy, tempered, temperature):
        gradient = torch.empty(logits.shape, dtype=logits.dtype)
        reads = dict(zip(("grad_logsumexp", "grad_entropy", "grad_tempered_entropy"), grads, strict=True))
        reads |= {"logits": logits, "logsumexp": logsumexp, "unit_logsumexp": unit_logsumexp}
        reads |= {"entropy": entropy, "tempered_entropy": tempered}
        arguments = dict(**_logits_arguments(logits, temperature), new=("gradient",))
        self.launch("logit_statistics_backward", arguments, reads, {"gradient": gradient})
        return gradient

    def relaxed_embedding(
        self,
        logits,
        logsumexp,
        embedding,
        hard_tokens,
        weight,
        temperature,
        rows=None,
        output=None,
        soft=None,
        splits=0,
    ):
        new = ()
        if output is None:
            output = torch.empty(logits.shape[0], embedding.shape[1], dtype=embedding.dtype)
            soft = torch.empty(output.shape)
            new = ("output", "soft")
        arguments = dict(
            **_logits_arguments(logits, temperature),
            **_embedding_arguments(embedding, soft),
            target_rows=output.shape[0],
            output_stride=output.stride(0),
            splits=splits,
            new=new,
        )
        reads = {"logits": logits, "logsumexp": logsumexp, "embedding": embedding}
        reads |= {"hard_tokens": hard_tokens, "weight": weight, "row_index": rows}
        self.launch("relaxed_embedding", arguments, reads, {"output": output, "soft": soft})
        return output, soft

    def _update(self, launcher, grad, logits, logsumexp, embedding, soft, rows, temperature, writes, **arguments):
        arguments |= _logits_arguments(logits, temperature) | _embedding_arguments(embedding, soft)
        arguments |= {"target_rows": grad.shape[0], "grad_stride": grad.stride(0)}
        for name, tensor in writes.items():
            if tensor is not None and name != "logits":
                arguments[f"{name}_stride"] = tensor.stride(0)
        reads = {
            "logits": logits,
            "logsumexp": logsumexp,
            "embedding": embedding,
            "soft": soft,
            "grad": grad,
            "row_index": rows,
        }
        self.launch(launcher, arguments, reads, writes)

    def logit_gradient(self, grad, logits, logsumexp, embedding, soft, rows, temperature, gradient=None):
        new = ("gradient",) if gradient is None else ()
        if gradient is None:  # in rows at 16-byte boundaries, as Hopper's kernel needs them
            n, vocab = logits.shape
            gradient = torch.empty(n, vocab + -vocab % 4)[:, :vocab]
        self._update(
            "logit_gradient", grad, logits, logsumexp, embedding, soft, rows, temperature,
            {"gradient": gradient}, new=new,
        )  # fmt: skip
        return gradient

    def adam_step_(
        self, logits, exp_avg, exp_avg_sq, grad, logsumexp, embedding, soft, rows, temperature, lr, beta1, beta2, eps,
        step, last, new=(),
    ):  # fmt: skip
        self._update(
            "adam_step", grad, logits, logsumexp, embedding, soft, rows, temperature,
            {"logits": logits, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq},
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step, last=last, new=new,
        )  # fmt: skip

    def sgd_step_(self, logits, grad, logsumexp, embedding, soft, rows, temperature, lr):
        self._update("sgd_step", grad, logits, logsumexp, embedding, soft, rows, temperature, {"logits": logits}, lr=lr)

    def commit_(
        self, tokens, committed, candidates, confidence, positions, splits, counts, keys, eos_token_id, alg_temp
    ):
        arguments = {
            "trajectories": tokens.shape[0],
            "length": tokens.shape[1],
            "tokens_stride": tokens.stride(0),
            "n": committed.shape[0],  # candidates may be fewer: rows of no trajectory are not read
            "has_eos": eos_token_id is not None,
            "eos_token_id": eos_token_id or 0,
            "alg_temp": alg_temp,
            "new": ("committed",),
        }
        reads = {"candidates": candidates, "confidence": confidence, "positions": positions}
        reads |= {"splits": splits, "counts": counts, "keys": keys}
        self.launch("commit", arguments, reads, {"tokens": tokens, "committed": committed})


def _logits_arguments(logits: Tensor, temperature: float) -> dict:
    n, vocab = logits.shape
    return {
        "logits_dtype": NAMES[logits.dtype],
        "n": n,
        "vocab": vocab,
        "logits_stride": logits.stride(0),
        "temperature": temperature,
    }


def _embedding_arguments(embedding: Tensor, soft: Tensor) -> dict:
    return {
        "embedding_dtype": NAMES[embedding.dtype],
        "dim": embedding.shape[1],
        "embedding_stride": embedding.stride(0),
        "soft_stride": soft.stride(0),
    }
