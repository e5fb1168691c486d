"""The planner's memory beside what runs take on this machine's CPUs.

    python bench/memory_use.py --checkpoint DIR --data DIR/simp.json --folder /tmp/memory       and the size `small` with it

Fine-tunes for a few steps under each ZeRO stage and number of processes, and compares the most memory that rank 0 held
(ru_maxrss, in run.json) with what planner.py says. For `small` a checkpoint with random weights is made. The plan is of
what tensors hold, as torch.cuda.max_memory_allocated counts it; for the process's memory to be that, freed memory is
given back at once (--plain: as it comes).
"""
import itertools
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import FRUGAL, small_checkpoint, train
from common.files import read_json
from common.settings import run, setting
from corpus.tasks import SFTDataset, read_task
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from pipeline.memory_plan import GIB, MemoryPlan
from training.batches import count_tokens
from training.run_directory import partial_directory
from training.train_config import TrainConfig

SAMPLES = 128


@dataclass(frozen=True)
class MemoryBenchSettings:
    """Settings of the comparison."""
    checkpoint: str | None = setting(None, "checkpoint to fine-tune, beside one of the size small")
    data: str | None = setting(None, "preprocessed task file")
    folder: str | None = setting(None, "folder to work in")
    stages: tuple[int, ...] = setting((0, 2, 3), "ZeRO stages, in fp32; those above 0 in bf16 as well")
    processes: tuple[int, ...] = setting((1, 2), "numbers of processes")
    max_tokens_per_microbatch: int = setting(1024, "most padded tokens in a micro-batch")
    plain: bool = setting(False, "leave the settings of the allocator as they are")

    def problems(self):
        return [f"--{name} is missing" for name in ("data", "folder") if not getattr(self, name)]


def measure(cfg, checkpoint, zero, processes, dtype):
    """The most memory that rank 0 of a run of two steps held, in bytes; with full micro-batches of targets alone."""
    out = Path(cfg.folder) / "run"
    for left in (out, partial_directory(out)):
        shutil.rmtree(left, ignore_errors=True)
    train(processes, "--init", checkpoint, "--data", cfg.data, "--out", out, "--zero", zero, "--dtype", dtype,
          "--max_steps", 2, "--global_batch_size", 64, "--max_train_samples", SAMPLES, "--max_eval_samples", 8,
          "--max_tokens_per_microbatch", cfg.max_tokens_per_microbatch, "--train_on_source")
    return read_json(out / "run.json")["result"]["peak_memory_bytes"]


def longest(cfg, checkpoint):
    """The most tokens that the model reads of a sample of those runs."""
    items = read_task(cfg.data)[0]["train"][:SAMPLES]
    samples = SFTDataset(items, Tokenizer(checkpoint), TrainConfig.max_source_length, TrainConfig.max_target_length)
    return max(count_tokens([sample])[0] for sample in samples)


def main(cfg):
    """Prints a line for each run: planned, measured, and by how much they differ."""
    os.environ.update({} if cfg.plain else FRUGAL)
    checkpoints = {"small": small_checkpoint(Path(cfg.folder))}
    checkpoints |= {"checkpoint": cfg.checkpoint} if cfg.checkpoint else {}
    print(f"{'model':<12} {'dtype':<5} {'ZeRO':>4} {'processes':>9} {'planned':>9} {'measured':>9} {'error':>7}")
    worst = 0.0
    for name, checkpoint in checkpoints.items():
        config, tokens = ModelConfig.read(Path(checkpoint) / "config.json"), longest(cfg, checkpoint)
        for zero, processes, dtype in itertools.product(cfg.stages, cfg.processes, ("fp32", "bf16")):
            if zero == 0 and dtype == "bf16":
                continue
            plan = MemoryPlan(config, processes, zero, False, dtype, cfg.max_tokens_per_microbatch, False, "cpu",
                        sample_tokens=tokens)
            planned, measured = plan.total(), measure(cfg, checkpoint, zero, processes, dtype)
            worst = max(worst, abs(planned / measured - 1), key=abs)
            print(f"{name:<12} {dtype:<5} {zero:>4} {processes:>9} {planned / GIB:8.2f}G {measured / GIB:8.2f}G "
                  f"{planned / measured - 1:+7.1%}", flush=True)
    print(f"largest error: {worst:.1%}")


if __name__ == "__main__":
    run((MemoryBenchSettings, main), __doc__)
