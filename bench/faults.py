"""Kills runs again and again, damages the files that they depend on, and compares their results.

    python bench/faults.py --folder /tmp/faults --kills 100             training and evaluation, then the other faults
    python bench/faults.py --folder /tmp/faults --what experiment --kills 10

Training and evaluation: two processes train a small random model, and one process evaluates it. SIGKILL hits one of the
training processes or all, at a moment within each phase in turn: steps, saves of the state, checkpoints of an epoch,
the final write, an evaluation, or at any time. After each kill the run's directory either does not exist or is
complete. The resumed run must end with the weights of an undisturbed run, byte for byte, and the evaluation that is
started again with its results.

Then come the other faults. Two starts of a run at the same time: one of them trains, the other says in one line why it
does not. A disk that fills while results and reports are written: an error in one line, nothing half-written, and the
same results once there is space. Faults between a kill and the next start: the program must either resume or say in one
line why it cannot, and must end with the same weights once the fault is repaired.

Experiment: both models go through two tasks. After the kills the weights, predictions and report must equal those of an
undisturbed experiment.
"""
import contextlib
import ctypes
import json
import os
import random
import re
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
from common.configs import ROOT
from common.files import digest, read_json, read_json_lines
from common.scripts import run
from common.settings import setting
from model.checkpoint import checkpoint_digest
from model.config import ModelConfig

SHAPE = ModelConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2)
STEPS, EPOCH = 30, 3  # steps of a run, and of an epoch
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux's prctl and capabilities
TASKS = ("simp", "empd")
# What is killed in turn, and the parts of a training run in which a kill can land.
PHASES = ("a step", "a save", "an epoch's checkpoint", "an evaluation", "a save", "the final write", "any time")
WRITES = ("a save", "an epoch's checkpoint", "the final write")
SIZES = (150, 1_000, 6_000, 30_000, 100_000)  # limits on the size of a file, in bytes, that stand for a full disk


