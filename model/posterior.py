"""Sampling weights from a Gaussian posterior with a diagonal covariance."""
import hashlib
from collections.abc import Iterator

import torch

from common.files import UserError
from model.checkpoint import is_finite

BLOCK = 1 << 20  # elements of a parameter whose noise comes from one generator


def named_generator(key: object, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator of random numbers that are a function of (key, name)."""
    seed = int.from_bytes(hashlib.sha256(f"{key} {name}".encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(seed)


def standard_normal(key: object, name: str, size: int, start: int, count: int,
                    device: torch.device | str) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields standard normal noise for elements [start, start + count) of a flattened parameter of `size` elements.

    Each item is (low, high, noise) with the noise of elements [low, high), which lie within one block. The noise is a
    function of (key, name, element): a block is always sampled as a whole. CPUs, GPUs and other models of GPUs sample
    different numbers.
    """
    for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(start + count, first + BLOCK)
        generator = named_generator(key, f"{name} {block}", device)
        noise = torch.randn(min(BLOCK, size - first), generator=generator, device=device)
        yield low, high, noise[low - first:high - first]


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
