"""How the time and the memory of a training step grow with what it is made of, and the exponents of that growth.

    python bench/scaling.py                             the size small on random tokens, two processes at most
    python bench/scaling.py --size tiny --processes 1

One thing is varied at a time: tokens of a sample, samples of a step (in one micro-batch), layers, processes (for the
same step; on GPUs as many as there are). Each point is a process of its own, or several, and is measured `rounds`
times, in turns. `memory` is the most that a process held above what it had before the model was made, in a run of its
own in which freed memory is given back at once, which takes time. An exponent is the slope of a straight line through
the logarithms.
"""
import dataclasses
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import FRUGAL, dtype_of, random_model, random_samples, synchronize
from common.distributed import Distributed, free_port
from common.settings import run, setting, unknown_name
from pipeline.jobs import shape
from train import peak_memory, train_step
from training.engine import build_engine, import_deepspeed
from training.train_config import TrainConfig


@dataclass(frozen=True)
class ScalingBenchSettings:
    """Settings of the benchmark."""
    size: str = setting("small", "size preset whose shape the model has")
    seq_length: int = setting(256, "tokens of a sample, where something else is varied")
    samples: int = setting(8, "samples of a step, where something else is varied")
    factors: tuple[float, ...] = setting((0.5, 1, 2, 4), "what tokens, samples and layers are multiplied by")
    processes: tuple[int, ...] = setting((1, 2), "numbers of processes")
    zero: int = setting(1, "ZeRO stage")
    dtype: str = setting("auto", "dtype of the weights")
    steps: int = setting(5, "steps that are measured, after one that is not")
    rounds: int = setting(2, "times that the steps of each point are measured")

    def problems(self):
        return unknown_name("size", self.size)


@dataclass(frozen=True)
class Point:
    """One measurement."""
    seq_length: int
    samples: int
    layers: int
    processes: int = 1


def measure(rank, cfg, point, port, queue):
    """Takes the steps of a point; rank 0 puts (the seconds of each, bytes) on the queue."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(point.processes), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(point.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = dataclasses.replace(shape(cfg.size), num_hidden_layers=point.layers)
    settings = TrainConfig(zero=cfg.zero, dtype=cfg.dtype, max_tokens_per_microbatch=1 << 30, microbatch_overhead_tokens=1 << 30)
    with Distributed() as dist:
        import_deepspeed(dist)
        before = peak_memory(dist)
        engine = build_engine(settings, random_model(config, dist.device, dtype_of(settings)), dist)
        generator, times = np.random.default_rng(0), []
        for _ in range(1 + cfg.steps):
            samples = random_samples(generator, config, point.samples, point.seq_length)
            began = time.perf_counter()
            train_step(settings, engine, samples, dist)
            synchronize(dist.device)
            times.append(time.perf_counter() - began)
        if dist.rank == 0:
            queue.put((times[1:], peak_memory(dist) - before))


def run_point(cfg, point):
    """What `measure` finds in new processes."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(measure, (cfg, point, free_port(), queue), nprocs=point.processes)
    return queue.get()


def main(cfg):
    """Prints a table for each thing that is varied."""
    layers = shape(cfg.size).num_hidden_layers
    base = Point(cfg.seq_length, cfg.samples, layers)
    values = {name: [round(getattr(base, name) * factor) for factor in cfg.factors]
              for name in ("seq_length", "samples", "layers")}
    values["processes"] = [count for count in cfg.processes if count <= (torch.cuda.device_count() or count)]
    points = {dataclasses.replace(base, **{name: value}): [] for name, column in values.items() for value in column}
    for _ in range(cfg.rounds):
        for point, times in tqdm(points.items(), "time", leave=False):
            times += run_point(cfg, point)[0]
    with patch.dict(os.environ, FRUGAL):
        memory = {point: run_point(cfg, point)[1] for point in tqdm(points, "memory", leave=False)}
    print(f"{cfg.size}, {cfg.samples} samples of {cfg.seq_length} tokens, {layers} layers, ZeRO-{cfg.zero}")
    for name, column in values.items():
        found = [dataclasses.replace(base, **{name: value}) for value in column]
        found = [(statistics.median(points[point]), memory[point]) for point in found]
        print(f"{name:>10} {'seconds':>9} {'memory':>10}")
        for value, (seconds, held) in zip(column, found):
            print(f"{value:>10} {seconds:>8.3f}s {held / 2**20:>7.0f}MiB")
        if len(column) > 1:
            slopes = [np.polyfit(np.log(column), np.log(figures), 1)[0] for figures in zip(*found)]
            print(f"{'exponent':>10} {slopes[0]:>9.2f} {slopes[1]:>10.2f}")


if __name__ == "__main__":
    run((ScalingBenchSettings, main), __doc__)
