"""How the time and the memory of a training step grow with what it is made of, and the exponents of that growth.

    python bench/scaling.py                             the size small on random tokens, two processes at most
    python bench/scaling.py --size tiny --processes 1

One thing is varied at a time: tokens of a sample, samples of a step (in one micro-batch), layers, processes (for the
same step). Each point is a process of its own, or several. `memory` is the most that a process held above what it had
before the model was made, with freed memory given back at once. An exponent is the slope of a straight line through the
logarithms.
"""
import dataclasses
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.common import FRUGAL, dtype_of, random_model, random_samples, synchronize
from build import build_engine
from distributed import Processes, free_port
from settings import run, setting, unknown_name
from stages import shape
from train import peak_memory, take_step
from train_settings import TrainSettings


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

    def problems(self):
        return unknown_name("size", self.size)


@dataclass(frozen=True)
class Point:
    """One measurement."""
    seq_length: int
    samples: int
    layers: int
    processes: int = 1


def measure(rank, s, point, port, queue):
    """Takes the steps of a point; rank 0 puts (seconds, bytes) on the queue."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(point.processes), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(point.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = dataclasses.replace(shape(s.size), num_hidden_layers=point.layers)
    settings = TrainSettings(zero=s.zero, dtype=s.dtype, micro_batch_tokens=1 << 30, micro_step_slots=1 << 30)
    with Processes() as world:
        before = peak_memory(world)
        engine = build_engine(settings, random_model(config, world.device, dtype_of(settings)), world)
        generator, times = np.random.default_rng(0), []
        for _ in range(1 + s.steps):
            samples = random_samples(generator, config, point.samples, point.seq_length)
            began = time.perf_counter()
            take_step(settings, engine, samples, world)
            synchronize(world.device)
            times.append(time.perf_counter() - began)
        if world.rank == 0:
            queue.put((statistics.median(times[1:]), peak_memory(world) - before))


def main(s):
    """Prints a table for each thing that is varied."""
    os.environ.update(FRUGAL)
    layers = shape(s.size).num_hidden_layers
    base = Point(s.seq_length, s.samples, layers)
    print(f"{s.size}, {s.samples} samples of {s.seq_length} tokens, {layers} layers, ZeRO-{s.zero}")
    for name in ("seq_length", "samples", "layers", "processes"):
        values = s.processes if name == "processes" else [round(getattr(base, name) * factor) for factor in s.factors]
        found = []
        print(f"{name:>10} {'seconds':>9} {'memory':>10}")
        for value in values:
            point = dataclasses.replace(base, **{name: value})
            context = torch.multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            torch.multiprocessing.spawn(measure, (s, point, free_port(), queue), nprocs=point.processes)
            found.append(queue.get())
            print(f"{value:>10} {found[-1][0]:>8.3f}s {found[-1][1] / 2**20:>7.0f}MiB", flush=True)
        if len(values) > 1:
            slopes = [np.polyfit(np.log(values), np.log(column), 1)[0] for column in zip(*found)]
            print(f"{'exponent':>10} {slopes[0]:>9.2f} {slopes[1]:>10.2f}", flush=True)


if __name__ == "__main__":
    run((ScalingBenchSettings, main), __doc__)
