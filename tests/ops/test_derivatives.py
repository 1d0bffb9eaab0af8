"""Every derivative that torch can ask for is the reference's in fp64, or refused by a message that names operator and
argument: never zero, or missing, in silence."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad

import entrgi_ext
from entrgi_ext import reference
from support.calls import (
    OPERATORS,
    WRITTEN,
    arguments,
    backward_arguments,
    call,
    names_of,
    schema_arguments,
)
from support.helpers import random_embedding, random_keys, random_logits

ALL = (*OPERATORS, "logit_statistics_backward")
COMPUTED = {("logit_statistics", "logits"), ("relaxed_embedding", "logits"), ("gumbel_perturb", "logits")}


def valid_arguments(name: str, device: str, dtype: torch.dtype) -> dict:
    """By the names of the schema; the last row is no padding, for the reference knows none everywhere."""
    if name == "logit_statistics_backward":
        return dict(zip(names_of(name), backward_arguments(device, dtype), strict=True))
    return dict(zip(names_of(name), schema_arguments(name, arguments(name, device, dtype)), strict=True))


def floating(name: str) -> list[str]:
    given = valid_arguments(name, "cpu", torch.float32)
    return [key for key, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


CASES = [(name, argument) for name in ALL for argument in floating(name)]
READ = [(name, argument) for name, argument in CASES if argument not in WRITTEN.get(name, [])]


def raw(name: str, keywords: dict):
    return getattr(torch.ops.entrgi, name)(*(keywords[key] for key in names_of(name)))


def public(name: str, keywords: dict):
    if name == "logit_statistics_backward":
        return raw(name, keywords)  # it has no other function
    keywords = dict(keywords)
    if name == "adam_step_":
        keywords["betas"] = (keywords.pop("beta1"), keywords.pop("beta2"))
    return call(name, keywords)


def floating_results(name: str, result, keywords: dict) -> list[torch.Tensor]:
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    results = (*results, *(keywords[key] for key in WRITTEN.get(name, [])))
    return [x for x in results if x.is_floating_point()]


def loss_of(results: list[torch.Tensor]) -> torch.Tensor:
    """Another weight for every element."""
    return sum(
        (x * torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device).view(x.shape)).sum() for x in results
    )


def copied(keywords: dict) -> dict:
    return {key: x.detach().clone() if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}


def reference_gradient(name: str, argument: str, keywords: dict) -> torch.Tensor:
    keywords = {
        key: x.double().cpu() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in copied(keywords).items()
    }
    keywords[argument].requires_grad_()
    results = getattr(reference, name)(**keywords)
    if name == "relaxed_embedding":
        results = results[0]
    (gradient,) = torch.autograd.grad(loss_of(floating_results(name, results, keywords)), keywords[argument])
    return gradient


def assert_names(error: Exception, name: str, argument: str) -> None:
    assert isinstance(error, RuntimeError)
    assert re.search(rf"\bentrgi::{name}\b", str(error)), error
    assert re.search(rf"\b{argument}\b", str(error)), error


def by_backward(run, name, keywords, argument):
    keywords[argument].requires_grad_()
    results = floating_results(name, run(name, keywords), keywords)
    loss_of([x for x in results if x.requires_grad]).backward()
    return keywords[argument].grad


def by_transform(run, name, keywords, argument):
    def loss(x):
        given = {**keywords, argument: x}
        results = floating_results(name, run(name, given), given)
        return loss_of(results[:1] if name == "relaxed_embedding" else results)

    return torch.func.grad(loss)(keywords[argument])


def by_jacobian(run, name, keywords, argument):
    def loss(x):
        given = {**keywords, argument: x}
        results = floating_results(name, run(name, given), given)
        return loss_of(results[:1] if name == "relaxed_embedding" else results)[None]

    return torch.func.jacrev(loss)(keywords[argument])[0]


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("how", [by_backward, by_transform, by_jacobian])
@pytest.mark.parametrize("run", [raw, public])
@pytest.mark.parametrize(("name", "argument"), READ)
def test_reverse_mode(device, name, argument, run, how):
    keywords = valid_arguments(name, device, torch.float32)
    try:
        got = how(run, name, copied(keywords), argument)
    except RuntimeError as error:
        assert (name, argument) not in COMPUTED, error  # noqa: PT017
        assert_names(error, name, argument)
        return
    assert (name, argument) in COMPUTED
    expected = reference_gradient(name, argument, keywords)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-4, atol=1e-4)


def tangent_by_transform(run, name, keywords, argument):
    def results(x):
        given = {**keywords, argument: x}
        return tuple(floating_results(name, run(name, given), given))

    torch.func.jvp(results, (keywords[argument],), (torch.ones_like(keywords[argument]),))


def tangent_by_dual_numbers(run, name, keywords, argument):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(keywords[argument], torch.ones_like(keywords[argument]))
        run(name, {**keywords, argument: dual})


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("how", [tangent_by_transform, tangent_by_dual_numbers])
@pytest.mark.parametrize("run", [raw, public])
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_forward_mode_is_refused(device, name, argument, run, how, grad_mode):
    with grad_mode(), pytest.raises(RuntimeError, match="no forward-mode derivative") as caught:
        how(run, name, valid_arguments(name, device, torch.float32), argument)
    assert_names(caught.value, name, argument)


@pytest.mark.parametrize(("name", "argument"), [case for case in CASES if case[1] in WRITTEN.get(case[0], [])])
def test_what_is_written_is_in_no_graph(device, name, argument):
    """A leaf may be written (its gradient is that of what it then holds), a result or an argument of grad may not."""
    keywords = valid_arguments(name, device, torch.float32)
    keywords[argument] = keywords[argument].requires_grad_() * 1
    with pytest.raises(RuntimeError, match=f"{argument} must not require grad") as caught:
        raw(name, keywords)
    assert_names(caught.value, name, argument)
    keywords = valid_arguments(name, device, torch.float32)
    with pytest.raises(RuntimeError, match=f"{argument} must not require grad"):
        by_transform(raw, name, keywords, argument)


@pytest.mark.parametrize(("name", "argument"), sorted(COMPUTED))
def test_second_derivatives(device, name, argument):
    keywords = valid_arguments(name, device, torch.float32)
    keywords[argument].requires_grad_()
    (result, *_) = floating_results(name, raw(name, keywords), keywords)
    (slope,) = torch.autograd.grad(result.square().sum(), keywords[argument], create_graph=True)
    if name == "gumbel_perturb":
        (second,) = torch.autograd.grad(slope.sum(), keywords[argument])
        torch.testing.assert_close(second, torch.full_like(second, 2.0))
        return
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        slope.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"double backward is not supported|no forward-mode derivative"):
        torch.func.hessian(lambda x: floating_results(name, raw(name, {**keywords, argument: x}), keywords)[0].sum())(
            keywords[argument].detach()
        )


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("_")])
def test_batches(device, name, transform):
    """torch.vmap over every floating argument at once equals a loop."""
    keywords = valid_arguments(name, device, torch.float32)
    keys = floating(name)
    batch = [torch.stack([keywords[key], keywords[key].flip(0)]) for key in keys]

    def run(*tensors):
        return floating_results(name, raw(name, {**keywords, **dict(zip(keys, tensors, strict=True))}), keywords)[0]

    if transform == "vmap":
        expected = torch.stack([run(*(x[i] for x in batch)) for i in range(2)])
        torch.testing.assert_close(torch.vmap(run)(*batch), expected, rtol=0, atol=0)
        return
    at = keys.index("logits")

    def loss(*tensors):
        return run(*tensors).square().sum()

    def total(*tensors):
        return torch.vmap(loss)(*tensors).sum()

    of_one, of_all = torch.func.grad(loss, argnums=at), torch.func.grad(total, argnums=at)
    if (name, "logits") not in COMPUTED:
        with pytest.raises(RuntimeError, match=rf"entrgi::{name} has no derivative in .*logits"):
            torch.vmap(of_one)(*batch) if transform == "vmap of grad" else of_all(*batch)
        return
    got = torch.vmap(of_one)(*batch) if transform == "vmap of grad" else of_all(*batch)
    for i in range(2):
        given = [x[i].clone() for x in batch]
        given[at].requires_grad_()
        loss(*given).backward()
        torch.testing.assert_close(got[i], given[at].grad)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name.endswith("_")])
def test_batches_of_what_is_written_are_refused(device, name):
    keywords = valid_arguments(name, device, torch.float32)
    key = "confidence" if name == "commit_" else "logits"
    batch = torch.stack([keywords[key]] * 2)
    with pytest.raises(RuntimeError, match=f"entrgi::{name} writes in place and does not support torch.vmap"):
        torch.vmap(lambda x: raw(name, {**keywords, key: x}))(batch)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
@pytest.mark.parametrize("name", ALL)
def test_constants_of_a_transform_pass(device, name, transform):
    """In a function that is differentiated, operators may run on what does not depend on its argument."""
    keywords = valid_arguments(name, device, torch.float32)
    expected, given = copied(keywords), copied(keywords)
    reference_results = floating_results(name, raw(name, expected), expected)
    seen = []

    def f(x):
        seen.append(floating_results(name, raw(name, given), given))
        return x.sum() * 2

    transform(f)(torch.ones(3, device=device))
    for a, b in zip(seen[0], reference_results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_logsumexp_of_the_logits_is_a_function_of_them(device):
    """It may carry its graph; the gradient is softmax's own, whole, and the reference's."""
    logits, embedding = random_logits(3, 20, device=device).requires_grad_(), random_embedding(20, 4, device=device)
    logsumexp = entrgi_ext.logit_statistics(logits, 0.7).logsumexp
    output, _ = entrgi_ext.relaxed_embedding(logits, embedding, 0.7, logsumexp=logsumexp)
    (got,) = torch.autograd.grad(loss_of([output]), logits)
    z = logits.detach().cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of([torch.softmax(z / 0.7, 1) @ embedding.cpu().double()]), z)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    leaf = logsumexp.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="logsumexp must not require grad"):
        entrgi_ext.relaxed_embedding(logits, embedding, 0.7, logsumexp=leaf)


def test_samples_are_constants(device):
    """Their use does not raise, a backward pass that reaches them does, and both stop at detach."""
    logits = random_logits(3, 20, device=device).requires_grad_()
    sample = entrgi_ext.sample_tokens(logits, random_keys(3, device), 0.7)
    assert not sample.token.requires_grad
    with pytest.raises(RuntimeError, match=r"entrgi::sample_tokens has no derivative in logits: take its results with"):
        (logits.sum() + sample.probability.sum()).backward()
    (logits.sum() + sample.probability.detach().sum()).backward()
    with torch.no_grad():
        assert not entrgi_ext.sample_tokens(logits, random_keys(3, device), 0.7).probability.requires_grad


@pytest.mark.parametrize(
    ("call_it", "message"),
    [
        (lambda z, keys: torch.ops.entrgi.sample_tokens(z, keys, 0.7, 0.9)[5].sum().backward(), "sample_tokens has no"),
        (
            lambda z, keys: torch.ops.entrgi.commit_(
                torch.zeros(1, 3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), torch.arange(3), z[0, :3],
                torch.arange(3), torch.tensor([0, 3]), torch.tensor([1]),
            ),
            "confidence must not require grad",
        ),
    ],
)  # fmt: skip
def test_arguments_that_are_left_out(call_it, message):
    """torch does not pass on what ends a call and is the schema's default."""
    with pytest.raises(RuntimeError, match=message):
        call_it(random_logits(3, 5).requires_grad_(), random_keys(3))
