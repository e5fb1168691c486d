"""Start-up: from `make train` to the first step, and what importing each script takes.

    python bench/startup.py --folder DIR

Runs `make train TASK=simp` on the sample for one step from a checkpoint of the size tiny with random weights, on a
machine where the environment and the data are there, and times its lines. Then every script is imported in a process
of its own, with what is imported of heavy packages and how long each took with all that it brought in.
"""
import dataclasses
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import random_checkpoint
from common.files import UserError
from common.settings import ROOT, run, setting
from pipeline.jobs import shape

HEAVY = ("torch", "deepspeed", "lm_eval", "datasets", "transformers", "matplotlib", "numpy", "tokenizers",
         "sentencepiece", "sacrebleu", "rouge_score")
LINES = {"the model is there": "model:", "evaluated": "eval loss before", "the first step": "step "}


@dataclass(frozen=True)
class StartupBenchSettings:
    """Settings of the benchmark."""
    folder: str | None = setting(None, "folder to work in")
    repeats: int = setting(3, "times that each is measured, after one that is not")

    def problems(self):
        return [] if self.folder else ["--folder is missing"]


def start(folder):
    """Seconds from `make train` to its lines."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    config = dataclasses.replace(shape("tiny"), bos_token_id=1, eos_token_id=2)
    # SOURCE is given since make would hand down the one of `make bench`, whose whole task takes longer to evaluate on
    command = ["make", "train", "TASK=simp", "SOURCE=sample", "SIZE=tiny", f"OUT={folder / 'run'}",
               f"INIT={random_checkpoint(folder / 'tiny', config)}", "ARGS=--max_steps 1"]
    began, seen = time.perf_counter(), {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            for name, beginning in LINES.items():
                if line.startswith(beginning):
                    seen.setdefault(name, time.perf_counter() - began)
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with status {process.returncode}")
    return seen


def imports(script):
    """(seconds, {package: seconds}) of importing a script."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {script}"], cwd=ROOT, check=True)
    took, packages = time.perf_counter() - began, {}
    result = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {script}"], cwd=ROOT,
                            capture_output=True, text=True, check=True)  # it slows down what it looks at
    for microseconds, name in re.findall(r"\|\s+(\d+) \|\s+(\S+)$", result.stderr, re.MULTILINE):
        if name in HEAVY:
            packages[name] = int(microseconds) / 1e6
    return took, packages


def main(cfg):
    """Prints both tables."""
    runs = [start(Path(cfg.folder)) for _ in range(1 + cfg.repeats)][1:]
    print("make train TASK=simp SOURCE=sample SIZE=tiny, seconds until")
    for name in LINES:
        print(f"  {name:<20} {statistics.median(seen[name] for seen in runs):6.2f}")
    print("importing, seconds")
    for script in ("settings", "data_prep", "stack", "train", "evaluate", "experiment", "report", "planner"):
        imports(script)
        found = [imports(script) for _ in range(cfg.repeats)]
        packages = {name: statistics.median(packages[name] for _, packages in found) for name in found[0][1]}
        print(f"  {script:<11} {statistics.median(took for took, _ in found):5.2f}   "
              + ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages.items()))


if __name__ == "__main__":
    run((StartupBenchSettings, main), __doc__)
