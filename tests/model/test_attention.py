"""Attention compared with a softmax in fp64."""
import pytest
import torch

import model.attention
from model.attention import additive_mask, attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(("queries", "masked"), [(20, False), (7, False), (1, False), (7, True)])
@pytest.mark.parametrize("by_sdpa", [False, True])
def test_attention_is_a_softmax_over_the_unmasked_keys(dtype, tolerance, queries, masked, by_sdpa, monkeypatch):
    if by_sdpa:  # as for long samples, and often without gradients; with copied heads, as on GPUs in fp32
        monkeypatch.setattr(model.attention, "keeps_probabilities", lambda *_: False)
        monkeypatch.setattr(model.attention, "copies_heads", lambda *_: True)
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype).requires_grad_()
                         for shape in ((2, 4, queries, 16), (2, 2, 20, 16), (2, 2, 20, 16)))
    mask = torch.ones(2, queries, 20, dtype=torch.bool).tril(20 - queries)
    if masked:
        mask &= torch.rand(mask.shape, generator=generator) < 0.5
        mask[:, :, 0] = True
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT / 4
    expected = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ value.double().repeat_interleave(2, 1)
    result = attention(query, key, value, additive_mask(mask, 2, dtype) if masked else None)
    weight = torch.randn(expected.shape, generator=generator).double()
    for ours, reference in zip((result, *torch.autograd.grad(result, (query, key, value), weight.to(dtype))),
                               (expected, *torch.autograd.grad(expected, (query, key, value), weight))):
        assert (ours.double() - reference.double()).norm() < tolerance * reference.norm()
