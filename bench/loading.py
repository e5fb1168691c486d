"""Host memory of loading a checkpoint under ZeRO-3: the peak of each process beside its share of the weights.

    torchrun --standalone --nproc_per_node 2 bench/loading.py --folder /tmp/loading       2 GB of random weights

The model is built as train.py builds it. The peak is what Linux says of the process (VmHWM), less what it held before.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.distributed import Distributed
from common.files import new_directory
from common.settings import run, setting
from model.checkpoint import write_checkpoint
from model.config import ModelConfig
from model.tokenizer import train_tokenizer
from model.transformer import initial_weights
from training.engine import build_model, import_deepspeed
from training.train_config import TrainConfig

SHAPE = ModelConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=18,
                    num_attention_heads=16, bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class LoadingBenchSettings:
    """Settings of the measurement."""
    folder: str | None = setting(None, "folder for the checkpoint, which is made if it is not there")

    def problems(self):
        return [] if self.folder else ["--folder is missing"]


def peak():
    """The most memory that this process has held, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def make(path):
    """A checkpoint in bf16 with random weights."""
    if not path.exists():
        with new_directory(path) as folder:
            (folder / "tokenizer").mkdir()
            train_tokenizer(["a text to make a vocabulary from"], 300, folder / "tokenizer")
            write_checkpoint(folder, SHAPE, ((name, tensor.bfloat16()) for name, tensor in initial_weights(SHAPE, 0)),
                             folder / "tokenizer")


def main(cfg):
    """Prints a line for each process."""
    checkpoint = Path(cfg.folder) / "checkpoint"
    settings = TrainConfig(init=str(checkpoint), zero=3, dtype="bf16")
    with Distributed() as dist:
        dist.on_rank0(lambda: make(checkpoint))
        import_deepspeed(dist)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = peak()
        _, model = build_model(settings, checkpoint, dist)
        held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters()) * 2
        lines = dist.gather(f"rank {dist.rank}: peak {(peak() - before) / 1e9:.2f} GB above "
                             f"{before / 1e9:.2f} GB before; its share of the weights {held / 1e9:.2f} GB of "
                             f"{SHAPE.num_parameters * 2 / 1e9:.2f}, the largest tensor "
                             f"{SHAPE.vocab_size * SHAPE.hidden_size * 2 / 1e9:.2f}")
        dist.print0("\n".join(lines or []))


if __name__ == "__main__":
    run((LoadingBenchSettings, main), __doc__)
