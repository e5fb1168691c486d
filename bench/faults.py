"""Kills a run again and again, damages the files that it depends on, and compares its results.

    python bench/faults.py --folder /tmp/faults                         training: 50 kills, then the other faults
    python bench/faults.py --folder /tmp/faults --what experiment --kills 10

Training: two processes train a small random model. SIGKILL hits one of them or all, at a random moment. The state is
saved after every step, so that many of the moments lie within a save. After each kill the run's directory either does
not exist or is complete. The resumed run must end with the weights of an undisturbed run, byte for byte. Then come the
other faults, each between a kill and the next start. The program must either resume or say in one line why it cannot,
and must end with the same weights once the fault is repaired.

Experiment: both models go through two tasks. After the kills the weights, predictions and report must equal those of an
undisturbed experiment.
"""
import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import timed
from bench.workload import random_checkpoint, torchrun_command
from common.files import digest, read_json
from common.settings import ROOT, run, setting
from model.checkpoint import checkpoint_digest
from model.config import ModelConfig

SHAPE = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2)
STEPS = 40
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux's prctl and capabilities
TASKS = ("simp", "empd")


@dataclass(frozen=True)
class FaultsConfig:
    """Settings of the fault run."""
    folder: str = setting(None, "an empty folder to work in", required=True)
    what: Literal["training", "experiment"] = setting("training", "what to kill")
    kills: int = setting(50, "number of kills", at_least=0)
    zero: Literal[0, 1, 2, 3] = setting(2, "ZeRO stage of the training")
    seed: int = setting(0, "seed of the moments")

    def problems(self):
        folder = Path(self.folder or "")
        return [f"{folder} is not empty"] if self.folder and folder.exists() and any(folder.iterdir()) else []


class Victim:
    """A command that can be killed with all processes that it has started."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.STDOUT, **options)

    def kill(self, until, delay, one=None):
        """Kills all processes, or one of those that run the script `one`, `delay` seconds after `until()` is true.

        Returns whether the command was still running.
        """
        while self.process.poll() is None and not until():
            time.sleep(0.005)
        time.sleep(delay)
        if self.process.poll() is not None:
            return False
        children = descendants(self.process.pid)
        ranks = [pid for pid in children if one and one in worker_command(pid)]
        for pid in [random.choice(ranks)] if ranks else [self.process.pid, *children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=120)
        return True

    def wait(self):
        """Returns (exit status, output)."""
        output = self.process.communicate(timeout=600)[0]
        return self.process.returncode, output

    def finish(self):
        """Waits for the command, which must succeed."""
        status, output = self.wait()
        assert status == 0, output


def descendants(pid):
    """The children of a process, their children, and so on, as Linux lists them."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [process for child in children for process in descendants(child)]


