"""A list of forbidden ids becomes the mask that the vocabulary pass without clusters reads."""

import pytest
import torch


@pytest.mark.parametrize("vocab", [1, 37, 1501])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_mask_has_what_is_on_the_list(kernels, vocab, count):
    ids = torch.randint(-5, vocab + 5, (count,), generator=torch.Generator().manual_seed(vocab), dtype=torch.int32)
    if count > 2:
        ids[:2] = torch.tensor([-(2**31), 2**31 - 1])  # neither exists, nor may be written
    expected = torch.zeros(vocab, dtype=torch.bool)
    expected[ids[(ids >= 0) & (ids < vocab)].long()] = True
    mask = torch.ones(vocab, dtype=torch.bool)
    arguments = {"num_forbidden": count, "vocab": vocab, "new": ["mask"]}
    kernels.launch("forbidden_mask", arguments, {"forbidden_ids": ids}, {"mask": mask})
    assert torch.equal(mask, expected)
