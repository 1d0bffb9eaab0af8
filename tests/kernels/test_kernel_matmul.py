"""fp32 embeddings from 128 rows on: products by the caller's matrix product, as the plan chooses them.

The other properties (alignments, padding, infinities, ...) are tested with those of the other kernels.
"""

import pytest
import torch

from support.cases import DTYPES, relative_l2
from support.logit_updates import ADAM, check_adam, check_gradient
from support.logit_updates import inputs as update_inputs
from support.relaxed_embeddings import check as check_embedding
from support.relaxed_embeddings import inputs as embedding_inputs

pytestmark = [pytest.mark.simulator, pytest.mark.grid(strength=2)]
TAU = 0.7
VOCAB, DIM = 5003, 9  # three CTAs of a row; no chunk of the tests divides it
CHUNKS = [0, 4096, 2052]  # ids: the plan's own, which is all of them; two; three
ROWS = [128, 200]


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_relaxed_embedding(kernels, reference, logits_dtype, n):
    arguments = embedding_inputs(reference, n, VOCAB, DIM, logits_dtype, torch.float32)
    with kernels.overridden(kernel="relaxed_embedding_simt"):
        _, simt = kernels.relaxed_embedding(*arguments, TAU)
    for ids in CHUNKS:
        with kernels.overridden(block_n=ids):
            output, soft = kernels.relaxed_embedding(*arguments, TAU)
        assert kernels.plan["kernel"] == "relaxed_embedding_matmul"
        check_embedding(reference, output, soft, *arguments)
        assert relative_l2(soft, simt) <= 1e-6


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_gradient_and_sgd(kernels, reference, logits_dtype, n):
    grad, z, lse, embedding, soft = update_inputs(reference, n, VOCAB, DIM, logits_dtype, torch.float32)
    with kernels.overridden(kernel="logit_update_simt"):
        simt = kernels.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
    for ids in CHUNKS:
        with kernels.overridden(block_n=ids):
            got = kernels.logit_gradient(grad, z, lse, embedding, soft, None, TAU)
        assert kernels.plan["kernel"] == "logit_update_matmul"
        check_gradient(reference, got, grad, z, lse, embedding, soft)
        assert relative_l2(got, simt) <= 1e-5
    updated = z.clone()
    kernels.sgd_step_(updated, grad, lse, embedding, soft, None, TAU, lr=3.0)
    assert kernels.plan["kernel"] == "logit_update_matmul"
    assert relative_l2(updated, (z.float() + 3.0 * got).to(logits_dtype)) <= 1e-6


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("ids", CHUNKS)
def test_adam(kernels, reference, logits_dtype, ids):
    """First step (moments unwritten memory), middle, last (moments left alone), with rows of padding."""
    n = ROWS[0]
    grad, z, lse, embedding, soft = update_inputs(reference, n, VOCAB, DIM, logits_dtype, torch.float32)
    padding = torch.arange(n) % 5 == 2
    rows = torch.arange(n).masked_fill(padding, -1)
    rest, here = (grad, lse, embedding, soft, rows, TAU), ~padding
    m, v = torch.zeros(n, VOCAB), torch.zeros(n, VOCAB)
    for step in (1, 2, 3):
        before = [x.clone() for x in (z, m, v)]
        with kernels.overridden(block_n=ids):
            gradient = kernels.logit_gradient(grad, z, lse, embedding, soft, rows, TAU)
            kernels.adam_step_(z, m, v, *rest, step=step, last=step == 3, **ADAM)
        assert (gradient[padding] == 0).all()
        for now, then in zip((z, m, v), before, strict=True):
            assert torch.equal(now[padding], then[padding])
        moments = (None, None) if step == 3 else (m[here], v[here])
        check_adam(reference, z[here], *moments, *(x[here] for x in before), gradient[here], step=step)
    assert torch.equal(m, before[1])
    assert torch.equal(v, before[2])
