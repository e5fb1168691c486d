"""Random numbers that depend on the name of a parameter, and not on the process that draws them."""
import hashlib
from collections.abc import Iterator

import torch

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
