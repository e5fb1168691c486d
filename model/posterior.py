"""Draws of the weights from a Gaussian posterior."""
import hashlib

import torch

BLOCK = 1 << 20  # weights whose noise is drawn at once


def standard_normal(key, name, size, start, count, device):
    """Noise for the elements [start, start + count) of a flattened parameter of `size`: triples (low, high, noise).

    A piece is that of the elements low ≤ i < high, within one block of the parameter; a block's noise is drawn whole,
    whichever part of it is asked for. CPUs and GPUs draw different numbers.
    """
    for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(start + count, first + BLOCK)
        seed = int.from_bytes(hashlib.sha256(f"{key} {name} {block}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(min(BLOCK, size - first), generator=generator, device=device)
        yield low, high, noise[low - first:high - first]


def draw(mean, precision, key, name):
    """One draw of a parameter from its posterior, given mean and precision of the whole of it, flattened."""
    result = torch.empty_like(mean)
    for low, high, noise in standard_normal(key, name, len(mean), 0, len(mean), mean.device):
        torch.addcdiv(mean[low:high], noise, precision[low:high].sqrt(), out=result[low:high])
    return result
