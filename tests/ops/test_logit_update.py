"""Operator 3: the gradient q (G E^T - G . soft) / tau, and the Adam or SGD ascent step made of it in place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch

from entrgi_ext import adam_step_, logit_gradient, logit_statistics, reference, relaxed_embedding, sgd_step_
from support.helpers import (
    DTYPE_PAIRS,
    LARGE_VOCABULARY,
    UPDATE_BOUND,
    assert_accurate,
    assert_same,
    double,
    layouts,
    logsumexp,
    random_embedding,
    random_logits,
    relative_l2,
    skip_fp64_on_cuda,
)

LR, BETA1, BETA2, EPS = 0.5, 0.9, 0.999, 1e-8


@dataclass
class Problem:
    """The arguments of the three operators; ``rows`` is None or [N]."""

    grad: torch.Tensor
    logits: torch.Tensor
    logsumexp: torch.Tensor
    embedding: torch.Tensor
    soft: torch.Tensor
    rows: torch.Tensor | None = None
    temperature: float = 0.7

    @property
    def tail(self):
        return self.logsumexp, self.embedding, self.soft, self.temperature

    def double(self) -> Problem:
        return Problem(*double(*(getattr(self, f.name) for f in fields(self))))

    def gradient(self) -> torch.Tensor:
        return reference.logit_gradient(
            self.grad, self.logits, self.logsumexp, self.embedding, self.soft, self.rows, self.temperature
        )


def problem(n, v, d, z_dtype, e_dtype, device, *, scale=3.0, temperature=0.7, grad_scale=1.0) -> Problem:
    logits = random_logits(n, v, z_dtype, device, scale=scale)
    embedding = random_embedding(v, d, e_dtype, device)
    lse = logsumexp(logits, temperature)
    q = (logits.double() / temperature - lse.double()[:, None]).exp()
    soft = (q @ embedding.double()).to(lse.dtype)
    grad = (grad_scale * random_embedding(n, d, torch.float32, device, seed=4)).to(e_dtype)
    return Problem(grad, logits, lse, embedding, soft, None, temperature)


def rounding_of_gradient(p: Problem, exact: torch.Tensor) -> torch.Tensor:
    """First-order bound on what rounding in the accumulator dtype alone may do to each entry, in fp64.

    Where the row is peaked the bracket cancels to nothing, and PyTorch's own error may be small by luck.
    """
    epsilon = torch.finfo(p.logsumexp.dtype).eps
    p = p.double()
    grad = p.grad if p.rows is None else p.grad[p.rows.clamp(min=0)]
    scores = p.logits / p.temperature
    q = (scores - p.logsumexp[:, None]).exp()
    products = grad.abs() @ p.embedding.abs().T + (grad.abs() * p.soft.abs()).sum(1, keepdim=True)
    exponent = torch.where(q > 0, scores.abs() + p.logsumexp.abs()[:, None], 0.0)
    return epsilon * (4 * q * products / p.temperature + 2 * exponent * exact.abs())


def check_gradient(p: Problem, bounded: bool = True) -> None:
    got = logit_gradient(p.grad, p.logits, *p.tail, row_index=p.rows)
    exact = p.double().gradient()
    rounding = rounding_of_gradient(p, exact)
    assert_accurate(got, p.gradient(), exact, "gradient", slack=float(rounding.norm()))
    if bounded:
        error = float((got.cpu().double() - exact).norm())
        assert error <= UPDATE_BOUND[p.embedding.dtype] * float(exact.norm()) + float(rounding.norm())


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_gradient_accuracy(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    check_gradient(problem(19, 1003, 72, z_dtype, e_dtype, device))


@pytest.mark.parametrize("n", [1, 2, 5, 17, 65])
@pytest.mark.parametrize(("v", "d"), [(2, 3), (9, 8), (33, 17), (515, 130), (1024, 64)])
def test_gradient_shapes(device, n, v, d):
    for dtype in (torch.float32, torch.bfloat16):
        check_gradient(problem(n, v, d, dtype, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_large_vocabulary(device, dtype):
    check_gradient(problem(3, LARGE_VOCABULARY, 40, dtype, dtype, device, scale=2.0))


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_gradient_temperatures(device, z_dtype, e_dtype, temperature):
    """At 1e-3, z / tau is near 1e4 and its fp32 rounding alone is 1e-3 of q: twice PyTorch's error is the bar."""
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(7, 301, 24, z_dtype, e_dtype, device, temperature=temperature)
    check_gradient(p, bounded=temperature >= 0.1)


