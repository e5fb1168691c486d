"""Growing on disk beside copying: time and peak memory.

    python bench/grow.py --folder /tmp/bench                    the 7B's base, 8 layers of 4,096, to 32 layers in bf16
    python bench/grow.py --folder /tmp/bench --size small       a small one

Makes a base with random weights, then in turns grows it with stack.py and copies as many bytes with `cp`, each after
the written pages have been flushed to the disk, and the flush at the end included. Needs two and a quarter times the
grown checkpoint's bytes of disk. The peak memory is what Linux says of the process that grows (VmHWM).
"""
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.settings import ROOT, run, setting
from model.checkpoint import write_checkpoint
from model.tokenizer import train_tokenizer
from model.transformer import parameter_shapes
from pipeline.jobs import shape


@dataclass(frozen=True)
class GrowBenchSettings:
    """Settings of the benchmark."""
    folder: str | None = setting(None, "folder to make the checkpoints in; they are removed afterwards")
    size: str = setting("7b", "size preset whose shape the grown model has")
    factor: int = setting(4, "growth factor")
    repeats: int = setting(3, "times that each is measured")

    def problems(self):
        found = [] if self.folder and Path(self.folder).is_dir() else ["--folder is no directory"]
        return found + ([f"repeats is {self.repeats}, expected 1 or more"] if self.repeats < 1 else [])


# stack.py as it is called by hand, and then the memory that its process held at most
GROW = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; import settings, stack; "
        "settings.dispatch(stack.COMMANDS, ''); print(open('/proc/self/status').read())")


def timed(command):
    """(seconds until the files of a command are on the disk, what it printed)."""
    subprocess.run(["sync"], check=True)
    began = time.perf_counter()
    result = subprocess.run([str(word) for word in command], check=True, text=True, capture_output=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - began, result.stdout


def main(cfg):
    """Prints a line for each measurement, then medians and their ratio."""
    grown = shape(cfg.size)
    base = shape(cfg.size, max(1, grown.num_hidden_layers // cfg.factor))
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
        measure(cfg, base, Path(folder))


def measure(cfg, base, folder):
    """Makes the base and measures, in a folder of its own."""
    for name in ("base", "tokenizer"):
        (folder / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    train_tokenizer(["a text to make a vocabulary from"], 300, folder / "tokenizer")
    write_checkpoint(folder / "base", base, (
        (name, torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
        for name, size in parameter_shapes(base).items()), folder / "tokenizer")
    grow = [sys.executable, "-c", GROW, ROOT / "stack.py", "grow", "--init", folder / "base", "--out", folder / "grown",
            "--factor", cfg.factor]
    times = {"grow": [], "cp": []}
    for _ in range(cfg.repeats):
        seconds, printed = timed(grow)
        times["grow"].append(seconds)
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", printed)[1]) * 1024
        size = sum(path.stat().st_size for path in (folder / "grown").iterdir())
        print(f"grow  {seconds:6.2f} s  {size / 1e9:.2f} GB  {size / seconds / 1e9:5.2f} GB/s  "
              f"peak memory {peak / 1e9:.2f} GB", flush=True)
        seconds, _ = timed(["cp", "-r", folder / "grown", folder / "copy"])
        times["cp"].append(seconds)
        print(f"cp    {seconds:6.2f} s  {size / 1e9:.2f} GB  {size / seconds / 1e9:5.2f} GB/s", flush=True)
        shutil.rmtree(folder / "grown")
        shutil.rmtree(folder / "copy")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{base.num_hidden_layers} layers of {base.hidden_size} grown to {base.num_hidden_layers * cfg.factor}: median "
          f"{medians['grow']:.2f} s beside {medians['cp']:.2f} s of cp for as many bytes, ratio "
          f"{medians['grow'] / medians['cp']:.2f}, peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    run((GrowBenchSettings, main), __doc__)
