"""The 7B's shape on one GPU: speed beside what the card does in matrix products and beside transformers; memory.

    python bench/gpu.py                                   7B, random weights, sequences of 1,024, ZeRO-2 offloaded
    python bench/gpu.py --size 3b --offload false --zero 1      what fits without the host's memory
    python bench/gpu.py --size tiny --offload false --dtype fp32 --steps 3            also runs on a CPU

Ours and transformers' LlamaForCausalLM take the same steps under the same DeepSpeed configuration, on random tokens,
each as it is and with its blocks compiled. They run one after another, in a process each, since a card holds one. MFU
is 6·N FLOPs a token (in brackets 8·N, with the recomputed forward pass) over the rate of a square matrix product in the
same dtype, which each process measures before, not over what the card's maker says. `optimizer` is the share of the
time that engine.step takes: offloaded, it is the same for all, and on the CPU. `memory` is the most of the steps after
the first.
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
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.pretraining import their_model
from bench.timing import dtype_of, matrix_rate, our_step, random_model, random_samples, synchronize, their_step
from common.distributed import Distributed
from common.settings import run, setting, unknown_name
from pipeline.jobs import shape
from pipeline.memory_plan import GIB, RUNTIME, MemoryPlan
from train import peak_memory
from training.engine import build_engine
from training.train_config import TrainConfig

WAYS = ("transformers", "transformers+compile", "ours", "ours+compile")


@dataclass(frozen=True)
class GpuBenchSettings:
    """Settings of the benchmark."""
    size: str = setting("7b", "size preset whose shape the model has")
    zero: Literal[1, 2, 3] = setting(2, "ZeRO stage")
    offload: bool = setting(True, "keep the optimizer in the memory of the host")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "weights")
    seq_length: int = setting(1024, "tokens of a sample")
    global_batch_size: int = setting(64, "samples in a step")
    max_tokens_per_microbatch: int = setting(8192, "most tokens in a micro-batch")
    gradient_checkpointing: bool = setting(True, "recompute blocks in the backward pass")
    steps: int = setting(5, "steps that are measured, after one that is not")
    ways: tuple[str, ...] = setting(WAYS, "what is measured; ratios are to the first that runs")

    def problems(self):
        found = unknown_name("size", self.size) + [f"unknown way {way!r}, expected one of {', '.join(WAYS)}"
                                                   for way in self.ways if way not in WAYS]
        return found + (["--offload false is needed with --zero 1"] if self.offload and self.zero < 2 else [])


def engine(cfg, settings, way, dist):
    """The engine on a model with new weights, ours or transformers'; its blocks have the same name in both."""
    make = random_model if way.startswith("ours") else their_model
    model = make(shape(cfg.size), dist.device, dtype_of(settings))
    if cfg.gradient_checkpointing and make is random_model:
        model.model.gradient_checkpointing = True
    elif cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if way.endswith("+compile"):
        for block in model.model.layers:
            block.compile()
    return build_engine(settings, model, dist)


def timed(function, device, seconds):
    """The function, adding to the list what each call takes."""
    def call():
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return call


def measure(rank, cfg, way, queue):
    """Takes the steps of a way; puts (tokens a second, the optimizer's share of the time, FLOPs a second of a matrix
    product, peak memory, losses) on the queue."""
    config = shape(cfg.size)
    settings = TrainConfig(zero=cfg.zero, offload=cfg.offload, dtype=cfg.dtype, max_tokens_per_microbatch=cfg.max_tokens_per_microbatch)
    with Distributed() as dist:
        product, built = matrix_rate(dist.device, dtype_of(settings)), engine(cfg, settings, way, dist)
        step = partial(our_step, settings=settings, dist=dist) if way.startswith("ours") else \
            partial(their_step, batch_size=max(1, cfg.max_tokens_per_microbatch // cfg.seq_length))
        generator, times, stepping, losses = np.random.default_rng(0), [], [], []
        built.step = timed(built.step, dist.device, stepping)
        for number in range(cfg.steps + 1):
            samples = random_samples(generator, config, cfg.global_batch_size, cfg.seq_length)
            began = time.perf_counter()
            losses.append(step(built, samples))
            synchronize(dist.device)
            times.append(time.perf_counter() - began)
            print(f"{way}, step {number}: loss {losses[-1]:.4f}, {times[-1]:.2f} s", file=sys.stderr)
            if number == 0 and dist.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        speed = cfg.global_batch_size * cfg.seq_length / statistics.median(times[1:])
        queue.put((speed, sum(stepping[1:]) / sum(times[1:]), product, peak_memory(dist), losses))


def main(cfg):
    """Prints the memory that is planned for ours, and a line for each way."""
    context, config, first = torch.multiprocessing.get_context("spawn"), shape(cfg.size), None
    device, name = ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "a CPU")
    plan = MemoryPlan(config, 1, cfg.zero, cfg.offload, cfg.dtype, cfg.max_tokens_per_microbatch, cfg.gradient_checkpointing, device,
                sample_tokens=cfg.seq_length)
    counted = plan.total() - (RUNTIME["cuda"] if device == "cuda" else 0)  # torch does not count CUDA's own
    print(f"{config.num_parameters:,} parameters, {cfg.dtype} on {name}, {cfg.global_batch_size} × {cfg.seq_length} tokens a "
          f"step; planned for ours: {counted / GIB:.2f} GiB, and {plan.host() / GIB:.2f} GiB of the host")
    print(f"{'':<22} {'tokens/s':>9} {'ratio':>6} {'TFLOP/s':>8} {'a product':>9} {'MFU':>16} {'optimizer':>9} "
          f"{'memory':>11} {'losses apart':>13}")
    for way in cfg.ways:
        queue = context.SimpleQueue()
        try:
            torch.multiprocessing.spawn(measure, (cfg, way, queue))
        except (ProcessRaisedException, ProcessExitedException) as error:
            print(error, file=sys.stderr)
            print(f"{way:<22} failed", flush=True)
            continue
        speed, optimizer, product, memory, losses = queue.get()
        first = first or (speed, losses)
        used, again = config.flops(speed), plan.flops(1) / config.flops(1)
        apart = max(abs(a / b - 1) for a, b in zip(losses, first[1]))
        print(f"{way:<22} {speed:>9,.0f} {speed / first[0]:>6.2f} {used / 1e12:>8.2f} {product / 1e12:>9.2f} "
              f"{used / product:>7.1%} ({again * used / product:.1%}) {optimizer:>9.1%} {memory / GIB:>7.2f} GiB "
              f"{apart:>13.1e}", flush=True)


if __name__ == "__main__":
    run((GpuBenchSettings, main), __doc__)
