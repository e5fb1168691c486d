"""Converting a pytorch_model.bin of the published kind to safetensors: time and peak memory.

    python bench/conversion.py --folder /tmp/bench           4 GB of weights in fp32, converted to bf16

The file is written as those of the published models: by an incremental writer, with pickle protocol 5. The peak memory
is that of the converting process (VmHWM of Linux), in which pages of the mapped file count.
"""
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import peak_rss, timed
from bench.workload import incremental_save, random_checkpoint
from common.configs import ROOT
from common.scripts import run
from common.settings import setting
from model.checkpoint import CheckpointReader
from model.config import ModelConfig

SHAPE = ModelConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=17,
                    num_attention_heads=16)  # 1.0B parameters

# python -m model.hub, and then the status of its process
CONVERT = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from model import hub; from common import scripts; "
           "scripts.dispatch((hub.HubConfig, hub.main), ''); print(open('/proc/self/status').read())")


@dataclass(frozen=True)
class ConversionBenchConfig:
    """Settings of the benchmark."""
    folder: str = setting(None, "folder for the checkpoints, which are removed afterwards", required=True)
    dtype: Literal["bf16", "fp32"] = setting("bf16", "dtype to convert to")


def main(cfg):
    """Prints sizes, time and memory."""
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
        source, out = Path(folder) / "published", Path(folder) / "converted"
        random_checkpoint(source, SHAPE)
        reader = CheckpointReader(source)
        incremental_save({name: tensor for name, tensor in reader.named_tensors(SHAPE)}, source / "pytorch_model.bin")
        for path in source.glob("*.safetensors*"):
            path.unlink()
        size = (source / "pytorch_model.bin").stat().st_size
        subprocess.run(["sync"], check=True)
        command = [sys.executable, "-c", CONVERT, "--source", source, "--out", out, "--dtype", cfg.dtype]
        took, status = timed(subprocess.check_output, command)
        largest = max(tensor.nbytes for path in out.glob("*.safetensors") for tensor in load_file(path).values())
        print(f"{size / 1e9:.2f} GB in fp32 to {cfg.dtype}: {took:.1f} s, peak memory "
              f"{peak_rss(status.decode()) / 1e9:.2f} GB, the largest tensor {largest / 1e9:.2f} GB")


if __name__ == "__main__":
    run((ConversionBenchConfig, main), __doc__)
