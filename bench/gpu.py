"""The 7B's shape on one GPU: speed compared with matrix products and with transformers, and memory.

    python bench/gpu.py                                   7B, random weights, sequences of 1,024, ZeRO-2 with offload
    python bench/gpu.py --size 3b --offload false --zero 1      a model that fits without host memory
    python bench/gpu.py --size tiny --offload false --dtype fp32 --steps 3            also runs on a CPU

This project and transformers' LlamaForCausalLM take the same steps on random tokens under the same DeepSpeed
configuration, each eager and with compiled blocks. A GPU holds one model, so the variants run one after another, each
in its own process. Columns:

    MFU          6·N FLOPs per token (in brackets 8·N, with the recomputed forward pass), over the rate of a square
                 matrix product in the same dtype, which each process measures first. It is not the data sheet's rate.
    optimizer    the share of the time spent in engine.step; with offload it runs on the CPU, the same for all variants
    memory       the peak of all steps but the first
"""
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import matrix_rate, timed
from bench.workload import make_run, random_samples, transformers_model, transformers_step
from common.distributed import Distributed
from common.scripts import run
from common.settings import setting
from model.config import size_config
from pipeline.memory_plan import GIB, RUNTIME, MemoryPlan
from train import train_step
from training.engine import build_engine, build_model, peak_memory
from training.train_config import TrainConfig

VARIANTS = ("transformers", "transformers+compile", "ours", "ours+compile")


@dataclass(frozen=True)
class GpuBenchConfig:
    """Settings of the benchmark."""
    size: str = setting("7b", "size preset that gives the model's shape", names="size")
    zero: Literal[1, 2, 3] = setting(2, "ZeRO stage")
    offload: bool = setting(True, "keep the optimizer in host memory")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "weights")
    seq_length: int = setting(1024, "tokens of a sample", at_least=1)
    global_batch_size: int = setting(64, "samples in a step", at_least=1)
    max_tokens_per_microbatch: int = setting(8192, "most tokens in a micro-batch", at_least=1)
    gradient_checkpointing: bool = setting(True, "recompute blocks in the backward pass")
    steps: int = setting(5, "steps to measure, after one that is not measured", at_least=1)
    variants: tuple[str, ...] = setting(VARIANTS, "variants to measure; ratios are relative to the first that runs",
                                        names=VARIANTS)

    def problems(self):
        return ["--offload false is needed with --zero 1"] if self.offload and self.zero < 2 else []


def measure_variant(rank, cfg, variant, queue):
    """Takes the steps of a variant; puts (tokens per second, the optimizer's share of the time, FLOP/s of a matrix
    product, peak memory, losses) on the queue."""
    config, ours = size_config(cfg.size), variant.startswith("ours")
    train_cfg = TrainConfig(zero=cfg.zero, offload=cfg.offload, dtype=cfg.dtype,
                            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
                            gradient_checkpointing=cfg.gradient_checkpointing)
    with Distributed() as dist:
        bench_run = make_run(train_cfg, dist, config)
        product = matrix_rate(dist.device, bench_run.dtype, repeats=min(20, 4 * cfg.steps))  # fewer in a short run
        model = build_model(bench_run) if ours else transformers_model(bench_run)
        if variant.endswith("+compile"):
            for block in model.model.layers:  # of the same name in both
                block.compile()
        engine = build_engine(bench_run, model)
        step = (lambda samples: train_step(bench_run, engine, [samples]).loss) if ours else \
            partial(transformers_step, engine, max(1, cfg.max_tokens_per_microbatch // cfg.seq_length))
        generator, seconds, optimizer_seconds, losses = np.random.default_rng(0), [], [], []
        engine_step = engine.step
        engine.step = lambda: optimizer_seconds.append(timed(engine_step)[0])
        for number in range(cfg.steps + 1):
            took, loss = timed(step, random_samples(generator, config, cfg.global_batch_size, cfg.seq_length))
            seconds.append(took)
            losses.append(loss)
            print(f"{variant}, step {number}: loss {loss:.4f}, {took:.2f} s", file=sys.stderr)
            if number == 0 and dist.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        speed = cfg.global_batch_size * cfg.seq_length / statistics.median(seconds[1:])
        queue.put((speed, sum(optimizer_seconds[1:]) / sum(seconds[1:]), product, peak_memory(dist.device), losses))


def main(cfg):
    """Prints the planned memory, and a line for each variant."""
    context, config, first = torch.multiprocessing.get_context("spawn"), size_config(cfg.size), None
    device, name = ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "a CPU")
    plan = MemoryPlan(config, 1, cfg.zero, cfg.offload, cfg.dtype, cfg.max_tokens_per_microbatch,
                      cfg.gradient_checkpointing, device, sample_tokens=cfg.seq_length)
    counted = plan.total() - (RUNTIME["cuda"] if device == "cuda" else 0)  # torch does not count the CUDA context
    print(f"{config.num_parameters:,} parameters, {cfg.dtype} on {name}, {cfg.global_batch_size} × {cfg.seq_length} "
          f"tokens a step; planned for ours: {counted / GIB:.2f} GiB, and {plan.host() / GIB:.2f} GiB of host memory")
    print(f"{'':<22} {'tokens/s':>9} {'ratio':>6} {'TFLOP/s':>8} {'a product':>9} {'MFU':>16} {'optimizer':>9} "
          f"{'memory':>11} {'loss diff.':>11}")
    for variant in cfg.variants:
        queue = context.SimpleQueue()
        try:
            torch.multiprocessing.spawn(measure_variant, (cfg, variant, queue))
        except (ProcessRaisedException, ProcessExitedException) as error:
            print(error, file=sys.stderr)
            print(f"{variant:<22} failed", flush=True)
            continue
        speed, optimizer, product, memory, losses = queue.get()
        first = first or (speed, losses)
        flops, recompute = config.flops(speed), 1 + plan.gradient_checkpointing / 3
        difference = max(abs(a / b - 1) for a, b in zip(losses, first[1]))
        print(f"{variant:<22} {speed:>9,.0f} {speed / first[0]:>6.2f} {flops / 1e12:>8.2f} {product / 1e12:>9.2f} "
              f"{flops / product:>7.1%} ({recompute * flops / product:.1%}) {optimizer:>9.1%} {memory / GIB:>7.2f} GiB "
              f"{difference:>11.1e}", flush=True)


if __name__ == "__main__":
    run((GpuBenchConfig, main), __doc__)
