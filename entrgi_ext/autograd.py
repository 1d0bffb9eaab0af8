"""Derivatives of the operators: computed in the logits, refused by name in everything else, never zero in silence.

===========================  =======================================================================================
``logit_statistics``         backward in ``logits``
``relaxed_embedding``        backward in ``logits``; no other argument may require grad
``gumbel_perturb``           backward in ``logits`` (the identity)
``sample_tokens`` and the    results may be used as constants (``detach``); a backward pass that reaches one raises
backward operators
those that write in place    take no part: what they read must not require grad, what they write must be a leaf
===========================  =======================================================================================

Forward mode (``torch.func.jvp``, ``torch.autograd.forward_ad``) raises for all of them. ``torch.func.grad``, ``vjp``
and ``jacrev`` work as the backward does, ``torch.vmap`` calls an operator once for each element of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched, _unwrap_for_grad, maybe_get_level
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from .fakes import FAKES

_ops = torch.ops.entrgi
_below_autograd = torch._C._AutoDispatchBelowAutograd


def call(operator, *args):
    """``operator(*args)``; where no derivative is recorded, without a way through the Python kernel for autograd."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
    ):
        return operator(*args)
    with _below_autograd():
        return operator(*args)


# ---- what is refused -----------------------------------------------------------------------------------------


def _refuse_forward_mode(name: str, argument: str):
    raise RuntimeError(
        f"entrgi::{name} has no forward-mode derivative in {argument} (torch.func.jvp, torch.autograd.forward_ad): "
        f"use reverse mode, or pass {argument}.detach()"
    )


def _refuse_gradient(name: str, argument: str, instead: str = ""):
    raise RuntimeError(
        f"{argument} must not require grad: entrgi::{name} has no derivative in it; {instead}pass {argument}.detach()"
    )


def _has_tangent(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None


class _Operator:
    """What the kernels need to know of one operator."""

    def __init__(self, name: str):
        self.name = name
        self.overload = getattr(_ops, name).default
        arguments, self.returns = self.overload._schema.arguments, self.overload._schema.returns
        self.arguments = [argument.name for argument in arguments]
        self.defaults = tuple(a.default_value if a.has_default_value() else None for a in arguments)
        self.written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]

    def all(self, args: tuple) -> tuple:
        """The arguments of a call: torch leaves those out that end it and are their defaults."""
        return (*args, *self.defaults[len(args) :])

    def refuse_tangents(self, args) -> None:
        if forward_ad._current_level < 0:
            return
        for argument, x in zip(self.arguments, args, strict=True):
            if _has_tangent(x):
                _refuse_forward_mode(self.name, argument)

    def refuse_gradients(self, args) -> None:
        """Of an operator that writes in place and is in no graph."""
        for argument, x, written in zip(self.arguments, args, self.written, strict=True):
            if isinstance(x, Tensor) and x.requires_grad and not (written and x.is_leaf):
                instead = "" if written or self.name != "relaxed_embedding_" else "take relaxed_embedding, or "
                _refuse_gradient(self.name, argument, instead)


# ---- backward ------------------------------------------------------------------------------------------------


