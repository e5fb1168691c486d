"""Logits that are not finite are an error wherever they are used."""
import pytest
import torch

from common.files import UserError
from model.generation import GenerationConfig, generate
from model.logits import finite_logits
from model.loglikelihood import log_likelihoods
from tests.conftest import random_model

USES = {"log_likelihoods": lambda model: log_likelihoods(model, [([5, 6], [7]), ([5], [8])]),
        "greedy": lambda model: generate(model, [[5, 6]], GenerationConfig(3)),
        "sampling": lambda model: generate(model, [[5, 6]], GenerationConfig(3, do_sample=True, top_k=5)),
        "beams": lambda model: generate(model, [[5, 6]], GenerationConfig(3, num_beams=2))}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(use, value):
    model = random_model()
    USES[use](model)
    with torch.no_grad():
        model.lm_head.weight[9, 0] = value  # token 9 is neither a target nor the most probable token
    with pytest.raises(UserError, match="the model's logits are not finite .*: the weights are damaged: copy the"):
        USES[use](model)


def test_overflow_of_a_smaller_dtype():
    model = random_model().bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    with pytest.raises(UserError, match=r"damaged, or too large for torch.bfloat16: try --dtype fp32"):
        finite_logits(model, torch.full((1, 32), 1e3, dtype=torch.bfloat16))


def test_equals_the_head():
    model = random_model()
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(finite_logits(model, hidden), model.lm_head(hidden))
