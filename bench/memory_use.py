"""The planned memory of training compared with the memory that runs take on this machine's CPUs.

    python bench/memory_use.py --data DIR/simp.json --folder /tmp/memory                        the size small
    python bench/memory_use.py --data DIR/simp.json --folder /tmp/memory --checkpoint DIR       and your own checkpoint

Fine-tunes for a few steps under each ZeRO stage with each number of processes, plainly and with each of `methods`, and
compares the peak memory of rank 0 (ru_maxrss, in run.json) with the plan of pipeline/memory_plan.py. The size small has
random weights. The plan counts what tensors hold, as torch.cuda.max_memory_allocated does. The runs therefore return
freed memory at once, unless `--plain` is given.
"""
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.workload import FRUGAL_MALLOC, SimpBenchConfig, run_train, small_checkpoint
from common.scripts import run
from common.settings import setting
from corpus.tasks import SFTDataset, read_task
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from pipeline.jobs import optional_flags
from pipeline.memory_plan import GIB, MemoryPlan
from pipeline.plan import PlanConfig, run_settings, trained_parameters
from training.batches import count_tokens
from training.train_config import TrainConfig

SAMPLES = 128


@dataclass(frozen=True)
class MemoryBenchConfig(SimpBenchConfig):
    """Settings of the comparison."""
    checkpoint: str | None = setting(None, "checkpoint to fine-tune, in addition to one of the size small")
    stages: tuple[int, ...] = setting((0, 1, 2, 3), "ZeRO stages; bf16 only with those above 0", at_least=0, at_most=3)
    dtypes: tuple[str, ...] = setting(("fp32", "bf16"), "dtypes of the weights; bf16 is slow on a CPU without "
                                                        "instructions for it", names=("fp32", "bf16"))
    processes: tuple[int, ...] = setting((1, 2), "numbers of processes", at_least=1)
    methods: tuple[str, ...] = setting(("lora", "expansion"), "methods that train a part of the model", names="method")
    max_tokens_per_microbatch: int = setting(1024, "most tokens in a micro-batch, padding included", at_least=1)
    plain: bool = setting(False, "do not change the settings of the allocator")


def measured_memory(cfg, checkpoint, zero, processes, dtype, method):
    """Peak bytes of rank 0 in a run of two steps, with full micro-batches in which every token is a target."""
    result, _ = run_train(
        processes, Path(cfg.folder) / "run", "--init", checkpoint, "--data", cfg.data, "--zero", zero, "--dtype", dtype,
        "--max_steps", 2, "--global_batch_size", 64, "--max_train_samples", SAMPLES, "--max_eval_samples", 8,
        "--max_tokens_per_microbatch", cfg.max_tokens_per_microbatch, "--train_on_source",
        *optional_flags(method=method))
    return result["peak_memory_bytes"]


def longest_sample(cfg, checkpoint):
    """Tokens of the longest sample of these runs."""
    items = read_task(cfg.data)[0]["train"][:SAMPLES]
    samples = SFTDataset(items, Tokenizer(checkpoint), TrainConfig.max_source_length, TrainConfig.max_target_length)
    return max(count_tokens([sample])[0] for sample in samples)


def main(cfg):
    """Prints a line for each run: planned and measured memory, and the relative error of the plan."""
    os.environ.update({} if cfg.plain else FRUGAL_MALLOC)
    checkpoints = {"small": small_checkpoint(cfg.folder)}
    checkpoints |= {"checkpoint": cfg.checkpoint} if cfg.checkpoint else {}
    print(f"{'model':<12} {'method':<10} {'trained':>7} {'dtype':<5} {'ZeRO':>4} {'processes':>9} {'states':>9} "
          f"{'planned':>9} {'measured':>9} {'error':>7}")
    largest = 0.0
    for name, checkpoint in checkpoints.items():
        config, tokens = ModelConfig.read(Path(checkpoint) / "config.json"), longest_sample(cfg, checkpoint)
        for method, zero, processes, dtype in itertools.product((None, *cfg.methods), cfg.stages, cfg.processes,
                                                                cfg.dtypes):
            if zero == 0 and dtype == "bf16":
                continue
            settings = run_settings(PlanConfig(method=method))
            grown, trained = trained_parameters(config, settings)
            plan = MemoryPlan(grown, processes, zero, offload=False, dtype=dtype,
                              max_tokens_per_microbatch=cfg.max_tokens_per_microbatch, gradient_checkpointing=False,
                              device="cpu", settings=settings, sample_tokens=tokens, trained=trained)
            measured = measured_memory(cfg, checkpoint, zero, processes, dtype, method)
            error = plan.total() / measured - 1
            largest = max(largest, abs(error))
            states = plan.memory()["fp32 weights and moments"] + plan.gradients()
            share = plan.num_trained / plan.num_stored
            print(f"{name:<12} {method or 'finetune':<10} {share:7.1%} {dtype:<5} {zero:>4} {processes:>9} "
                  f"{states / GIB:8.2f}G {plan.total() / GIB:8.2f}G {measured / GIB:8.2f}G {error:+7.1%}", flush=True)
    print(f"largest error: {largest:.1%}")


if __name__ == "__main__":
    run((MemoryBenchConfig, main), __doc__)