def test_vocabulary_of_one_has_no_gradient(device):
    p = problem(3, 1, 8, torch.float32, torch.float32, device)
    assert logit_gradient(p.grad, p.logits, *p.tail).abs().max() < 1e-5


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_the_cancelling_subtraction_is_not_rounded(device, z_dtype, e_dtype):
    """Embeddings with a common offset 30 times their spread: G . E and G . soft nearly cancel. Rounding either to
    the embedding's 16 bits costs 4-23 % of the gradient."""
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(8, 301, 64, z_dtype, torch.float64, device)
    embedding = (p.embedding + 30).to(e_dtype)
    q = (p.logits.double() / 0.7 - p.logsumexp.double()[:, None]).exp()
    soft = (q @ embedding.double()).to(p.logsumexp.dtype)
    p = replace(p, embedding=embedding, soft=soft, grad=p.grad.to(e_dtype))
    exact = p.double().gradient()
    got = logit_gradient(p.grad, p.logits, *p.tail)
    bound = {torch.float64: 1e-9, torch.float32: 1e-4}.get(e_dtype, 5e-3)
    assert relative_l2(got, exact) <= bound


@pytest.mark.parametrize("seed", range(3))
def test_peaked_rows_do_not_inherit_the_rounding_of_logsumexp(seed):
    """From logits to gradient in fp32: where one id holds all but 1e-7 of the mass, no worse than autograd.

    Adam takes a whole step of whatever is left there. soft is divided by the row's own sum of q; without that the
    error is twice autograd's and more.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(64, 3001, generator=generator)
    logits[:, 7] += 18
    embedding, grad = (torch.randn(n, 64, generator=generator) for n in (3001, 64))

    def autograd(dtype):
        z = logits.to(dtype, copy=True).requires_grad_()
        ((z / 0.7).softmax(1) @ embedding.to(dtype) * grad.to(dtype)).sum().backward()
        return z.grad.double()

    logsumexp = logit_statistics(logits, 0.7).logsumexp
    _, soft = relaxed_embedding(logits, embedding, 0.7, logsumexp=logsumexp)
    got = logit_gradient(grad, logits, logsumexp, embedding, soft, 0.7).double()
    exact = autograd(torch.float64)
    assert (got - exact).norm() <= 1.2 * (autograd(torch.float32) - exact).norm()


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_gradient_through_row_indices(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    p, expected = padded_problem(device, z_dtype, e_dtype)
    got = logit_gradient(p.grad, p.logits, *p.tail, row_index=p.rows)
    used = p.rows >= 0
    assert_accurate(got[used], expected[used], expected[used])  # other blocking, other order of summation
    assert (got[~used] == 0).all()


def padded_problem(device, z_dtype, e_dtype) -> tuple[Problem, torch.Tensor]:
    """Rows permuted into a larger gradient, two of them padding full of NaN; and the gradient without all that."""
    p = problem(7, 203, 24, z_dtype, e_dtype, device)
    expected = logit_gradient(p.grad, p.logits, *p.tail)
    rows = torch.tensor([9, -1, 0, 4, -1, 10, 2], device=device)
    used, padding = rows >= 0, rows < 0
    grad = torch.full((11, 24), math.nan, dtype=e_dtype, device=device)
    grad[rows[used]] = p.grad[used]
    for tensor in (p.logits, p.logsumexp, p.soft):
        tensor[padding] = math.nan
    return replace(p, grad=grad, rows=rows), expected


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_layouts(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(5, 303, 20, z_dtype, e_dtype, device)
    expected = logit_gradient(p.grad, p.logits, *p.tail)
    for name, view in layouts(p.logits).items():
        for table in (p.embedding, *layouts(p.embedding).values()):
            for grad in (p.grad, *layouts(p.grad).values()):
                got = logit_gradient(grad, view, p.logsumexp, table, p.soft, 0.7)
                assert_accurate(got, expected, expected, name)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_masked_entries_have_no_gradient_and_stay(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(4, 203, 24, z_dtype, e_dtype, device)
    p.logits[:, ::3] = -math.inf
    p.logsumexp = logsumexp(p.logits, 0.7)
    got = logit_gradient(p.grad, p.logits, *p.tail)
    assert (got[:, ::3] == 0).all()
    check_gradient(p)
    moments = [torch.full_like(got, math.nan) for _ in range(2)]
    for step in (1, 2):
        adam_step_(p.logits, *moments, p.grad, *p.tail, lr=LR, step=step)
        assert (p.logits[:, ::3] == -math.inf).all()
        assert all((m[:, ::3] == 0).all() for m in moments)
    sgd_step_(p.logits, p.grad, *p.tail, lr=LR)
    assert (p.logits[:, ::3] == -math.inf).all()
    assert torch.isfinite(p.logits[:, 1::3]).all()


# ---- Adam -----------------------------------------------------------------------------------------------


def adam_reference(p: Problem, steps: int, last: bool) -> tuple[torch.Tensor, ...]:
    """``steps`` steps with fixed logsumexp and soft (a test of the operator, not of the loop around it)."""
    z, m, v = p.logits.clone(), None, None
    for step in range(1, steps + 1):
        gradient = replace(p, logits=z).gradient()
        z, *moments = reference.adam_step(z, m, v, gradient, LR, BETA1, BETA2, EPS, step)
        if not (last and step == steps):
            m, v = moments
    return z, m, v


@pytest.mark.grid(strength=2)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_adam_steps(device, z_dtype, e_dtype, steps, last):
    """The first step does not read the moments (NaN there), the last leaves them as they were."""
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(9, 303, 48, z_dtype, e_dtype, device)
    exact, plain = adam_reference(p.double(), steps, last), adam_reference(p, steps, last)
    start = p.logits.clone()
    dtype = reference.accumulator_dtype(p.logits)
    m, v = (torch.full(p.logits.shape, math.nan, dtype=dtype, device=device) for _ in range(2))
    for step in range(1, steps + 1):
        result = adam_step_(
            p.logits,
            m,
            v,
            p.grad,
            *p.tail,
            lr=LR,
            step=step,
            last=last and step == steps,
            betas=(BETA1, BETA2),
            eps=EPS,
        )
        assert result is None
    # the step itself, not the logits, carries the information; bf16 logits move by whole roundings
    change, exact_change = p.logits.double() - start.double(), exact[0] - start.cpu().double()
    plain_change = plain[0].double() - start.double()
    slack = 1e-9 if z_dtype == torch.float64 else 2 * torch.finfo(z_dtype).eps * float(exact[0].abs().max())
    error = (change.cpu() - exact_change).abs().mean()
    assert error <= 2 * (plain_change.cpu() - exact_change).abs().mean() + slack
    if z_dtype == torch.float64:
        assert (change.cpu() - exact_change).abs().max() <= 1e-9
    if steps == 1 and last:
        assert torch.isnan(m).all()
        assert torch.isnan(v).all()
        return
    assert_accurate(m, plain[1], exact[1], "exp_avg")
    assert_accurate(v, plain[2], exact[2], "exp_avg_sq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_on_a_large_vocabulary(device, dtype):
    p = problem(2, LARGE_VOCABULARY, 24, dtype, dtype, device, scale=2.0)
    exact = p.double().gradient()
    slack = float(rounding_of_gradient(p, exact).norm())
    start = p.logits.clone()
    m, v = (torch.full(p.logits.shape, math.nan, device=device) for _ in range(2))
    adam_step_(p.logits, m, v, p.grad, *p.tail, lr=LR, step=1)
    assert float((m.cpu() - 0.1 * exact).norm()) <= UPDATE_BOUND[dtype] * float(exact.norm()) + slack
    # the first step is lr g / (|g| + eps): follow it from the gradient that the moments hold
    gradient = 10 * m.double()
    update = LR * gradient / (gradient.abs() + EPS)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(p.logits.double(), start.double() + update, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_single_step_needs_no_moments(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(5, 103, 16, z_dtype, e_dtype, device)
    with_moments, without = p.logits.clone(), p.logits.clone()
    dtype = reference.accumulator_dtype(p.logits)
    m, v = (torch.full(p.logits.shape, math.nan, dtype=dtype, device=device) for _ in range(2))
    adam_step_(with_moments, m, v, p.grad, *p.tail, lr=LR, step=1, last=True)
    adam_step_(without, None, None, p.grad, *p.tail, lr=LR, step=1, last=True)
    assert_same(without, with_moments)
    assert (without != p.logits).any()


@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_moments_hold_the_gradient_that_the_other_operator_gives(device, z_dtype, e_dtype):
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(5, 103, 16, z_dtype, e_dtype, device)
    gradient = logit_gradient(p.grad, p.logits, *p.tail)
    m, v = torch.empty_like(gradient), torch.empty_like(gradient)
    adam_step_(p.logits.clone(), m, v, p.grad, *p.tail, lr=LR, step=1)
    tolerance = 1e-12 if z_dtype == torch.float64 else 1e-5
    torch.testing.assert_close(m, 0.1 * gradient, rtol=tolerance, atol=0)
    torch.testing.assert_close(v, 0.001 * gradient.square(), rtol=tolerance, atol=0 if tolerance < 1e-9 else 1e-44)


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_options_of_adam(device, step):
    """Every scalar matters: unusual betas, eps and lr against the fp64 formula."""
    p = problem(4, 64, 16, torch.float32, torch.float32, device, grad_scale=1e-3)
    generator = torch.Generator().manual_seed(0)
    m = (1e-3 * torch.randn(4, 64, generator=generator)).to(device)
    v = (1e-6 * torch.rand(4, 64, generator=generator)).to(device)
    for lr, betas, eps in ((0.1, (0.5, 0.9), 1e-3), (-0.2, (0.0, 0.99), 1e-8), (0.3, (0.99, 0.5), 1e-1)):
        host = double(p.logits, m, v, p.double().gradient())
        exact = reference.adam_step(*host, lr, *betas, eps, step)
        z, a, b = p.logits.clone(), m.clone(), v.clone()
        adam_step_(z, a, b, p.grad, *p.tail, lr=lr, step=step, betas=betas, eps=eps)
        for got, expected in zip((z, a, b), exact, strict=True):
            torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("grad_scale", [1e-4, 1e-6, 1e-7, 1e-8])
def test_small_gradients_still_move_their_logits(device, grad_scale):
    """Adam normalises: 1e-7 moves a logit by about lr, 1e-8 by half of it. (In fp32 g^2 may not underflow before
    sqrt(v) falls below eps.)"""
    p = problem(4, 64, 16, torch.float32, torch.float32, device, scale=0.1, grad_scale=grad_scale * 64)
    exact = reference.adam_step(p.logits.cpu().double(), None, None, p.double().gradient(), LR, BETA1, BETA2, EPS, 1)[0]
    start = p.logits.cpu().double()
    adam_step_(p.logits, None, None, p.grad, *p.tail, lr=LR, step=1, last=True)
    torch.testing.assert_close(p.logits.cpu().double() - start, exact - start, rtol=2e-3, atol=2e-4)
    assert (exact - start).abs().max() > 0.1 * LR


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_padding_rows_are_neither_read_nor_written(device, z_dtype, e_dtype, optimizer):
    skip_fp64_on_cuda(device, z_dtype)
    p, _ = padded_problem(device, z_dtype, e_dtype)
    used = p.rows >= 0
    dense = Problem(p.grad[p.rows[used]], p.logits[used].clone(), p.logsumexp[used], p.embedding, p.soft[used])
    dtype = reference.accumulator_dtype(p.logits)
    moments = [torch.full(p.logits.shape, 7.0, dtype=dtype, device=device) for _ in range(2)]
    dense_moments = [m[used].clone() for m in moments]
    p.logits[(~used).nonzero()[0]] = 3.0  # the other stays NaN
    poisoned = p.logits.clone()
    for step in (1, 2):
        if optimizer == "adam":
            adam_step_(p.logits, *moments, p.grad, *p.tail, lr=LR, step=step, row_index=p.rows)
            adam_step_(dense.logits, *dense_moments, dense.grad, *dense.tail, lr=LR, step=step)
        else:
            sgd_step_(p.logits, p.grad, *p.tail, lr=LR, row_index=p.rows)
            sgd_step_(dense.logits, dense.grad, *dense.tail, lr=LR)
    tolerance = 1e-9 if z_dtype == torch.float64 else 2 * torch.finfo(z_dtype).eps + 1e-4
    torch.testing.assert_close(p.logits[used], dense.logits, rtol=tolerance, atol=tolerance)
    assert_same(p.logits[~used], poisoned[~used])
    for a, b in zip(moments, dense_moments, strict=True):
        assert_accurate(a[used], b, b)
        assert (a[~used] == 7).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_in_place_on_other_layouts(device, z_dtype, e_dtype, optimizer):
    """Strided and unaligned logits change in place; what lies between the rows does not."""
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(5, 203, 24, z_dtype, e_dtype, device)

    def run(logits):
        dtype = reference.accumulator_dtype(logits)
        moments = [torch.empty(logits.shape, dtype=dtype, device=device) for _ in range(2)]
        for step in (1, 2):
            if optimizer == "adam":
                adam_step_(logits, *moments, p.grad, *p.tail, lr=LR, step=step)
            else:
                sgd_step_(logits, p.grad, *p.tail, lr=LR)
        return logits

    views = layouts(p.logits)
    expected = run(p.logits.clone())
    for name, view in views.items():
        storage = torch.empty(0, dtype=z_dtype, device=device).set_(view.untyped_storage())
        padding = torch.isnan(storage)
        run(view)
        assert_accurate(view, expected, expected, name)
        assert torch.isnan(storage[padding]).all()
        assert not torch.isnan(storage[~padding]).any()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("z_dtype", "e_dtype"), DTYPE_PAIRS)
def test_sgd_steps(device, z_dtype, e_dtype, steps):
    skip_fp64_on_cuda(device, z_dtype)
    p = problem(9, 303, 48, z_dtype, e_dtype, device)
    exact, plain = p.double(), replace(p, logits=p.logits.clone())
    for _ in range(steps):
        exact.logits = exact.logits + LR * exact.gradient()
        accumulated = plain.logits.to(plain.logsumexp.dtype) + LR * plain.gradient()
        plain.logits = accumulated.to(z_dtype)
        sgd_step_(p.logits, p.grad, *p.tail, lr=LR)
    assert_accurate(p.logits, plain.logits, exact.logits, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows(device, dtype):
    skip_fp64_on_cuda(device, dtype)
    p = problem(0, 9, 4, dtype, dtype, device)
    assert logit_gradient(p.grad, p.logits, *p.tail).shape == (0, 9)
    moments = [torch.empty(0, 9, dtype=dtype, device=device) for _ in range(2)]
    adam_step_(p.logits, *moments, p.grad, *p.tail, lr=LR, step=1)
    adam_step_(p.logits, None, None, p.grad, *p.tail, lr=LR, step=1, last=True)
    sgd_step_(p.logits, p.grad, *p.tail, lr=LR)


def test_inputs_are_left_alone(device):
    p = problem(4, 64, 16, torch.float32, torch.float32, device)
    before = [t.clone() for t in (p.grad, p.logsumexp, p.embedding, p.soft)]
    moments = [torch.empty(4, 64, device=device) for _ in range(2)]
    adam_step_(p.logits, *moments, p.grad, *p.tail, lr=LR, step=1)
    sgd_step_(p.logits, p.grad, *p.tail, lr=LR)
    for a, b in zip((p.grad, p.logsumexp, p.embedding, p.soft), before, strict=True):
        assert_same(a, b)


def test_whole_loop_against_torch_optim(device):
    """Three Adam steps with logsumexp and soft recomputed each time: a toy reward, autograd and torch.optim.Adam."""
    from entrgi_ext import logit_statistics, relaxed_embedding

    if device != "cpu":
        pytest.skip("compares in fp64: fp32 results of Adam differ between correct implementations")
    n, v, d, temperature = 6, 50, 12, 0.7
    logits, embedding = random_logits(n, v, torch.float64), random_embedding(v, d, torch.float64)
    target = random_logits(n, d, torch.float64, seed=8)

    def reward(e):
        return -((e - target) ** 2).sum() - e.pow(4).sum().sqrt()

    parameter = logits.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=LR, maximize=True)
    z, moments = logits.clone(), [torch.full_like(logits, math.nan) for _ in range(2)]
    for step in range(1, 4):
        adam.zero_grad()
        reward((parameter / temperature).softmax(dim=1) @ embedding).backward()
        adam.step()

        lse = logit_statistics(z, temperature).logsumexp
        output, soft = relaxed_embedding(z, embedding, temperature, logsumexp=lse)
        (grad,) = torch.autograd.grad(reward(leaf := output.detach().requires_grad_()), leaf)
        adam_step_(z, *moments, grad, lse, embedding, soft, temperature, lr=LR, step=step, last=step == 3)
        torch.testing.assert_close(z, parameter.detach(), rtol=0, atol=1e-9)
