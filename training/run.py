"""A training run: what it depends on, resolved once and held in one object, and which samples it takes."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.distributed import Distributed
from common.dtypes import TORCH_DTYPES
from common.stop_request import StopRequest
from common.writing import require_file_name
from model.config import ModelConfig
from training.selection import Shapes, count_elements, training_flops
from training.train_config import TrainConfig

TASK_SEEDS = 1_000_000  # between the seeds of two tasks of a chain


def partial_directory(out: str | Path) -> Path:
    """The directory that a run writes to until it is finished."""
    return require_file_name(out).with_name(Path(out).name + ".partial")


@dataclass(frozen=True)
class Run:
    """The resolved inputs of a run.

    Attributes:
        cfg: the settings, with `dtype` and `zero` resolved.
        dist: the process group.
        request: whether a signal has asked this process to stop.
        source: directory of the initial checkpoint, or, for new weights, of the tokenizer.
        model_config: the shape of the model.
        lineage: training history of the initial checkpoint (see common.provenance.read_lineage), and the layers that
            the run begins by inserting.
        record: the content of run.json so far.
        first_sample: position in the sample stream where the run starts.
        trained: the parameters that are trained, name -> shape; the others are frozen.
        layer_map: the block expansion that the run begins with, as in model/growth.py; empty without one.
        earlier_tasks: the tasks to rehearse, as in the lineage.
    """
    cfg: TrainConfig
    dist: Distributed
    request: StopRequest
    source: Path
    model_config: ModelConfig
    lineage: dict[str, Any]
    record: dict[str, Any]
    first_sample: int = 0
    trained: Shapes = field(default_factory=dict)
    layer_map: tuple[int, ...] = ()
    earlier_tasks: tuple[dict[str, Any], ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return TORCH_DTYPES[self.cfg.dtype]

    @property
    def directory(self) -> Path:
        """The directory that the run writes to until it is finished."""
        return partial_directory(self.cfg.out)

    @property
    def num_trained(self) -> int:
        """Number of parameters that are trained."""
        return count_elements(self.trained)

    @property
    def task_seed(self) -> int:
        """Seed of what is drawn again at each task of a chain: replayed text, adapters, noise of the weights. Chains
        with neighbouring seeds share none of it."""
        return self.cfg.seed + TASK_SEEDS * len(self.lineage.get("tasks", []))

    def lineage_after(self, result: dict[str, Any]) -> dict[str, Any]:
        """The lineage of the finished checkpoint."""
        own: dict[str, Any]
        if self.cfg.task:
            task = {"task": self.cfg.task, "data": str(self.cfg.data), "data_digest": self.record["data_digest"],
                    "max_train_samples": self.cfg.max_train_samples, "template": self.cfg.template}
            own = {"tasks": [*self.lineage.get("tasks", []), task]}
            if not self.lineage.get("tasks"):
                own["start"] = {"init": str(self.cfg.init), "digest": self.record["parent_digest"]}
        else:
            text = text_key(self.cfg, self.record["data_digest"])
            own = {"text": text | {"samples": result["last_sample"]}}
            if self.cfg.carry_moments and "updates" in result:  # checkpoints of epochs have no moments next to them
                own["updates"] = result["updates"]
        kept = {name: value for name, value in self.lineage.items() if name != "updates"}
        return kept | {"flops": result["flops"]} | own


def text_key(cfg: TrainConfig, digest: str) -> dict[str, Any]:
    """The key of a stream of pretraining samples: positions are comparable only between streams with equal keys."""
    return {"data_digest": digest, "seed": cfg.seed, "seq_length": cfg.seq_length,
            "max_train_samples": cfg.max_train_samples}


def first_sample(cfg: TrainConfig, digest: str, lineage: dict[str, Any]) -> int:
    """Position in the sample stream where a run starts: in pretraining, after the samples --init was trained on."""
    text = lineage.get("text", {})
    same_text = {**text_key(cfg, digest), "samples": text.get("samples")} == text
    if cfg.skip_samples is not None or cfg.task or not same_text:
        return cfg.skip_samples or 0
    return text["samples"]


def num_samples(cfg: TrainConfig, config: ModelConfig, size: int, lineage: dict[str, Any], trained: Shapes) -> int:
    """The number of samples that a run takes from the stream, given the size of the training split."""
    if cfg.max_steps:
        return cfg.max_steps * cfg.global_batch_size
    if cfg.max_tokens:
        return cfg.max_tokens // cfg.seq_length
    if cfg.max_flops:  # whole batches
        step_flops = training_flops(cfg.global_batch_size * cfg.seq_length, config, trained)
        steps = (cfg.max_flops - lineage.get("flops", 0)) // step_flops
        return max(0, int(steps)) * cfg.global_batch_size
    return max(1, round(cfg.num_train_epochs * size))
