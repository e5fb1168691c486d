"""Kills a run again and again, breaks what it rests on, and compares what it ends with.

    python bench/faults.py --folder /tmp/faults                         training: 50 kills, then what else can break
    python bench/faults.py --folder /tmp/faults --what experiment --kills 10

Training: two processes on a small random model. SIGKILL hits one of them or all, at a random moment, with the state
saved after every step, so that a good part of the moments lies within a save. After each kill there is either no
directory of the run or a whole one; started again, the run goes on, and its weights have to be, byte for byte, those of
a run that nothing happened to. Then the other faults, each between a kill and the next start: the program has to go on
or to say in one line why it cannot, and to end with the same weights when the fault is mended.

Experiment: both models through two tasks; after the kills its predictions, benchmark results and report have to be
those of one that was never stopped.
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
from common.files import digest, read_json
from common.settings import ROOT, run, setting
from model.checkpoint import checkpoint_digest, write_checkpoint
from model.config import ModelConfig
from model.tokenizer import train_tokenizer
from model.transformer import initial_weights

SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux's prctl and capabilities
TASKS = {"simp": "wiki_auto", "empd": "empathetic_dialogues"}


@dataclass(frozen=True)
class FaultSettings:
    """Settings of the fault run."""
    folder: str | None = setting(None, "an empty folder to work in")
    what: Literal["training", "experiment"] = setting("training", "what is killed")
    kills: int = setting(50, "how often")
    zero: Literal[0, 1, 2, 3] = setting(2, "ZeRO stage of the training")
    seed: int = setting(0, "seed of the moments")

    def problems(self):
        found = [] if self.folder else ["--folder is missing"]
        return found + ([f"{self.folder} is not empty"] if self.folder and Path(self.folder).exists()
                        and any(Path(self.folder).iterdir()) else [])


class Victim:
    """A command that can be killed with all that it has started."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.STDOUT, **options)

    def kill(self, until, delay, one=None):
        """Kills all processes, or one of those that run `one`, so many seconds after `until()` has come true.

        Returns whether there was still one to kill.
        """
        while self.process.poll() is None and not until():
            time.sleep(0.005)
        time.sleep(delay)
        if self.process.poll() is not None:
            return False
        below = descendants(self.process.pid)
        ranks = [pid for pid in below if one and one in command_of(pid)]
        for pid in [random.choice(ranks)] if ranks else [self.process.pid, *below]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=120)
        return True

    def end(self):
        """(exit status, what it printed)."""
        printed = self.process.communicate(timeout=600)[0]
        return self.process.returncode, printed


def descendants(pid):
    """The processes below one, as Linux lists them."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def command_of(pid):
    """The command line of a process whose own word is not a launcher's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    return "" if any("torchrun" in word for word in words) else " ".join(words)


