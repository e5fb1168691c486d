"""Start-up: the time from `make train` to the first step, and the time to import each script.

    python bench/startup.py --folder DIR

Runs `make train TASK=simp` on the sample for one step, from a checkpoint of the size tiny with random weights, and
times the lines that it prints. The environment and the data exist already. Then each script is imported in a new
process, and the heavy packages that it imports are listed with the time that each takes, its own imports included.
"""
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import timed
from bench.workload import random_checkpoint
from common.configs import ROOT
from common.files import UserError
from common.scripts import run
from common.settings import setting
from model.config import size_config

HEAVY = ("torch", "deepspeed", "lm_eval", "datasets", "transformers", "matplotlib", "numpy", "tokenizers",
         "sentencepiece", "sacrebleu", "rouge_score")
LINES = {"the model is built": "model:", "evaluated": "step 0 ", "the first step": "step 1/"}
MODULES = ("common.settings", "data_prep", "stack", "train", "evaluate", "experiment", "report", "pipeline.plan")


@dataclass(frozen=True)
class StartupBenchConfig:
    """Settings of the benchmark."""
    folder: str = setting(None, "folder to work in", required=True)
    repeats: int = setting(3, "measurements of each, after one that is not used", at_least=1)


def time_lines(folder):
    """Seconds from `make train` to its lines."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = ["make", "train", "TASK=simp", "SIZE=tiny", f"OUT={folder / 'run'}",
               f"INIT={random_checkpoint(folder / 'tiny', size_config('tiny'))}", "ARGS=--max_steps 1"]
    # of `make bench`, which must not reach this make
    outer_variables = {"ARGS", "GIVEN", "GOALS", "MAKEFLAGS", "MFLAGS", *os.environ.get("GIVEN", "").split()}
    environment = {name: value for name, value in os.environ.items() if name not in outer_variables}
    began, seen, lines = time.perf_counter(), {}, []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        for line in process.stdout:
            lines.append(line)
            for name, start in LINES.items():
                if line.startswith(start):
                    seen.setdefault(name, time.perf_counter() - began)
    if process.returncode or len(seen) < len(LINES):
        raise UserError(f"{' '.join(command)} ended with status {process.returncode} after: {''.join(lines[-5:])}")
    return seen


def time_import(module):
    """Returns (seconds, {package: seconds}) of importing a module."""
    seconds, _ = timed(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, check=True))
    result = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {module}"], cwd=ROOT,
                            capture_output=True, text=True, check=True)  # slower, so it is a separate run
    return seconds, {name: int(microseconds) / 1e6 for microseconds, name in
                     re.findall(r"\|\s+(\d+) \|\s+(\S+)$", result.stderr, re.MULTILINE) if name in HEAVY}


def main(cfg):
    """Prints both tables."""
    runs = [time_lines(Path(cfg.folder)) for _ in range(1 + cfg.repeats)][1:]
    print("make train TASK=simp SIZE=tiny, seconds until")
    for name in LINES:
        print(f"  {name:<20} {statistics.median(seen[name] for seen in runs):6.2f}")
    print("importing, seconds")
    for module in MODULES:
        measured = [time_import(module) for _ in range(1 + cfg.repeats)][1:]
        packages = {name: statistics.median(packages[name] for _, packages in measured) for name in measured[0][1]}
        listed = ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages.items())
        print(f"  {module:<20} {statistics.median(seconds for seconds, _ in measured):5.2f}   {listed}".rstrip())


if __name__ == "__main__":
    run((StartupBenchConfig, main), __doc__)
