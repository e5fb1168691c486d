"""Pruning of the change that training has made: FAPM (Huang et al., arXiv 2509.08255)."""
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from training.run import Run
from training.zero_shards import local_fragments

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def fapm_prune(run: Run, engine: "DeepSpeedEngine", anchors: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """FAPM (arXiv 2509.08255): gives a share of each matrix's weights their initial values again, those with the
    smallest |Δw| − mean|w₀| · |Δw| / |w₀|: small changes, and changes that are large compared to the weight. Norms and
    biases keep their change, while the authors' code prunes all parameters."""
    fragments = {fragment.name: fragment for fragment in local_fragments(engine)}
    part = 1.0 if engine.zero_optimization() else 1 / run.dist.world_size  # without ZeRO every rank has all of them
    for name, shape in run.trained.items():
        if len(shape) != 2:
            continue
        size, fragment = math.prod(shape), fragments.get(name)
        start, trained = (fragment.of(anchors[fragment.flat]), fragment.of(fragment.flat)) if fragment else \
            (torch.empty(0), torch.empty(0))
        mean = run.dist.all_reduce_sum(part * start.abs().double().sum())[0] / size
        change = (trained - start).abs()
        score = ordered(change - mean * (change / start.abs()).nan_to_num())
        limit = smallest_bound(partial(count_at_most, run, score, part), run.cfg.fapm_sparsity * size)
        trained.copy_(torch.where(score <= limit, start, trained))


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of some fp32 values."""
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def count_at_most(run: Run, score: torch.Tensor, part: float, bound: int) -> float:
    """The number of scores, over all ranks, that are at most `bound`."""
    return run.dist.all_reduce_sum(part * (score <= bound).sum())[0]


def smallest_bound(count: Callable[[int], float], wanted: float) -> int:
    """The smallest int32 with count(bound) >= wanted, for a count that never falls."""
    low, high = -(1 << 31), (1 << 31) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= wanted else (middle + 1, high)
    return low
