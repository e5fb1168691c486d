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


@pytest.mark.parametrize(("cpu", "queries", "keys", "by_products"), [
    ({"avx512_bf16": True}, 16, 20, True), ({"avx512_bf16": True}, 15, 20, False),  # few queries
    ({"avx512_bf16": True}, 2048, 2048, True), ({"avx512_bf16": True}, 2048, 2049, False),  # more than 8 MiB of scores
    ({"avx512_bf16": True, "amx_bf16": True}, 16, 20, False), ({}, 16, 20, False)])
def test_products_replace_sdpa_without_gradients_where_they_are_faster(cpu, queries, keys, by_products, monkeypatch):
    calls, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(model.attention, "CPU", cpu)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args, **rest: calls.append(0) or real(*args, **rest))
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn((1, 1, size, 8), generator=generator).bfloat16() for size in (queries, keys, keys))
    result = attention(query, key, value)
    assert (not calls) == by_products
    scores = (query.float() @ key.float().mT / 8 ** 0.5).masked_fill(
        ~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), -torch.inf)
    expected = scores.softmax(-1) @ value.float()
    assert (result.float() - expected).norm() < 0.02 * expected.norm()
