"""Stages of an experiment: a checkpoint each, with its results and how it was trained."""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from analysis.estimates import Estimate
from common.files import finite_float, is_number
from evaluation.conditions import Conditions
from evaluation.suites import Benchmark

T = TypeVar("T")

STAGE = re.compile(r"m(\d{1,3})(?:-([\w-]+))?")  # the directory of a stage: its number and its task
BENCHMARKS, TASKS = "benchmarks", "tasks"  # the kinds of results: attributes of a Stage
TEXT = "text"  # name of the losses of held-out text
CHOICE_METRICS = "acc", "acc_norm", "acc_mutual_info", "r@1"  # of multiple choice: the shares of right answers


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, negative log-likelihood (nats) and accuracy of a multiple-choice benchmark."""
    ece: float
    nll: float
    accuracy: float


@dataclass(frozen=True)
class ItemLosses:
    """Losses of held-out text, or of a test set's references, by item [N]. Where only the mean is known, as from a
    table of stages, there is one value for all items [1].

    nll, kl: sums over an item's tokens, in nats; kl, the divergence from m0, is None if it was not measured.
    conditions: what the values depend on besides the model. digests: of the checkpoint and of its m0; None if unknown.
    """
    nll: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray | None
    conditions: Conditions
    digests: tuple[str | None, str | None] = (None, None)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def total(self) -> "ItemLosses":
        """The losses of all items together [1]."""
        kl = None if self.kl is None else self.kl.sum(keepdims=True)
        return replace(self, nll=self.nll.sum(keepdims=True), tokens=self.tokens.sum(keepdims=True), kl=kl)


@dataclass(frozen=True)
class Choices:
    """The answers to a multiple-choice benchmark by item [N]; from a table of stages, the mean over all items [1].

    right: 1 if the chosen option is right, else 0. nll (nats) and bits_per_byte: of the right option; None if a results
    file does not hold them. chance: the share of right answers by guessing.
    """
    right: np.ndarray
    nll: np.ndarray | None
    bits_per_byte: np.ndarray | None
    chance: float

    @property
    def has_items(self) -> bool:
        """Whether the answers to single items are known."""
        return len(self.right) > 1


@dataclass
class Stage:
    """One checkpoint of one model: its results and how it was trained."""
    model: str
    seed: int
    number: int  # 0 is the start
    name: str
    task: str | None = None
    directory: Path | None = None
    method: str | None = None  # name of the method's folder if the run lies in one, else the method in run.json
    benchmarks: dict[str, Estimate] = field(default_factory=dict)
    tasks: dict[str, Estimate] = field(default_factory=dict)  # each by the metric that it is judged by
    conditions: dict[tuple[str, str], Conditions] = field(default_factory=dict)  # by kind and name of a result
    calibration: dict[str, Calibration] = field(default_factory=dict)  # by benchmark
    sampled: dict[str, Calibration] = field(default_factory=dict)  # averaged over posterior samples
    described: dict[str, Benchmark] = field(default_factory=dict)  # suite entries in the results files, by benchmark
    sources: dict[str, tuple[Path, bool]] = field(default_factory=dict)  # benchmark -> (file, evaluate.py wrote it)
    pair: int | None = None  # pretraining seed of the folder pair-<n>; None if the stage lies in no such folder
    rate: str | None = None  # learning rate of the folder rate-<x>; None if the stage lies in no such folder
    losses: dict[str, ItemLosses] = field(default_factory=dict)  # by task; TEXT for held-out text
    choices: dict[str, Choices] = field(default_factory=dict)  # by benchmark
    unused: list[str] = field(default_factory=list)  # results that are not used, and why
    run: dict[str, Any] = field(default_factory=dict)  # content of run.json
    log: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl

    @property
    def flops(self) -> float | None:
        """The FLOPs of its training, those of the checkpoints that it was made from included; None if unknown."""
        flops = self.run.get("lineage", {}).get("flops")
        return float(flops) if is_number(flops) else None

    @property
    def seconds(self) -> float:
        """The seconds of its training and of what belongs to it, such as Fisher information; NaN if unknown."""
        result = self.run.get("result", {})
        return float(result.get("seconds", math.nan) + result.get("seconds_after", 0.0))

    @property
    def method_name(self) -> str:
        """The name of the method, "none" without one."""
        return self.method or "none"


def method_title(name: str) -> str:
    """The display name of a method, or of the runs without one ("none")."""
    return "fine-tuning without a method" if name == "none" else name


def middle_rate(rates: Sequence[T]) -> T:
    """The learning rate with which test sets are decoded and benchmarks run: the middle one, of two the smaller. rates:
    ascending."""
    return rates[(len(rates) - 1) // 2]


def rates_of(stages: Sequence[Stage]) -> list[str]:
    """The learning rates in the folders of stages, ascending; [""] if no stage lies in a folder rate-<x>."""
    return sorted({stage.rate for stage in stages if stage.number and stage.rate}, key=float) or [""]


def rate_text(text: str) -> str:
    """A learning rate as experiment.py writes it into the name of a folder, so that 1e-3 and 0.001 are the same."""
    return f"{finite_float(text):g}"
