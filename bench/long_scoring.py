"""Losses of long texts compared with the forward pass of training: tokens per second of each.

    python bench/long_scoring.py                                the size small on random tokens
    python bench/long_scoring.py --checkpoint DIR --tokens 4096

The texts are windows of random tokens, as held-out loss and `loglikelihood_rolling` score them. The forward pass
computes the loss of the same windows in batches of as many tokens as one of our passes, without gradients. Both take
turns.
"""
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import timed
from bench.workload import random_samples
from common.distributed import Distributed
from common.scripts import run
from common.settings import setting
from model.checkpoint import materialize_model
from model.config import size_config
from model.hub import load_model
from model.token_losses import sample_losses
from model.transformer import initial_weights

PASS_TOKENS = 4096  # of sample_losses


@dataclass(frozen=True)
class LongScoringBenchConfig:
    """Settings of the benchmark."""
    checkpoint: str | None = setting(None, "checkpoint directory; none: random weights of --size")
    size: str = setting("small", "size preset that gives the model's shape", names="size")
    lengths: tuple[int, ...] = setting((256, 512, 1024, 2048), "tokens of a window", at_least=1)
    tokens: int = setting(16_384, "tokens of all windows of a length", at_least=1)
    dtypes: tuple[str, ...] = setting(("float32", "bfloat16"), "dtypes of the weights, as in torch")
    repeats: int = setting(5, "measurements, after one that does not count", at_least=1)


def make_model(cfg, dtype, device):
    """The model in a dtype."""
    if cfg.checkpoint:
        return load_model(cfg.checkpoint, dtype, device)
    config = size_config(cfg.size)
    return materialize_model(config, ((name, tensor.to(device, dtype)) for name, tensor in initial_weights(config, 0)))


@torch.no_grad()
def forward_losses(model, windows, device):
    """The summed losses of equally long windows by the forward pass of training."""
    rows = max(1, PASS_TOKENS // (len(windows[0][0]) - 1))
    ids = torch.tensor(np.stack([ids for ids, _ in windows])).to(device)
    return sum(float(model(batch[:, :-1], batch[:, 1:])) for batch in ids.split(rows))


def main(cfg):
    """Prints a line for each dtype and length."""
    generator = np.random.default_rng(0)
    with Distributed() as dist:
        print(f"{dist.device.type}, {torch.get_num_threads()} threads; tokens per second, medians of {cfg.repeats}")
        print(f"{'dtype':<9} {'window':>6} {'forward pass':>12} {'scoring':>9} {'ratio':>6} {'loss difference':>15}")
        for name in cfg.dtypes:
            model = make_model(cfg, getattr(torch, name), dist.device)
            for length in cfg.lengths:
                windows = random_samples(generator, model.config, max(1, cfg.tokens // length), length)
                runs = [(timed(forward_losses, model, windows, dist.device), timed(sample_losses, model, windows))
                        for _ in range(1 + cfg.repeats)][1:]
                forward, ours = (len(windows) * length / statistics.median(run[index][0] for run in runs)
                                 for index in (0, 1))
                loss, (sums, _) = (run[1] for run in runs[0])
                print(f"{name:<9} {length:>6} {forward:>12,.0f} {ours:>9,.0f} {ours / forward:>6.2f} "
                      f"{abs(sums.sum() / loss - 1):>15.1e}", flush=True)


if __name__ == "__main__":
    run((LongScoringBenchConfig, main), __doc__)
