"""The 7B's shape on one GPU: speed beside what the card does in matrix products and beside transformers; memory.

    python bench/gpu.py                                   7B, random weights, sequences of 1,024, ZeRO-2 offloaded
    python bench/gpu.py --size 3b --offload false --zero 1      what fits without the host's memory
    python bench/gpu.py --size tiny --offload false --dtype fp32 --steps 3            also runs on a CPU

Ours and transformers' LlamaForCausalLM take the same steps under the same DeepSpeed configuration, on random tokens,
each as it is and with its blocks compiled. They run one after another, in a process each, since a card holds one. MFU
is 6·N FLOPs a token (in brackets 8·N, with the recomputed forward pass) over the rate of a square matrix product in the
same dtype, measured before.
"""
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.common import dtype_of, matrix_rate, our_step, random_model, random_samples, synchronize, their_step
from bench.pretraining import their_model
from build import build_engine
from distributed import Processes
from planner import GIB, Plan
from settings import run, setting, unknown_name
from stages import shape
from train import peak_memory
from train_settings import TrainSettings

WAYS = ("transformers", "transformers+compile", "ours", "ours+compile")


@dataclass(frozen=True)
class GpuBenchSettings:
    """Settings of the benchmark."""
    size: str = setting("7b", "size preset whose shape the model has")
    zero: Literal[0, 1, 2, 3] = setting(2, "ZeRO stage")
    offload: bool = setting(True, "keep the optimizer in the memory of the host")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "weights")
    seq_length: int = setting(1024, "tokens of a sample")
    global_batch_size: int = setting(64, "samples in a step")
    micro_batch_tokens: int = setting(8192, "most tokens in a micro-batch")
    gradient_checkpointing: bool = setting(True, "recompute blocks in the backward pass")
    steps: int = setting(5, "steps that are measured, after one that is not")
    ways: tuple[str, ...] = setting(WAYS, "what is measured; ratios are to the first")

    def problems(self):
        return unknown_name("size", self.size) + [f"unknown way {way!r}, expected one of {', '.join(WAYS)}"
                                                  for way in self.ways if way not in WAYS]


def engine(s, settings, way, world):
    """The engine on a model with new weights, ours or transformers'; its blocks have the same name in both."""
    make = random_model if way.startswith("ours") else their_model
    model = make(shape(s.size), world.device, dtype_of(settings))
    if s.gradient_checkpointing and make is random_model:
        model.model.gradient_checkpointing = True
    elif s.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if way.endswith("+compile"):
        for block in model.model.layers:
            block.compile()
    return build_engine(settings, model, world)


def measure(rank, s, way, queue):
    """Takes the steps of a way; puts (tokens a second, its share of the matrix products' rate, peak memory, losses,
    device) on the queue."""
    config = shape(s.size)
    settings = TrainSettings(zero=s.zero, offload=s.offload, dtype=s.dtype, micro_batch_tokens=s.micro_batch_tokens)
    with Processes() as world:
        rate = matrix_rate(world.device, dtype_of(settings))
        if way.startswith("ours"):
            step = our_step(settings, partial(engine, s, settings, way), world)
        else:
            step = partial(their_step, engine(s, settings, way, world),
                           batch_size=max(1, s.micro_batch_tokens // s.seq_length))
        generator, times, losses = np.random.default_rng(0), [], []
        for number in range(s.steps + 1):
            samples = random_samples(generator, config, s.global_batch_size, s.seq_length)
            began = time.perf_counter()
            losses.append(step(samples))
            synchronize(world.device)
            times.append(time.perf_counter() - began)
            print(f"{way}, step {number}: loss {losses[-1]:.4f}, {times[-1]:.2f} s", file=sys.stderr)
        speed = s.global_batch_size * s.seq_length / statistics.median(times[1:])
        queue.put((speed, config.flops(speed) / rate, peak_memory(world), losses, world.device.type))


def main(s):
    """Prints a line for each way, and the memory that was planned for ours."""
    context, found = torch.multiprocessing.get_context("spawn"), {}
    for way in s.ways:
        queue = context.SimpleQueue()
        torch.multiprocessing.spawn(measure, (s, way, queue))
        found[way] = queue.get()
    config, (first, *_, wanted, device) = shape(s.size), found[s.ways[0]]
    plan = Plan(config, 1, s.zero, s.offload, s.dtype, s.micro_batch_tokens, s.gradient_checkpointing, device)
    print(f"{config.num_parameters:,} parameters, {s.dtype} on {device}, {s.global_batch_size} × {s.seq_length} tokens "
          f"a step; planned for ours: {plan.total() / GIB:.2f} GiB")
    print(f"{'':<22} {'tokens/s':>9} {'ratio':>6} {'MFU':>16} {'memory':>11} {'losses apart':>13}")
    for way, (speed, used, memory, losses, _) in found.items():
        apart = max(abs(a / b - 1) for a, b in zip(losses, wanted))
        recomputed = used * plan.flops(1) / config.flops(1)
        print(f"{way:<22} {speed:>9,.0f} {speed / first:>6.2f} {used:>7.1%} ({recomputed:.1%}) "
              f"{memory / GIB:>7.2f} GiB {apart:>13.1e}")


if __name__ == "__main__":
    run((GpuBenchSettings, main), __doc__)
