"""Samples of weights from a posterior; tests/training/test_ivon.py has their distribution."""
import pytest
import torch

from common.files import UserError
from model.posterior import sample_posterior


def test_a_damaged_posterior():
    mean, precision = torch.zeros(5), torch.ones(5)
    assert sample_posterior(mean, precision, "key", "w").isfinite().all()
    for damaged in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="the posterior of w is damaged, a sample of it is not finite: copy"):
            sample_posterior(mean, torch.full((5,), damaged), "key", "w")
    with pytest.raises(UserError, match="the posterior of w is damaged"):
        sample_posterior(torch.tensor([0, 0, 0, 0, torch.inf]), precision, "key", "w")
