"""Growth of the time and memory of a training step with its parts, and the exponents of that growth.

    python bench/scaling.py                             the size small on random tokens, one and two processes
    python bench/scaling.py --size tiny --processes 1

Each table varies one quantity: the tokens of a sample, the samples of a step (in one micro-batch), the layers, or the
processes (for the same step; on GPUs at most one per GPU). Each point is measured in new processes, `rounds` times in
alternation. `memory` is the most that a process held beyond what it held before the model was made. It is measured in
a separate run that returns freed memory at once, which takes time. An exponent is the slope of a straight line fitted
to the logarithms.
"""
import dataclasses
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import timed
from bench.workload import FRUGAL_MALLOC, make_our_step, random_samples
from common.distributed import Distributed, free_port
from common.scripts import run
from common.settings import setting
from model.config import size_config
from training.deepspeed_config import import_deepspeed
from training.engine import peak_memory
from training.train_config import TrainConfig


@dataclass(frozen=True)
class ScalingBenchConfig:
    """Settings of the benchmark."""
    size: str = setting("small", "size preset that gives the model's shape", names="size")
    seq_length: int = setting(256, "tokens of a sample, unless they are varied", at_least=1)
    samples: int = setting(8, "samples of a step, unless they are varied", at_least=1)
    lengths: tuple[int, ...] = setting((128, 256, 512, 1024, 2048), "tokens of a sample, where they are varied",
                                       at_least=1)
    factors: tuple[float, ...] = setting((0.5, 1, 2, 4), "factors for samples and layers", above=0)
    processes: tuple[int, ...] = setting((1, 2), "numbers of processes", at_least=1)
    zero: Literal[0, 1, 2, 3] = setting(1, "ZeRO stage")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 if the hardware multiplies it")
    steps: int = setting(5, "steps to measure, after one that is not measured", at_least=1)
    rounds: int = setting(2, "measurements of each point", at_least=1)


@dataclass(frozen=True)
class ScalingPoint:
    """One measurement."""
    seq_length: int
    samples: int
    layers: int
    processes: int = 1


def measure_point(rank, cfg, point, port, queue):
    """Takes the steps of a point; rank 0 puts (seconds of each step, bytes) on the queue."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(point.processes), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(point.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = size_config(cfg.size, point.layers)
    train_cfg = TrainConfig(zero=cfg.zero, dtype=cfg.dtype, max_tokens_per_microbatch=1 << 30,
                            microbatch_overhead_tokens=1 << 30)
    with Distributed() as dist:
        import_deepspeed(dist.device)
        before, generator = peak_memory(dist.device), np.random.default_rng(0)
        step = make_our_step(train_cfg, config, dist)
        seconds = [timed(step, random_samples(generator, config, point.samples, point.seq_length))[0]
                   for _ in range(1 + cfg.steps)]
        if dist.rank == 0:
            queue.put((seconds[1:], peak_memory(dist.device) - before))


def run_point(cfg, point):
    """The result of `measure_point` in new processes."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(measure_point, (cfg, point, free_port(), queue), nprocs=point.processes)
    return queue.get()


def main(cfg):
    """Prints a table for each quantity that is varied."""
    layers = size_config(cfg.size).num_hidden_layers
    base = ScalingPoint(cfg.seq_length, cfg.samples, layers)
    columns = {"seq_length": list(cfg.lengths)} | {
        name: [round(getattr(base, name) * factor) for factor in cfg.factors] for name in ("samples", "layers")}
    columns["processes"] = [count for count in cfg.processes if count <= (torch.cuda.device_count() or count)]
    seconds = {dataclasses.replace(base, **{name: value}): [] for name, column in columns.items() for value in column}
    for _ in range(cfg.rounds):
        for point, values in tqdm(seconds.items(), "time", leave=False):
            values += run_point(cfg, point)[0]
    with patch.dict(os.environ, FRUGAL_MALLOC):
        memory = {point: run_point(cfg, point)[1] for point in tqdm(seconds, "memory", leave=False)}
    print(f"{cfg.size}, {cfg.samples} samples of {cfg.seq_length} tokens, {layers} layers, ZeRO-{cfg.zero}")
    for name, column in columns.items():
        points = [dataclasses.replace(base, **{name: value}) for value in column]
        rows = [(statistics.median(seconds[point]), memory[point]) for point in points]
        print(f"{name:>10} {'seconds':>9} {'a token':>10} {'memory':>10}")
        for value, point, (median, peak) in zip(column, points, rows):
            token = median / (point.samples * point.seq_length)
            print(f"{value:>10} {median:>8.3f}s {1e6 * token:>8.0f}µs {peak / 2**20:>7.0f}MiB")
        if len(column) > 1:
            slopes = [np.polyfit(np.log(column), np.log(values), 1)[0] for values in zip(*rows)]
            print(f"{'exponent':>10} {slopes[0]:>9.2f} {slopes[1]:>21.2f}")


if __name__ == "__main__":
    run((ScalingBenchConfig, main), __doc__)
