"""Stages: what a chain of runs is made of, each a command of its own that makes one directory, whole or not at all.

A chain that was interrupted goes on at the stage where it stopped, since what is there already is not made again.
"""
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.files import UserError, read_json, write_json
from common.formatting import format_duration
from common.provenance import changed
from common.settings import CONFIGS, ROOT, model_shape, read_config, read_toml
from model.config import ModelConfig
from model.growth import OPERATORS


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
        left = f", about {format_duration(took / done * (total - done))} left in all" if done and not dry_run else ""
        command = [str(word) for word in stage.command]
        print(f"[{index}/{len(stages)}] {stage.out}: {stage.flops / 1e12:.1f} of the {(total - done) / 1e12:.1f} TFLOP "
              f"to come{left}\n{shlex.join(command)}", flush=True)
        if not dry_run:
            run_command(command)
        done += stage.flops


def run_command(command):
    """Runs a command and ends this process with its status if that is not 0.

    SIGTERM and SIGINT are passed on to it: what it does about them is its own affair, and this process waits for it.
    """
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
    before = {number: signal.signal(number, lambda number, frame: process.send_signal(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status < 0:
        raise UserError(f"{shlex.join(command)} was ended by signal {-status} (9: out of memory, or killed)")
    if status:
        sys.exit(status)


def claim(path, stages, **settings):
    """Records in a JSON file what stages are made with, or raises a UserError where some of them were made otherwise.

    The recipe is part of it: the size's tables and the pretraining config. Stages are found again by their names, and
    those of another recipe have the same.
    """
    tables = {name: table for name, table in read_config("size", settings["size"]).items()
              if name in ("model", "base", "stack", "llm")}
    mine = json.loads(json.dumps(settings | tables | {"pretrain.toml": read_toml(CONFIGS / "train/pretrain.toml")}))
    if path.exists() and any(stage.out.exists() for stage in stages) and (old := read_json(path)) != mine:
        raise UserError(f"{path.parent} holds stages made with other settings: {'; '.join(changed(old, mine))}. Choose "
                        "another --out, or remove it")
    write_json(path, mine)


def words(text):
    """The words of a command line, or a UserError where its quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no command line: {error}") from None


def shape(size, depth=None):
    """The shape that a size preset trains, with `depth` layers instead of its own if given."""
    return ModelConfig(**model_shape(size, depth))


def train_stage(size, data, out, flops, launcher, flags):
    """One pretraining run with the flags given; `launcher` are the words before train.py, such as those of torchrun."""
    return Stage(out, [*(launcher or [sys.executable]), ROOT / "train.py", "--config", CONFIGS / "train/pretrain.toml",
                       "--size", size, "--data", data, "--out", out, *flags], flops)


def base_stage(size, data, out, depth, tokens, launcher, flags=()):
    """The run of the base: `depth` layers, trained on so many tokens until it is grown."""
    return train_stage(size, data, out, shape(size, depth).flops(tokens), launcher,
                       ["--phase", "base", "--num_hidden_layers", depth, "--max_tokens", tokens, *flags])


def growth_stage(init, out, operator, depth, target):
    """A growth from `depth` to `target` layers; a UserError where the operator cannot make them."""
    OPERATORS[operator](depth, target)
    return Stage(out, [sys.executable, ROOT / "stack.py", "grow", "--init", init, "--out", out, "--operator", operator,
                       "--target_layers", target])
