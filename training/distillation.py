"""Staying close to the model that a chain of tasks started from, m0: KL(m0 || model), added to the loss of a step.

The divergence is that of the next token, exact over the vocabulary, on two kinds of samples:

    input_kl        the step's samples, rehearsed ones included, where a target is predicted
    self_replay_kl  texts that m0 generated from <bos> (or eos) alone: no data of the past is needed (Bansal and
                    Sanghavi, arXiv 2505.13811, who use the likelihood of these texts as an estimate of the divergence)

Every rank holds m0 in memory. The texts are generated before the first task and written next to its checkpoint, where
the next task finds them.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.files import UserError, read_json
from common.writing import write_json
from model.checkpoint import checkpoint_digest
from model.generation import BatchOptions, GenerationConfig, generate
from model.hub import fetch_checkpoint, load_model
from model.tokenizer import Tokenizer
from training.batches import Sample, count_tokens, make_microbatches, replay_in_epochs, to_inputs
from training.run import Run
from training.train_config import TrainConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


TEXTS = "self-replay.json"  # name of the file of generated texts
TEXT_TOKENS = 128  # of a generated text


class Distillation:
    """The divergence terms of a run."""

    def __init__(self, run: Run):
        self.run, self.source = run, start_of(run.cfg, run.lineage)
        # without gradients: under ZeRO-3 autograd would make one, of zeros, for the head that is passed to the engine
        self.model = load_model(self.source, run.dtype, run.dist.device).requires_grad_(False)
        self.texts: list[Sample] = []

    def begin(self) -> None:
        """Reads or generates the texts of m0."""
        if self.run.cfg.self_replay_kl:
            self.texts = self.read_or_generate()

    def add_gradients(self, engine: "DeepSpeedEngine", step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Adds the gradients of the terms of a step. Returns the divergences in nats per token, by name."""
        cfg, found = self.run.cfg, dict[str, float]()
        if cfg.input_kl:
            found["input_kl"] = self.add_term(engine, samples, cfg.input_kl)
        if self.texts and (chosen := replay_in_epochs(self.run.task_seed, len(self.texts), step, cfg.self_replay_share,
                                                      cfg.global_batch_size)):
            found["self_replay_kl"] = self.add_term(engine, [self.texts[index] for index in chosen],
                                                    cfg.self_replay_kl)
        return found

    def add_term(self, engine: "DeepSpeedEngine", samples: Sequence[Sample], weight: float) -> float:
        """Adds `weight` times the gradient of the mean divergence over the targets of some samples, over all ranks.
        Returns the divergence."""
        dist = self.run.dist
        num_targets, total = count_tokens(samples)[1], torch.zeros((), device=dist.device)
        for microbatch in make_microbatches(self.run.cfg, dist, samples):
            inputs = to_inputs(microbatch, dist.device)
            with torch.no_grad():
                states, _ = self.model.target_states(*inputs)
            engine.set_gradient_accumulation_boundary(False)
            divergence = engine(*inputs, (states, self.model.lm_head.weight))
            total += divergence.detach()
            engine.backward(divergence * (weight * dist.world_size / num_targets), scale_wrt_gas=False)
        return dist.all_reduce_sum(total)[0] / num_targets

    def read_or_generate(self) -> list[Sample]:
        """The texts of m0: those of the initial checkpoint or of an interrupted run, or else new ones, which all ranks
        generate and rank 0 writes to the directory of the run."""
        dist, count, seed = self.run.dist, self.run.cfg.self_replay_texts, self.run.cfg.seed
        tokens = min(TEXT_TOKENS, self.run.model_config.max_position_embeddings - 1)
        key = {"start": self.run.record["start_digest"], "texts": count, "seed": seed, "tokens": tokens}
        texts = dist.on_rank0(lambda: find_texts([self.run.directory, self.run.source], key,
                                                 self.run.model_config.vocab_size))
        if texts is None:
            dist.print0(f"generating {count} texts of {self.source}")
            own = range(dist.rank, count, dist.world_size)
            parts = dist.gather(dist.on_all_ranks(lambda: generate_texts(self.model, self.source, own, seed, tokens)))
            texts = dist.on_rank0(lambda: [parts[number % dist.world_size][number // dist.world_size]
                                           for number in range(count)])
        dist.on_rank0(lambda: write_json(self.run.directory / TEXTS, {"key": key, "texts": texts}))
        return [(np.array(ids), 1) for ids in texts]


def generate_texts(model: Any, source: Path, numbers: Sequence[int], seed: int, tokens: int) -> list[list[int]]:
    """Token ids of texts sampled from a model, starting with <bos> or, for a tokenizer without one, the end-of-text
    token. A text depends on its number and the seed. tokens: the maximum length of a text."""
    tokenizer = Tokenizer(source)
    start = tokenizer.start_id
    assert tokenizer.eos_id is not None  # checkpoints to fine-tune have an end-of-text token
    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, seed=seed)
    texts = generate(model, [[start]] * len(numbers), config, tokenizer.eos_ids,
                     options=BatchOptions(numbers))
    return [[start, *ids, *([tokenizer.eos_id] if len(ids) < tokens else [])] for ids in texts]


def find_texts(directories: Sequence[Path], key: Mapping[str, Any], vocab_size: int) -> list[list[int]] | None:
    """The generated texts in the first of some directories that has those of a key; None if none has."""
    for path in (directory / TEXTS for directory in directories):
        if path.exists() and (found := read_json(path, dict)).get("key") == key:
            texts, tokens = found.get("texts"), range(vocab_size)
            if not isinstance(texts, list) or len(texts) != key["texts"] or not all(
                    isinstance(text, list) and len(text) > 1 and all(type(token) is int and token in tokens
                                                                     for token in text) for text in texts):
                raise UserError(f"{path} is damaged: remove it to generate the texts again")
            return texts
    return None


def start_of(cfg: TrainConfig, lineage: Mapping[str, Any]) -> Path:
    """The directory of the checkpoint that the chain of tasks started from: --init at the first task."""
    if not lineage.get("tasks"):
        return fetch_checkpoint(str(cfg.init))
    try:
        return fetch_checkpoint(lineage["start"]["init"])
    except UserError as error:
        raise UserError(f"the chain of tasks of {cfg.init} started from {lineage['start']['init']} (a relative path is "
                        f"relative to the folder in which it was started): {error}") from None


def start_digest(cfg: TrainConfig, lineage: Mapping[str, Any], parent: str | None) -> dict[str, str | None]:
    """The entry of run.json that identifies the start of the chain, if the run needs it. Raises UserError if that
    checkpoint does not exist any more or has changed. parent: the digest of --init."""
    if not (cfg.input_kl or cfg.self_replay_kl):
        return {}
    if lineage.get("tasks") and "start" not in lineage:
        raise UserError(f"{cfg.init} does not say which checkpoint its chain of tasks started from: train the chain "
                        "again")
    digest = checkpoint_digest(start_of(cfg, lineage)) if lineage.get("tasks") else parent
    if lineage.get("tasks") and digest != lineage["start"]["digest"]:
        raise UserError(f"{lineage['start']['init']}, which the chain of tasks started from, has changed: restore it")
    return {"start_digest": digest}