def _function(operator: _Operator, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The operator as an autograd.Function, which torch.func can transform, too.

    ``save(ctx, given, output)`` has the arguments by name; ``backward`` gives the gradient in the logits or, where
    there is none, None.
    """

    def forward(*args):
        with _below_autograd():
            return operator.overload(*args)

    def setup_context(ctx, inputs, output):
        ctx.needed = [name for name, needed in zip(operator.arguments, ctx.needs_input_grad, strict=False) if needed]
        save(ctx, SimpleNamespace(**dict(zip(operator.arguments, inputs, strict=True))), output)

    def in_every_argument(ctx, *grads):
        gradient = backward(ctx, *grads)
        return tuple(gradient if name == "logits" else None for name in operator.arguments)

    def jvp(ctx, *tangents):  # of a transform outside of the innermost
        _refuse_forward_mode(
            operator.name, operator.arguments[next(i for i, t in enumerate(tangents) if t is not None)]
        )

    members = {"forward": forward, "setup_context": setup_context, "backward": in_every_argument, "jvp": jvp}
    return type(
        f"entrgi_{operator.name}",
        (torch.autograd.Function,),
        {"generate_vmap_rule": True, **{key: staticmethod(member) for key, member in members.items()}},
    )


def _save_statistics(ctx, given, output):
    ctx.temperature = given.temperature
    ctx.save_for_backward(given.logits, *output[:3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _statistics_backward(ctx, grad_logsumexp, grad_entropy, grad_tempered_entropy, grad_argmax):
    grads = (grad_logsumexp, grad_entropy, grad_tempered_entropy)
    if all(grad is None for grad in grads):
        return None
    logits, logsumexp, entropy, tempered_entropy = ctx.saved_tensors
    unit_logsumexp = logsumexp
    if grad_entropy is not None and ctx.temperature != 1.0:
        unit_logsumexp = _ops.logit_statistics(logits, 1.0)[0]
    return _ops.logit_statistics_backward(
        *grads, logits, logsumexp, unit_logsumexp, entropy, tempered_entropy, ctx.temperature
    )


def _save_embedding(ctx, given, output):
    ctx.temperature = given.temperature
    for argument in ctx.needed:
        if argument != "logits":
            _refuse_gradient("relaxed_embedding", argument)
    ctx.save_for_backward(given.logits, given.logsumexp, given.embedding, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _embedding_backward(ctx, grad_output, grad_soft):
    if grad_output is None:
        return None
    logits, logsumexp, embedding, soft = ctx.saved_tensors
    # logsumexp is a function of the logits: its part is in softmax's own gradient, not in an argument's.
    gradient = _ops.logit_gradient(grad_output.contiguous(), logits, logsumexp, embedding, soft, None, ctx.temperature)
    return gradient.to(logits.dtype)


def _save_dtype(ctx, given, output):
    ctx.dtype = given.logits.dtype


def _perturb_backward(ctx, grad):
    return grad.to(ctx.dtype)


def _save_nothing(ctx, given, output):
    ctx.set_materialize_grads(False)


def _no_backward(operator: _Operator, instead: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"entrgi::{operator.name} has no derivative in {', '.join(ctx.needed)}: {instead}")

    return backward


def _formulas(operator: _Operator) -> tuple[Callable, Callable] | None:
    """What an operator saves, and its backward; None where it writes in place."""
    no_double_backward = (_save_nothing, _no_backward(operator, "double backward is not supported"))
    constants = "take its results with .detach(), and statistics to differentiate from logit_statistics"
    return {
        "logit_statistics": (_save_statistics, _statistics_backward),
        "logit_statistics_backward": no_double_backward,
        "relaxed_embedding": (_save_embedding, _embedding_backward),
        "logit_gradient": no_double_backward,
        "gumbel_perturb": (_save_dtype, _perturb_backward),
        "sample_tokens": (_save_nothing, _no_backward(operator, constants)),
    }.get(operator.name)


# ---- the kernels ---------------------------------------------------------------------------------------------


def _autograd_kernel(operator: _Operator, function: type[torch.autograd.Function] | None):
    def kernel(keys, *args):
        args = operator.all(args)
        operator.refuse_tangents(args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if function is not None:
                return function.apply(*args)
            operator.refuse_gradients(args)
        with _below_autograd():
            return operator.overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return kernel


def _mapped(operator: _Operator, interpreter, args):
    """The operator for each element of the batch, stacked."""
    level = interpreter.level()
    unwrapped = [_unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None) for x in args]
    with interpreter.lower():
        if all(dim is None for _, dim in unwrapped):
            return operator.overload(*args)
        batched_and_written = any(
            dim is not None and written for (_, dim), written in zip(unwrapped, operator.written, strict=True)
        )
        if batched_and_written or not operator.returns:  # the elements would overwrite each other's results
            raise RuntimeError(f"entrgi::{operator.name} writes in place and does not support torch.vmap")
        columns = [x.unbind(dim) if dim is not None else x for x, dim in unwrapped]
        batched = [dim is not None for _, dim in unwrapped]
        size = next(len(column) for column, is_batched in zip(columns, batched, strict=True) if is_batched)
        results = [
            operator.overload(*(x[i].contiguous() if b else x for x, b in zip(columns, batched, strict=True)))
            for i in range(size)
        ]
        if isinstance(results[0], Tensor):
            stacked = torch.stack(results)
        else:
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    if isinstance(stacked, Tensor):
        return _add_batch_dim(stacked, 0, level)
    return tuple(_add_batch_dim(part, 0, level) for part in stacked)


def _transformed(operator: _Operator, function: type[torch.autograd.Function] | None):
    """Inside of torch.func's transforms, of which this sees the innermost."""

    def kernel(*args):
        args = operator.all(args)
        interpreter = retrieve_current_functorch_interpreter()
        kind = interpreter.key()
        if kind == TransformType.Vmap:
            return _mapped(operator, interpreter, args)
        if kind == TransformType.Functionalize:
            raise RuntimeError(f"entrgi::{operator.name} does not support torch.func.functionalize")
        here = [isinstance(x, Tensor) and maybe_get_level(x) == interpreter.level() for x in args]
        if not any(here):  # a constant of this transform
            with interpreter.lower():
                return operator.overload(*args)
        level = interpreter.level()
        inner = [_unwrap_for_grad(x, level) if is_here else x for x, is_here in zip(args, here, strict=True)]
        if kind == TransformType.Jvp:
            operator.refuse_tangents(args)
        if function is not None:
            return function.apply(*args)
        for argument, x, is_here in zip(operator.arguments, args, here, strict=True):
            if is_here and x.requires_grad:  # what is written, too: the function's argument would change
                _refuse_gradient(operator.name, argument)
        with interpreter.lower():
            return operator.overload(*inner)

    return kernel


_library = torch.library.Library("entrgi", "FRAGMENT")


def register() -> None:
    for name in (fake.__name__ for fake in FAKES):
        operator = _Operator(name)
        formulas = _formulas(operator)
        function = None if formulas is None else _function(operator, *formulas)
        _library.impl(name, _autograd_kernel(operator, function), "Autograd", with_keyset=True)
        _library.impl(name, _transformed(operator, function), "FuncTorchDynamicLayerFrontMode")