def worker_command(pid):
    """The command line of a process; empty for torchrun, whose command line also names the script."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    return "" if any("torchrun" in word for word in words) else " ".join(words)


def prepare(folder):
    """Makes a checkpoint with random weights and two preprocessed tasks."""
    random_checkpoint(folder / "m0", SHAPE)
    for task in TASKS:
        subprocess.run([sys.executable, "data_prep.py", "task", "--task", task, "--folder_path", "data/sample",
                        "--output_path", folder / f"{task}.json"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


class Training:
    """Runs with the same settings under different names, all of which must end with the same weights."""

    def __init__(self, cfg, folder):
        self.cfg, self.folder, self.counts = cfg, folder, Counter()
        self.seconds, _ = timed(self.start("whole").finish)
        self.expected = checkpoint_digest(folder / "whole")
        print(f"an undisturbed run takes {self.seconds:.1f} s", flush=True)

    def start(self, name, **options):
        """Starts or resumes a run."""
        return Victim(torchrun_command(
            2, "--init", self.folder / "m0", "--data", self.folder / "simp.json", "--out", self.folder / name, "--zero",
            self.cfg.zero, "--dtype", "fp32", "--max_steps", STEPS, "--global_batch_size", 8, "--learning_rate", 1e-3,
            "--eval_steps", 10, "--max_eval_samples", 8, "--save_minutes", 0), **options)

    def is_finished(self, name):
        """Whether the directory of a run exists, which must then be complete."""
        out = self.folder / name
        if not out.exists():
            return False
        assert checkpoint_digest(out) == self.expected, f"{out} has other weights"
        assert read_json(out / "run.json")["result"]["steps"] == STEPS
        return True

    def finish(self, name):
        """Runs a run to its end, checks its weights, and removes it."""
        self.start(name).finish()
        assert self.is_finished(name)
        shutil.rmtree(self.folder / name)

    def steps(self, name):
        """The number of steps in the log of an unfinished run."""
        log = self.folder / f"{name}.partial/metrics.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def partial_saves(self, name):
        """The saves of a run that have begun and not ended."""
        return sorted(self.folder.glob(f"{name}.partial/resume/*.writing"))

    def kill(self, name):
        """Starts a run and kills it at a random moment; returns whether it was still running.

        One moment in five is a random time after the start. The others come a few steps after the last kill.
        """
        target, one = self.steps(name) + random.randint(1, 12), "train.py" if random.random() < 0.5 else None
        before = self.partial_saves(name)
        any_time = random.random() < 0.2
        killed = self.start(name).kill(lambda: any_time or self.steps(name) >= target,
                                       random.uniform(0, self.seconds if any_time else 0.06), one)
        if killed:
            self.counts["one process" if one else "all processes"] += 1
            self.counts["within a save"] += self.partial_saves(name) != before
        return killed

    def refusal(self, **options):
        """The one line with which the run `broken` refuses to start."""
        status, output = self.start("broken", **options).wait()
        lines = [line for line in output.splitlines() if line.startswith("error")]
        assert status == 1, output
        assert len(lines) == 1, output
        assert "Error:" not in output.replace("ChildFailedError:", ""), output
        return lines[0]


def kill_training(cfg, folder):
    """Kills runs, then tries the other faults."""
    training, kills, runs = Training(cfg, folder), 0, 0
    while kills < cfg.kills:
        runs += 1
        name = f"run-{runs}"
        while kills < cfg.kills and not (folder / name).exists():
            kills += training.kill(name)
            print(f"kill {kills}/{cfg.kills}: {name} is {'' if training.is_finished(name) else 'not '}finished",
                  flush=True)
        training.finish(name)
    print(f"{kills} kills ({', '.join(f'{count} {what}' for what, count in training.counts.items())}), {runs} runs, "
          "each of which ended with the weights of the undisturbed run", flush=True)
    weights = folder / "m0/model.safetensors"
    faults = {
        "a full disk (simulated by a limit on the size of files)": lambda: training.refusal(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))),
        "a run directory without write permission": lambda: read_only(training),
        "a truncated file of the saved state": lambda: damaged_state(training, lambda file: file[:len(file) // 2]),
        "a changed byte in a file of the saved state": lambda: damaged_state(training, flip_bit),
        "a changed byte in the initial weights": lambda: replaced_input(
            training, weights, flip_bit(weights.read_bytes())),
        "a missing data file": lambda: replaced_input(training, folder / "simp.json", None),
    }
    for name, fault in faults.items():
        assert training.start("broken").kill(lambda: training.steps("broken") >= 5, 0)
        print(f"{name}: {fault()}", flush=True)
        training.finish("broken")


def read_only(training):
    """Starts the run in directories without write permission."""
    def drop_override():  # the capability by which root may write anywhere
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)

    directory = training.folder / "broken.partial"
    directories = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    for path in directories:
        path.chmod(0o500)
    try:
        return training.refusal(preexec_fn=None if os.geteuid() else drop_override)
    finally:
        for path in directories:
            path.chmod(0o700)


def damaged_state(training, change):
    """Changes a file of the saved state; after the refusal removes the state, as the message says."""
    file = next((training.folder / "broken.partial/resume").glob("step-*/rank-1.safetensors"))
    file.write_bytes(change(file.read_bytes()))
    line = training.refusal()
    assert str(file.parent) in line, line
    shutil.rmtree(file.parent)
    return line


def flip_bit(content):
    """File content with one bit changed."""
    return content[:-999] + bytes([content[-999] ^ 1]) + content[-998:]


def replaced_input(training, path, content):
    """Replaces a file that the run depends on, or deletes it if `content` is None; restores it after the refusal."""
    original = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    line = training.refusal()
    path.write_bytes(original)
    return line


def kill_experiment(cfg, folder):
    """Kills an experiment `kills` times, and compares it with an undisturbed one."""
    items = [{"text": text[:40], "choices": [text[40:60], text[60:80]], "label": 0} for text in
             (item["input"] for item in read_json(folder / "simp.json")["train"][:20])]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "suite.toml").write_text('[[benchmark]]\nname = "next"\ncategory = "Rs"\nfile = "items.jsonl"\n'
                                       'doc_to_text = "text"\ndoc_to_choice = "choices"\ndoc_to_target = "label"\n')
    out, whole = folder / "experiment", folder / "whole"
    command = [sys.executable, "experiment.py", "--init_llm", folder / "m0", "--init_stack", folder / "m0", "--order",
               ",".join(TASKS), "--data", folder, "--out", out, "--report", out / "report", "--suite",
               folder / "suite.toml", "--train_args", "--max_steps 12 --learning_rate 1e-3 --max_eval_samples 8 "
               "--dtype fp32 --save_minutes 0", "--evaluate_args", "--limit 4 --dtype fp32"]
    seconds, _ = timed(Victim(command).finish)
    print(f"an undisturbed experiment takes {seconds:.1f} s", flush=True)
    out.rename(whole)
    for kill in range(1, cfg.kills + 1):
        killed = Victim(command).kill(lambda: True, random.uniform(0.05, 2 / cfg.kills) * seconds)
        stages = [path for model in ("llm", "stack") for path in out.glob(f"{model}/m[1-9]-*")
                  if path.suffix != ".partial"]
        for stage in stages:
            assert checkpoint_digest(stage) == checkpoint_digest(whole / stage.relative_to(out)), stage
        print(f"kill {kill}/{cfg.kills}: {f'{len(stages)} complete stages' if killed else 'it had ended'}", flush=True)
    Victim(command).finish()
    different = [path.relative_to(whole) for pattern in ("*/*/eval/predictions-*.jsonl", "*/*/model.safetensors",
                 "report/report.md", "report/*.svg") for path in whole.glob(pattern)
                 if digest([path]) != digest([out / path.relative_to(whole)])]
    assert not different, different
    print("its weights, predictions, report and figures equal those of the undisturbed experiment, byte for byte")


def main(cfg):
    """Runs the faults; an AssertionError says what does not hold."""
    random.seed(cfg.seed)
    folder = Path(cfg.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    (kill_training if cfg.what == "training" else kill_experiment)(cfg, folder)


if __name__ == "__main__":
    run((FaultsConfig, main), __doc__)
