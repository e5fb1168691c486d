"""Estimates: the FLOPs of fine-tuning and evaluation, and the time that jobs take."""
import functools
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.configs import ROOT, read_config
from common.dtypes import TORCH_DTYPES, resolve_dtype
from common.files import UserError, read_text
from corpus.tasks import read_task
from model.config import ModelConfig
from pipeline.jobs import Job
from training.train_config import TrainConfig

CHARACTERS_PER_TOKEN = 4  # roughly


def finetune_flops(config: ModelConfig, data: Path, settings: TrainConfig) -> float:
    """The approximate FLOPs of fine-tuning on the training split of a task file."""
    items = read_splits(data)["train"][:settings.max_train_samples]
    tokens = sum(len(item["input"]) + len(item["output"]) for item in items) / CHARACTERS_PER_TOKEN
    epochs = settings.num_train_epochs if settings.max_steps is None else \
        settings.max_steps * settings.global_batch_size / max(1, len(items))
    return config.flops(tokens * epochs)


@dataclass(frozen=True)
class EvaluationWork:
    """The tokens that an evaluation reads and generates.

    data: the folder of the preprocessed task files. files: the local files of the suite; what lm-eval downloads is not
    counted. limit: the number of items of each task and file; None: all. text_tokens: of the held-out text. models: how
    many compute the losses, two for a divergence. decodes: whether test sets are decoded.
    """
    data: Path
    tasks: Iterable[str]
    files: Iterable[Path]
    limit: int | None
    text_tokens: float
    models: int
    decodes: bool

    @property
    def tokens(self) -> float:
        """The approximate number of tokens, counted once for each time that a model reads or generates them."""
        tokens = self.models * self.text_tokens
        for task in dict.fromkeys(self.tasks):
            decoding = read_config("task", task)["decoding"]
            new_tokens = decoding.get("num_beams", 1) * decoding["max_new_tokens"] / 2 if self.decodes else 0
            tokens += sum((self.models + self.decodes) * len(item["input"]) / CHARACTERS_PER_TOKEN + new_tokens
                          for item in read_splits(self.data / f"{task}.json")["test"][:self.limit])
        for file in self.files:
            lines = read_text(file).splitlines() if file.is_file() else []
            tokens += sum(map(len, lines[:self.limit])) / CHARACTERS_PER_TOKEN
        return tokens


def evaluate_flops(config: ModelConfig, work: EvaluationWork) -> float:
    """The approximate FLOPs of an evaluation: a third of training's for each token."""
    return config.flops(work.tokens) / 3


@functools.cache
def read_splits(path: Path) -> dict[str, list]:
    """The splits of the preprocessed task file <task>.json."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it with data_prep.py task, or `make data`")
    return read_task(path, read_config("task", path.stem)["source"])[0]


def matmul_speed(repeats: int = 8) -> float:
    """FLOPs per second of a matrix product on this machine's device: of small matrices in fp32 on a CPU, of large ones
    in the default dtype on a GPU."""
    device, size, dtype = ("cuda", 8192, TORCH_DTYPES[resolve_dtype("auto")]) if torch.cuda.is_available() else \
        ("cpu", 1024, torch.float32)
    a = torch.rand(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    began = time.perf_counter()
    for _ in range(repeats):
        b = a @ a
    b.sum().item()
    return 2 * size ** 3 * repeats / (time.perf_counter() - began)


@functools.cache
def machine_speed() -> float:
    """`matmul_speed`, measured in another process: this one would keep its CUDA context while the jobs run."""
    code = "from pipeline.costs import matmul_speed; print(matmul_speed())"
    measured = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    try:
        return float(measured.stdout.split()[-1])
    except (IndexError, ValueError):
        raise UserError("the speed of this machine cannot be measured: "
                        f"{(measured.stderr.splitlines() or ['no output'])[-1]:.200}") from None


class Pace:
    """The speed of each script: as measured on its finished jobs, otherwise the given one in FLOPs per second."""

    def __init__(self, speed: float):
        self.speed = speed
        self.flops_done: dict[str, float] = defaultdict(float)  # by script
        self.seconds_spent: dict[str, float] = defaultdict(float)

    def add(self, job: Job, seconds: float) -> None:
        """Counts a finished job."""
        self.flops_done[job.script] += job.flops
        self.seconds_spent[job.script] += seconds

    def seconds(self, jobs: Iterable[Job]) -> float:
        """The time that jobs will take."""
        def seconds_per_flop(script: str) -> float:
            done = self.flops_done[script]
            return self.seconds_spent[script] / done if done else 1 / self.speed

        return sum(job.flops * seconds_per_flop(job.script) for job in jobs)