def prepare(folder):
    """A tokenizer, a checkpoint with random weights, and two prepared tasks."""
    (folder / "tokenizer").mkdir(parents=True)
    texts = [text for path in sorted((ROOT / "data/sample/wiki_auto").glob("*.json"))
             for text in json.loads(path.read_text())["src"]]
    train_tokenizer(texts, SHAPE["vocab_size"], folder / "tokenizer")
    (folder / "m0").mkdir()
    config = ModelConfig(**SHAPE, bos_token_id=1, eos_token_id=2)
    write_checkpoint(folder / "m0", config, initial_weights(config, 0), folder / "tokenizer")
    for task in TASKS:
        subprocess.run([sys.executable, "data_prep.py", "task", "--task", task, "--folder_path", "data/sample",
                        "--output_path", folder / f"{task}.json"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------------- training

class Training:
    """The run that is killed: a command for each name, all of which have to end with the same weights."""

    def __init__(self, cfg, folder):
        self.s, self.folder, self.counts = cfg, folder, Counter()
        began = time.monotonic()
        status, printed = Victim(self.command("whole")).end()
        assert status == 0, printed
        self.seconds, self.expected = time.monotonic() - began, checkpoint_digest(folder / "whole")
        print(f"a run that nothing happens to takes {self.seconds:.1f} s", flush=True)

    def command(self, name):
        return [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", 2, "train.py", "--task",
                "simp", "--init", self.folder / "m0", "--data", self.folder / "simp.json", "--out", self.folder / name,
                "--zero", self.s.zero, "--dtype", "fp32", "--max_steps", 40, "--global_batch_size", 8,
                "--learning_rate", 1e-3, "--eval_steps", 10, "--max_eval_samples", 8, "--save_minutes", 0]

    def check(self, name):
        """After a kill: the directory is whole or absent. Returns whether it is there."""
        out = self.folder / name
        if not out.exists():
            return False
        assert checkpoint_digest(out) == self.expected, f"{out} has other weights"
        assert read_json(out / "run.json")["result"]["steps"] == 40
        return True

    def finish(self, name):
        """Lets a run come to its end, which has to be the expected one."""
        status, printed = Victim(self.command(name)).end()
        assert status == 0, printed
        assert self.check(name)
        return printed

    def steps(self, name):
        """How many steps the log of a run has."""
        log = self.folder / f"{name}.partial/metrics.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def kill(self, name):
        """Starts a run and kills it at a random moment; returns whether it was still running.

        One moment in five is a random time after the start; the others lie some steps further than the last.
        """
        target, one = self.steps(name) + random.randint(1, 12), "train.py" if random.random() < 0.5 else None
        saving = sorted(self.folder.glob(f"{name}.partial/resume/*.writing"))
        if random.random() < 0.2:
            struck = Victim(self.command(name)).kill(lambda: True, random.uniform(0, self.seconds), one)
        else:
            struck = Victim(self.command(name)).kill(lambda: self.steps(name) >= target, random.uniform(0, 0.06), one)
        if struck:
            self.counts["one process" if one else "all processes"] += 1
            self.counts["within a save"] += sorted(self.folder.glob(f"{name}.partial/resume/*.writing")) != saving
        return struck


def kill_training(cfg, folder):
    """The kills, then the other faults."""
    training, kills, runs = Training(cfg, folder), 0, 0
    while kills < cfg.kills:
        runs += 1
        name = f"run-{runs}"
        while kills < cfg.kills and not (folder / name).exists():
            kills += training.kill(name)
            print(f"kill {kills}/{cfg.kills}: {name} {'is whole' if training.check(name) else 'is not there yet'}",
                  flush=True)
        training.finish(name)
        shutil.rmtree(folder / name)
    print(f"{kills} kills ({', '.join(f'{count} {what}' for what, count in training.counts.items())}), {runs} runs, "
          "each ended with the weights of the one that nothing happened to", flush=True)
    for fault in (full_disk, read_only, truncated, flipped_byte, other_parent, no_data):
        assert Victim(training.command("broken")).kill(lambda: training.steps("broken") >= 5, 0)  # a run to break
        print(f"{fault.__doc__} {fault(training, folder)}", flush=True)
        training.finish("broken")
        shutil.rmtree(folder / "broken")


def refused(training, **options):
    """The one line with which a start of the broken run is refused."""
    status, printed = Victim(training.command("broken"), **options).end()
    lines = [line for line in printed.splitlines() if line.startswith("error")]
    assert status == 1, printed
    assert len(lines) == 1, printed
    assert "Error:" not in printed.replace("ChildFailedError:", ""), printed
    return lines[0]


def full_disk(training, folder):
    """a full disk (a limit on the size of files stands for it):"""
    return refused(training, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))


def read_only(training, folder):
    """a run directory that cannot be written to:"""
    def obey():  # root may write anywhere, but for a capability that the run can do without
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)

    places = [folder / "broken.partial", *(path for path in (folder / "broken.partial").rglob("*") if path.is_dir())]
    for path in places:
        path.chmod(0o500)
    try:
        return refused(training, preexec_fn=None if os.geteuid() else obey)
    finally:
        for path in places:
            path.chmod(0o700)


