"""Sampling weights from a Gaussian posterior with a diagonal covariance."""
import torch

from common.files import UserError
from model.checkpoint import is_finite
from model.noise import standard_normal


def sample_posterior(mean: torch.Tensor, precision: torch.Tensor, key: object, name: str) -> torch.Tensor:
    """Returns a sample of a whole parameter from its posterior. mean and precision are flattened.

    Raises UserError if the sample is not finite.
    """
    sample = torch.empty_like(mean)
    for low, high, noise in standard_normal(key, name, len(mean), 0, len(mean), mean.device):
        torch.addcdiv(mean[low:high], noise, precision[low:high].sqrt(), out=sample[low:high])
    if not is_finite(sample):
        raise UserError(f"the posterior of {name} is damaged, a sample of it is not finite: copy the checkpoint's "
                        "posterior-*.safetensors or train it again")
    return sample
