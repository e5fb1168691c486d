"""Growing on disk compared with copying: time and peak memory.

    python bench/grow.py --folder /tmp/bench                    the 7B's base, 8 layers of 4,096, to 32 layers in bf16
    python bench/grow.py --folder /tmp/bench --size small       a small model

Makes a base with random weights. Then in alternation grows it with stack.py, and copies the result with `cp`. Written
pages are flushed to disk before each measurement, and the flush at the end is part of the time. Needs disk space for
two and a quarter times the grown checkpoint. The peak memory is that of the growing process (VmHWM of Linux).
"""
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import peak_rss, timed
from bench.workload import random_checkpoint
from common.configs import ROOT
from common.files import UserError
from common.scripts import run
from common.settings import setting
from model.config import size_config

# stack.py as from the command line, and then the status of its process
GROW = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; import stack; from common import "
        "scripts; scripts.dispatch(stack.COMMANDS, ''); print(open('/proc/self/status').read())")


@dataclass(frozen=True)
class GrowBenchConfig:
    """Settings of the benchmark."""
    folder: str = setting(None, "folder for the checkpoints, which are removed afterwards", required=True)
    size: str = setting("7b", "size preset that gives the grown model's shape", names="size")
    factor: int = setting(4, "growth factor", at_least=2)
    repeats: int = setting(3, "measurements of each", at_least=1)


def run_and_flush(command):
    """Runs a command and flushes its files to disk; returns what it printed."""
    result = subprocess.run([str(word) for word in command], check=True, text=True, capture_output=True)
    subprocess.run(["sync"], check=True)
    return result.stdout


def main(cfg):
    """Prints a line for each measurement, then the medians and their ratio."""
    if not Path(cfg.folder).is_dir():
        raise UserError(f"{cfg.folder} is not a directory")
    base = size_config(cfg.size, max(1, size_config(cfg.size).num_hidden_layers // cfg.factor))
    seconds = {"grow": [], "cp": []}
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
        init, grown, copy = (Path(folder) / name for name in ("base", "grown", "copy"))
        random_checkpoint(init, base, torch.bfloat16)
        for _ in range(cfg.repeats):
            subprocess.run(["sync"], check=True)
            took, printed = timed(run_and_flush, [sys.executable, "-c", GROW, ROOT / "stack.py", "grow", "--init", init,
                                                  "--out", grown, "--factor", cfg.factor])
            seconds["grow"].append(took)
            peak, size = peak_rss(printed), sum(path.stat().st_size for path in grown.iterdir())
            print(f"grow  {took:6.2f} s  {size / 1e9:.2f} GB  {size / took / 1e9:5.2f} GB/s  "
                  f"peak memory {peak / 1e9:.2f} GB", flush=True)
            took, _ = timed(run_and_flush, ["cp", "-r", grown, copy])
            seconds["cp"].append(took)
            print(f"cp    {took:6.2f} s  {size / 1e9:.2f} GB  {size / took / 1e9:5.2f} GB/s", flush=True)
            shutil.rmtree(grown)
            shutil.rmtree(copy)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{base.num_hidden_layers} layers of {base.hidden_size} grown to {base.num_hidden_layers * cfg.factor}: "
          f"median {medians['grow']:.2f} s, {medians['cp']:.2f} s for cp of as many bytes, ratio "
          f"{medians['grow'] / medians['cp']:.2f}, peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    run((GrowBenchConfig, main), __doc__)