def damaged(training, folder, change):
    """A file of the saved state is changed, and the state removed as the message says."""
    file = next((folder / "broken.partial/resume").glob("step-*/rank-1.safetensors"))
    content = file.read_bytes()
    file.write_bytes(change(content))
    line = refused(training)
    assert str(file.parent) in line
    shutil.rmtree(file.parent)
    return line


def truncated(training, folder):
    """a truncated file of the saved state:"""
    return damaged(training, folder, lambda content: content[:len(content) // 2])


def flipped_byte(training, folder):
    """a flipped byte in it:"""
    return damaged(training, folder, lambda content: content[:-999] + bytes([content[-999] ^ 1]) + content[-998:])


def other_parent(training, folder):
    """a flipped byte in the weights that the run started from:"""
    file = folder / "m0/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-999] + bytes([content[-999] ^ 1]) + content[-998:])
    line = refused(training)
    file.write_bytes(content)
    return line


def no_data(training, folder):
    """the data file deleted:"""
    (folder / "simp.json").rename(folder / "elsewhere.json")
    line = refused(training)
    (folder / "elsewhere.json").rename(folder / "simp.json")
    return line


# ----------------------------------------------------------------------------------------------------------- experiment

def kill_experiment(cfg, folder):
    """Kills an experiment until it has been killed often enough, and compares it with one that was left alone."""
    lines = [{"text": text[:40], "choices": [text[40:60], text[60:80]], "label": 0} for text in
             (item["input"] for item in read_json(folder / "simp.json")["train"][:20])]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "suite.toml").write_text('[[benchmark]]\nname = "next"\ncategory = "Rs"\nfile = "items.jsonl"\n'
                                       'doc_to_text = "text"\ndoc_to_choice = "choices"\ndoc_to_target = "label"\n')
    place, kept = folder / "experiment", folder / "whole"

    def command():
        return [sys.executable, "experiment.py", "--init_llm", folder / "m0", "--init_stack", folder / "m0", "--order",
                ",".join(TASKS), "--data", folder, "--out", place, "--report", place / "report", "--suite",
                folder / "suite.toml", "--train_args", "--max_steps 12 --learning_rate 1e-3 --max_eval_samples 8 "
                "--dtype fp32 --save_minutes 0", "--evaluate_args", "--limit 4 --dtype fp32"]

    began = time.monotonic()
    status, printed = Victim(command()).end()
    assert status == 0, printed
    seconds = time.monotonic() - began
    print(f"an experiment that nothing happens to takes {seconds:.1f} s", flush=True)
    place.rename(kept)
    for kill in range(1, cfg.kills + 1):
        ended = not Victim(command()).kill(lambda: True, random.uniform(0.05, 2 / cfg.kills) * seconds)
        stages = [path for model in ("llm", "stack") for path in place.glob(f"{model}/m[1-9]-*")
                  if path.suffix != ".partial"]
        for stage in stages:
            assert checkpoint_digest(stage) == checkpoint_digest(kept / stage.relative_to(place)), stage
        print(f"kill {kill}/{cfg.kills}: {'it had ended' if ended else f'{len(stages)} stages there, each whole'}",
              flush=True)
    status, printed = Victim(command()).end()
    assert status == 0, printed
    differing = [path.relative_to(kept) for pattern in ("*/*/eval/predictions-*.jsonl", "*/*/model.safetensors",
                 "report/report.md", "report/*.svg") for path in kept.glob(pattern)
                 if digest([path]) != digest([place / path.relative_to(kept)])]
    assert not differing, differing
    print("its weights, predictions, report and figures are, byte for byte, those of the one left alone")


def main(cfg):
    """Runs the faults; an AssertionError says what does not hold."""
    random.seed(cfg.seed)
    folder = Path(cfg.folder).absolute()
    prepare(folder)
    (kill_training if cfg.what == "training" else kill_experiment)(cfg, folder)


if __name__ == "__main__":
    run((FaultSettings, main), __doc__)
