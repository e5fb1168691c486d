"""Stages: what a chain of runs is made of, each a command of its own that makes one directory, whole or not at all.

A chain that was interrupted goes on at the stage where it stopped, since what is there already is not made again.
"""
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.files import UserError
from runs import clock
from settings import CONFIGS, ROOT, read_config


@dataclass(frozen=True)
class Stage:
    """One command and the directory that it makes; `flops` is its work, by which the time left is estimated."""
    out: Path
    command: list
    flops: float = 0.0


def run_stages(stages, dry_run=False):
    """Runs stages in order, each as a process of its own that prints for itself; with `dry_run` prints the commands.

    Before each stands which one it is, and how long all that is left will take at the speed so far. A stage that fails
    has said why: this process ends with its status.
    """
    began, done, total = time.monotonic(), 0.0, sum(stage.flops for stage in stages)
    for index, stage in enumerate(stages, 1):
        took = time.monotonic() - began
        left = f", about {clock(took / done * (total - done))} left in all" if done else ""
        command = [str(word) for word in stage.command]
        print(f"[{index}/{len(stages)}] {stage.out}: {stage.flops / 1e12:.1f} of the {(total - done) / 1e12:.1f} TFLOP "
              f"to come{left}\n{shlex.join(command)}", flush=True)
        if not dry_run and (status := subprocess.run(command, cwd=ROOT).returncode):
            sys.exit(status)
        done += stage.flops


def shape(size, depth=None):
    """The shape that a size preset trains, with `depth` layers instead of its own if given."""
    if (model := read_config("size", size).get("model")) is None:
        raise UserError(f"the size {size} has no recipe for pretraining: it starts from published weights")
    return ModelConfig(**model | ({} if depth is None else {"num_hidden_layers": depth}))


def train_stage(size, data, out, flops, launcher, flags):
    """One pretraining run with the flags given; `launcher` are the words before train.py, such as those of torchrun."""
    return Stage(out, [*(launcher or [sys.executable]), "train.py", "--config", CONFIGS / "train/pretrain.toml",
                       "--size", size, "--data", data, "--out", out, *flags], flops)


def base_stage(size, data, out, depth, tokens, launcher, flags=()):
    """The run of the base: `depth` layers, trained on so many tokens until it is grown."""
    return train_stage(size, data, out, shape(size, depth).flops(tokens), launcher,
                       ["--phase", "base", "--num_hidden_layers", depth, "--max_tokens", tokens, *flags])


def growth_stage(init, out, operator, depth):
    """A growth to `depth` layers."""
    return Stage(out, [sys.executable, "stack.py", "grow", "--init", init, "--out", out, "--operator", operator,
                       "--target_layers", depth])