@dataclass(frozen=True)
class FaultsConfig:
    """Settings of the fault run."""
    folder: str = setting(None, "an empty folder to work in", required=True)
    what: Literal["training", "experiment"] = setting("training", "what to kill")
    kills: int = setting(50, "number of kills", at_least=0)
    pairs: int = setting(6, "number of two starts at once", at_least=0)
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
            time.sleep(0.001)
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
    """Makes a checkpoint with random weights, two preprocessed tasks and a suite of one benchmark."""
    random_checkpoint(folder / "m0", SHAPE)
    for task in TASKS:
        subprocess.run([sys.executable, "data_prep.py", "task", "--task", task, "--folder_path", "data/sample",
                        "--output_path", folder / f"{task}.json"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    items = [{"text": text[:40], "choices": [text[40:60], text[60:80]], "label": 0} for text in
             (item["input"] for item in read_json(folder / "simp.json")["train"][:20])]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "suite.toml").write_text('[[benchmark]]\nname = "next"\ncategory = "Rs"\nfile = "items.jsonl"\n'
                                       'doc_to_text = "text"\ndoc_to_choice = "choices"\ndoc_to_target = "label"\n')


def limit_files(size):
    """Options of a process that cannot write more than `size` bytes to a file, as on a full disk."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


def error_of(status, output, expected):
    """The one line of the error with which a command has ended."""
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert status == expected, output
    assert len(lines) == 1, output
    assert "Error:" not in output.replace("ChildFailedError:", ""), output  # a traceback; that one is torchrun's
    return lines[0]


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
            "--eval_steps", 10, "--max_eval_samples", 8, "--max_train_samples", 8 * EPOCH, "--save_minutes", 0),
                      **options)

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

    def writing(self, name):
        """The signs that a part of a run has begun and not ended: part -> set, which grows when the part begins."""
        partial = self.folder / f"{name}.partial"
        final = partial / "config.json"  # the first file of the final weights
        return {"a save": set(partial.glob("resume/*.writing")),
                "an epoch's checkpoint": set(partial.glob(".checkpoint-*.writing")),
                "the final write": {final.stat().st_mtime_ns} if final.exists() else set()}

    def kill(self, name, phase):
        """Starts a run and kills it in a phase; returns whether it was still running."""
        before, target = self.writing(name), self.steps(name) + random.randint(1, 9)
        one = "train.py" if random.random() < 0.5 else None

        def begun():
            if phase in WRITES:
                return self.writing(name)[phase] - before[phase]
            return phase == "any time" or self.steps(name) >= target

        longest = self.seconds / 2 if phase == "any time" else 0.01 if phase in WRITES else 0.06
        killed = self.start(name).kill(begun, random.uniform(0, longest), one)
        if killed:
            after = self.writing(name)
            self.counts[next((f"within {part}" for part in WRITES if after[part] - before[part]), "in between")] += 1
            self.counts["of one process"] += bool(one)
        return killed

    def refusal(self, **options):
        """The one line with which the run `broken` refuses to start."""
        status, output = self.start("broken", **options).wait()
        return error_of(status, output, 1)


class Evaluation:
    """Evaluations of one checkpoint under different names, and reports, all of which must have the same results."""

    def __init__(self, folder):
        self.folder = folder
        for stage, checkpoint in (("m0", "m0"), ("m1-simp", "whole")):
            (folder / "runs/llm").mkdir(parents=True, exist_ok=True)
            (folder / "runs/llm" / stage).symlink_to(folder / checkpoint)
            self.start(folder / checkpoint / "eval", checkpoint).finish()
        self.seconds, _ = timed(self.start("evaluated").finish)
        self.expected = self.results("evaluated")
        self.start_report("report").finish()
        print(f"an undisturbed evaluation takes {self.seconds:.1f} s", flush=True)

    def start(self, name, checkpoint="whole", **options):
        """Starts or repeats an evaluation."""
        return Victim([sys.executable, "evaluate.py", "--checkpoint", self.folder / checkpoint, "--tasks", "simp",
                       "--data", self.folder, "--suite", self.folder / "suite.toml", "--limit", 8, "--dtype", "fp32",
                       "--out", self.folder / name], **options)

    def start_report(self, name, **options):
        """Starts a report."""
        return Victim([sys.executable, "report.py", "--runs", self.folder / "runs", "--out", self.folder / name],
                      **options)

    def results(self, name):
        """The results in a folder, by file; every file must be complete."""
        found = {}
        for path in (self.folder / name).iterdir():
            assert not path.name.endswith(".writing"), path
            content = read_json_lines(path) if path.suffix == ".jsonl" else read_json(path, dict)
            # what was measured in a file of metrics, of lm-eval and of losses; other entries differ between runs
            part = next((key for key in ("metrics", "results", "items") if key in content), None)
            assert part or path.suffix == ".jsonl", path
            found[re.sub(r"_\d{4}-.*", "", path.stem)] = content[part] if part else content
        return found

    def finish(self, name):
        """Repeats an evaluation, checks its results, and removes them."""
        self.start(name).finish()
        assert self.results(name) == self.expected, name
        shutil.rmtree(self.folder / name)

    def kill(self, counts):
        """Kills an evaluation at a random moment and repeats it; returns whether it was still running."""
        killed = self.start("killed").kill(lambda: True, random.uniform(0.3, 1) * self.seconds)
        counts["within an evaluation"] += killed
        self.start("killed").finish()
        for path in (self.folder / "killed").glob(".*.writing"):
            path.unlink()  # left by the killed process; the next writer of the same file would remove it
        self.finish("killed")
        return killed

    def fill_disk(self, size):
        """Evaluates and reports on a full disk, then with space; returns the lines with which they refused."""
        lines = []
        status, output = self.start("full", **limit_files(size)).wait()
        if status:
            lines.append(error_of(status, output, 2))
        if (self.folder / "full").exists():
            assert all(self.expected[name] == content for name, content in self.results("full").items())
        self.finish("full")
        status, output = self.start_report("full-report", **limit_files(size)).wait()
        if status:
            lines.append(error_of(status, output, 2))
        self.same_reports(complete=False)
        self.start_report("full-report").finish()
        self.same_reports(complete=True)
        shutil.rmtree(self.folder / "full-report")
        return lines

    def same_reports(self, complete):
        """Checks that the files of a report equal those of the undisturbed one."""
        written = {path.name for path in self.folder.glob("full-report/*")}
        for name in {path.name for path in self.folder.glob("report/*")} if complete else written:
            assert digest([self.folder / "full-report" / name]) == digest([self.folder / "report" / name]), name


def kill_training(cfg, folder):
    """Kills training runs and evaluations, then tries the other faults."""
    training = Training(cfg, folder)
    evaluation, kills, runs = Evaluation(folder), 0, 1
    while kills < cfg.kills:
        phase, name = PHASES[kills % len(PHASES)], f"run-{runs}"
        if phase == "an evaluation":
            kills += evaluation.kill(training.counts)
        else:
            kills += training.kill(name, phase)
        print(f"kill {kills}/{cfg.kills}, aimed at {phase}: {name} is {'' if training.is_finished(name) else 'not '}"
              "finished", flush=True)
        if training.is_finished(name):
            training.finish(name)
            runs += 1
    if list(folder.glob(f"run-{runs}*")):
        training.finish(f"run-{runs}")
    print(f"{kills} kills ({', '.join(f'{count} {what}' for what, count in training.counts.items())}); each run ended "
          "with the weights of the undisturbed one, and each evaluation with its results", flush=True)
    for number in range(cfg.pairs):
        line = start_twice(training, number % 2 == 1, random.uniform(0, training.seconds if number % 3 == 2 else 1))
        print(f"two starts at once: {line}", flush=True)
    lines = [line for size in SIZES for line in evaluation.fill_disk(size)]
    assert lines
    print("a full disk (simulated by limits on the size of files) while results and reports are written:\n  "
          + "\n  ".join(lines), flush=True)
    break_training(training, folder)


def start_twice(training, resumed, delay):
    """Starts a run, from its beginning or from a saved state, and starts it again `delay` seconds later: one of the two
    trains.

    Returns what the other says.
    """
    if resumed:
        assert training.start("twice").kill(lambda: training.steps("twice") >= STEPS // 2, 0)
    first = training.start("twice")
    time.sleep(delay)
    ended = [victim.wait() for victim in (first, training.start("twice"))]
    idle = [(status, output) for status, output in ended
            if f"{STEPS} steps, " not in output or "nothing to do" in output]
    assert len(idle) == 1, ended
    assert training.is_finished("twice")
    shutil.rmtree(training.folder / "twice")
    status, output = idle[0]
    if not status:
        return next(line for line in output.splitlines() if "is finished already, nothing to do" in line)
    line = error_of(status, output, 1)
    assert "another process is using" in line, line
    return line


def break_training(training, folder):
    """Tries the faults between a kill and the next start."""
    weights = folder / "m0/model.safetensors"
    faults = {
        "a full disk (simulated by a limit on the size of files)": lambda: training.refusal(**limit_files(100_000)),
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
