"""Host memory of loading a checkpoint under ZeRO-3: each process's peak compared with its share of the weights.

    torchrun --standalone --nproc_per_node 2 bench/loading.py --folder /tmp/loading       2 GB of random weights

The model is built as in train.py. The peak is that of the process (VmHWM of Linux), minus the memory held before.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import peak_rss
from bench.workload import make_run, random_checkpoint
from common.distributed import Distributed
from common.scripts import run
from common.settings import setting
from model.config import ModelConfig
from training.deepspeed_config import import_deepspeed
from training.engine import build_model
from training.train_config import TrainConfig

SHAPE = ModelConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=18,
                    num_attention_heads=16)


@dataclass(frozen=True)
class LoadingBenchConfig:
    """Settings of the measurement."""
    folder: str = setting(None, "folder of the checkpoint, which is made if it does not exist", required=True)


def main(cfg):
    """Prints a line for each process."""
    checkpoint, status = Path(cfg.folder) / "checkpoint", Path("/proc/self/status")
    with Distributed() as dist:
        dist.on_rank0(lambda: random_checkpoint(checkpoint, SHAPE, torch.bfloat16))
        import_deepspeed(dist.device)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak_rss(status.read_text())
        model = build_model(make_run(TrainConfig(init=str(checkpoint), zero=3, dtype="bf16"), dist,
                                     ModelConfig.read(checkpoint / "config.json")))
        share = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters()) * 2
        lines = dist.gather(f"rank {dist.rank}: peak {(peak_rss(status.read_text()) - before) / 1e9:.2f} GB above "
                            f"{before / 1e9:.2f} GB before; its share of the weights {share / 1e9:.2f} GB of "
                            f"{SHAPE.num_parameters * 2 / 1e9:.2f}, the largest tensor "
                            f"{SHAPE.vocab_size * SHAPE.hidden_size * 2 / 1e9:.2f}")
        dist.print0("\n".join(lines))


if __name__ == "__main__":
    run((LoadingBenchConfig, main), __doc__)
