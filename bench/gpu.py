"""The 7B's shape on one GPU: speed beside what the card does in matrix products, memory beside the planner's.

    python bench/gpu.py                                   7B, random weights, sequences of 1,024, ZeRO-2 offloaded
    python bench/gpu.py --size 3b --offload false --zero 1      what fits without the host's memory
    python bench/gpu.py --size tiny --offload false --dtype fp32 --steps 3            also runs on a CPU

A step is train.py's own, on random tokens. MFU is 6·N FLOPs a token (8·N with the recomputed forward pass, in brackets)
over the rate of a square matrix product in the same dtype, measured before.
"""
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.common import dtype_of, matrix_rate, random_model, random_samples, synchronize
from build import build_engine
from distributed import Processes
from planner import GIB, Plan
from settings import run, setting, unknown_name
from stages import shape
from train import peak_memory, take_step
from train_settings import TrainSettings


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

    def problems(self):
        return unknown_name("size", self.size)


def main(s):
    """Prints speed, MFU and memory."""
    config = shape(s.size)
    settings = TrainSettings(zero=s.zero, offload=s.offload, dtype=s.dtype, micro_batch_tokens=s.micro_batch_tokens)
    dtype = dtype_of(settings)
    with Processes() as world:
        rate = matrix_rate(world.device, dtype)
        model = random_model(config, world.device, dtype)
        model.model.gradient_checkpointing = s.gradient_checkpointing
        engine = build_engine(settings, model, world)
        generator, times = np.random.default_rng(0), []
        for step in range(s.steps + 1):
            batch = random_samples(generator, config, s.global_batch_size, s.seq_length)
            began = time.perf_counter()
            take_step(settings, engine, batch, world)
            synchronize(world.device)
            times.append(time.perf_counter() - began)
            print(f"step {step}: {times[-1]:.2f} s", flush=True)
        speed = s.global_batch_size * s.seq_length / statistics.median(times[1:])
        plan = Plan(config, 1, s.zero, s.offload, s.dtype, s.micro_batch_tokens, s.gradient_checkpointing,
                    world.device.type)
        used = config.flops(speed) / rate
        print(f"{config.num_parameters:,} parameters, {s.dtype} on {world.device.type}: {speed:,.0f} tokens/s, MFU "
              f"{used:.1%} ({plan.flops(speed) / rate:.1%}) of {rate / 1e12:.1f} TFLOP/s; peak memory "
              f"{peak_memory(world) / GIB:.2f} GiB, planned {sum(plan.memory().values()) / GIB:.2f}")


if __name__ == "__main__":
    run((GpuBenchSettings, main), __doc__)
