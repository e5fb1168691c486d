"""Methods against forgetting, as hooks around the step: anchors, distillation, adapters, variational learning. The
class `CarriedMoments` uses the same hooks to carry AdamW's moments over to further pretraining.

A method stores its values in dictionaries keyed by the flat tensors that the optimizer updates
(training/zero_shards.py), so it works unchanged under every ZeRO stage. What the next task needs is written next to
the checkpoint.
"""
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from common.files import UserError
from common.provenance import GROWTH, RUN
from model.lora import AdaptedLinear
from model.parameter_files import (
    FISHER,
    MOMENTS,
    POSTERIOR,
    SIDE_FILES,
    ParameterFiles,
    find_parameter_files,
    open_side_files,
    parameter_file_name,
    write_parameter_file,
)
from training.batches import Sample, count_tokens
from training.data import TrainData
from training.distillation import Distillation
from training.engine import gathered, save_adapter
from training.pruning import fapm_prune
from training.run import Run
from training.train_config import TrainConfig
from training.train_state import StepResult
from training.zero_shards import (
    Fragment,
    base_optimizer,
    changing_weights,
    fill_optimizer_state,
    flat_tensors,
    local_fragments,
    state_of,
    update_weights,
    wait_for_changes,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


TrainStep = Callable[[Run, "DeepSpeedEngine", Sequence[Sequence[Sample]]], StepResult]


class Method:
    """Plain training, with the optional KL terms of distillation. Subclasses override the hooks they need."""

    def __init__(self, run: Run, engine: "DeepSpeedEngine"):
        self.run, self.engine = run, engine
        self.distillation = run.dist.on_all_ranks(lambda: Distillation(run)) \
            if run.cfg.input_kl or run.cfg.self_replay_kl else None

    def begin(self) -> None:
        """Called before the first step of a run or of its continuation."""
        if self.distillation:
            self.distillation.begin()

    def before_step(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Called before the gradients of the loss of a step, to which it may add others. Returns what to log."""
        return self.distillation.add_gradients(self.engine, step, samples) if self.distillation else {}

    def after_step(self, applied: bool) -> None:
        """Called after the optimizer step; applied: whether it has updated the weights."""

    def finish(self) -> None:
        """Called after the last step, before the final evaluation."""

    def write_side_files(self) -> None:
        """Writes what the next task needs next to the final checkpoint."""


class Anchored(Method):
    """AdamW with the weights that the run started from as an anchor: L2-SP, WiSE-FT, FAPM and EWC, by the settings.

    EWC (Kirkpatrick et al., arXiv 1612.00796) uses one anchor and one Fisher information for all earlier tasks (Schwarz
    et al., arXiv 1805.06370, with γ = 1). AnchoredAdamW computes the L2-SP and EWC terms.
    """

    def __init__(self, run: Run, engine: "DeepSpeedEngine", fisher: ParameterFiles | None, data: TrainData,
                 train_step: TrainStep):
        super().__init__(run, engine)
        self.data, self.train_step = data, train_step  # to measure the Fisher information
        optimizer, fragments = base_optimizer(engine), local_fragments(engine)
        self.anchors = {flat: flat.detach().clone() for flat in flat_tensors(fragments)}
        optimizer.anchors, optimizer.rate = self.anchors, run.cfg.l2_sp_rate / run.cfg.learning_rate
        optimizer.ewc_strength, optimizer.l2_strength = run.cfg.ewc_strength, run.cfg.l2_sp_strength
        if fisher:
            optimizer.fisher = {flat: torch.zeros_like(flat) for flat in self.anchors}
            read_fragments(run, fisher, fragments, {"fisher": optimizer.fisher})

    @torch.no_grad()
    def finish(self) -> None:
        """FAPM: undoes part of the change. WiSE-FT: interpolates trained and initial weights (Wortsman et al., arXiv
        2109.01903, eq. 1)."""
        if self.run.cfg.fapm_sparsity:
            fapm_prune(self.run, self.engine, self.anchors)
        if self.run.cfg.wise_ft_alpha < 1:
            for flat, anchor in self.anchors.items():
                flat.lerp_(anchor, 1 - self.run.cfg.wise_ft_alpha)
        if self.run.cfg.fapm_sparsity or self.run.cfg.wise_ft_alpha < 1:
            update_weights(self.engine)

    def write_side_files(self) -> None:
        """EWC: measures the diagonal Fisher information, adds that of the earlier tasks, and writes the sum.

        It is the empirical Fisher information: the mean over samples of the squared gradient of the sample's
        log-likelihood, which is a sum over its target tokens.
        """
        if not self.run.cfg.ewc_strength:
            return
        samples = self.data.sample(self.run.cfg.fisher_samples)
        optimizer = base_optimizer(self.engine)
        squares = optimizer.fisher or \
            {flat: torch.zeros_like(flat) for flat in flat_tensors(local_fragments(self.engine))}
        unclipped = dataclasses.replace(self.run, cfg=dataclasses.replace(self.run.cfg, max_grad_norm=0.0))
        with accumulating_squares(self.engine, squares):
            for sample in tqdm(samples, "Fisher information", leave=False, disable=self.run.dist.hides_progress):
                num_targets = count_tokens([sample])[1]  # the loss of a step is a mean over them
                optimizer.square_weight = num_targets ** 2 / len(samples)
                loss, grad_norm, _ = self.train_step(unclipped, self.engine, [[sample]])
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    self.run.dist.fail(UserError(f"the Fisher information cannot be measured: loss {loss}, gradient "
                                                 f"norm {grad_norm} of a training sample"))
        write_side_file(self.run, self.engine, FISHER,
                        {"fisher": lambda fragment: fragment.of(squares[fragment.flat])})


class CarriedMoments(Method):
    """Pretraining that continues with the moments of AdamW that the run before it, or growth, has left."""

    def __init__(self, run: Run, engine: "DeepSpeedEngine", moments: ParameterFiles | None):
        super().__init__(run, engine)
        if moments:
            run.dist.on_all_ranks(lambda: fill_optimizer_state(engine, moments, SIDE_FILES[MOMENTS], num_updates(run)))
        elif run.cfg.init:
            run.dist.print0(f"{run.cfg.init} has no optimizer moments: they start at zero")

    def write_side_files(self) -> None:
        """Writes the moments, unless no step was taken."""
        if not (state := base_optimizer(self.engine).state):
            return
        write_side_file(self.run, self.engine, MOMENTS,
                        {kind: partial(state_of, state, kind) for kind in SIDE_FILES[MOMENTS]})


def num_updates(run: Run) -> int:
    """The number of optimizer updates behind the moments of the initial checkpoint. Raises UserError if its record does
    not have it."""
    if not (updates := run.lineage.get("updates", 0)):
        raise UserError(f"{run.cfg.init} has optimizer moments, but no record ({RUN} or {GROWTH}) that tells after how "
                        "many updates: copy it as well, or remove the moments")
    return updates


class Adapted(Method):
    """Fine-tuning of adapters. The checkpoint has them merged, and `adapter/` in it holds them in PEFT's format."""

    def finish(self) -> None:
        """Merges the adapters, so that the final losses are those of the checkpoint, whose weights may be rounded."""
        for module in self.engine.module.modules():
            if isinstance(module, AdaptedLinear):
                with gathered(self.engine, list(module.parameters()), modifier_rank=0):
                    module.merge()
        wait_for_changes()

    def write_side_files(self) -> None:
        """Writes the adapters."""
        save_adapter(self.run, self.engine)


@contextlib.contextmanager
def accumulating_squares(engine: "DeepSpeedEngine", squares: dict[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Within the block, steps add squared unclipped gradients to `squares` and do not change the weights."""
    outer, optimizer = engine.optimizer, base_optimizer(engine)
    clipping = getattr(outer, "clip_grad", None)  # ZeRO's optimizers clip; without ZeRO optimizer_step does
    optimizer.squares, outer.clip_grad = squares, 0.0
    yield
    optimizer.squares, outer.clip_grad = None, clipping


class Variational(Method):
    """Variational continual learning (Nguyen et al., arXiv 1710.10628) with a Gaussian over every weight, by IVON.

    Each step takes its gradients at sampled weights. The prior is the previous task's posterior with its precision
    times tau; for the first task it has one precision around the initial weights.
    """

    def __init__(self, run: Run, engine: "DeepSpeedEngine", posterior: ParameterFiles | None):
        super().__init__(run, engine)
        self.optimizer, fragments = base_optimizer(engine), local_fragments(engine)
        means = {flat: flat.detach().clone() for flat in flat_tensors(fragments)}
        precisions: dict[torch.Tensor, Any] = dict.fromkeys(means, run.cfg.prior_precision)
        if posterior:
            precisions = {flat: torch.zeros_like(mean) for flat, mean in means.items()}
            read_fragments(run, posterior, fragments, {"mean": means, "precision": precisions})
            with torch.no_grad():
                for flat, mean in means.items():
                    flat.copy_(mean)  # in fp32; the checkpoint may be rounded to bf16
                    precisions[flat].mul_(run.cfg.tau)
            update_weights(engine)
        self.optimizer.begin(fragments, {flat: (mean, precisions[flat]) for flat, mean in means.items()},
                             run.dist.device)

    def before_step(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Samples the weights of a step."""
        with changing_weights(self.engine) as fragments:
            self.optimizer.perturb(fragments, (self.run.task_seed, step))
        return super().before_step(step, samples)

    def after_step(self, applied: bool) -> None:
        """Restores the means if the optimizer has skipped the step."""
        if not applied:
            with changing_weights(self.engine) as fragments:
                self.optimizer.restore(fragments)

    def write_side_files(self) -> None:
        """Writes the posterior: means and precisions of all weights."""
        write_side_file(self.run, self.engine, POSTERIOR, {
            "mean": lambda fragment: fragment.of(fragment.flat),
            "precision": lambda fragment: self.optimizer.precision(
                fragment.flat, slice(fragment.offset, fragment.offset + fragment.count))})


def make_method(run: Run, engine: "DeepSpeedEngine", data: TrainData, train_step: TrainStep) -> Method:
    """The method of a run, for an engine whose weights are the initial ones. train_step: the function of train.py."""
    cfg, dist, source = run.cfg, run.dist, run.source
    files = dist.on_all_ranks(lambda: open_side_files(source, side_file_name(cfg), run.model_config))
    if cfg.optimizer == "ivon":
        dist.print0(f"prior: {'the posterior of' if files else 'a Gaussian around the weights of'} {cfg.init}")
        return Variational(run, engine, files)
    if cfg.lora:
        return Adapted(run, engine)
    if cfg.carry_moments:
        return CarriedMoments(run, engine, files)
    return Anchored(run, engine, files, data, train_step) if cfg.anchored else Method(run, engine)


def side_file_name(cfg: TrainConfig) -> str | None:
    """Name of the side files that a run reads from the initial checkpoint if they exist; None if it reads none."""
    if cfg.optimizer == "ivon":
        return None if cfg.prior == "weights" else POSTERIOR
    return FISHER if cfg.ewc_strength else MOMENTS if cfg.carry_moments else None


def find_side_files(cfg: TrainConfig, source: Path, lineage: Mapping[str, Any]) -> list[Path]:
    """The side files that a run reads from the initial checkpoint. Raises UserError if required ones are missing."""
    name = side_file_name(cfg)
    paths = find_parameter_files(source, name) if name else []
    if not paths and cfg.optimizer == "ivon" and cfg.prior == "posterior":
        raise UserError(f"{source} has no posterior to use as the prior: fine-tune it with --optimizer ivon first, or "
                        "give --prior weights")
    if not paths and name == FISHER and lineage.get("tasks"):
        raise UserError(f"{source} has no Fisher information of {lineage['tasks'][-1]['task']}, which it was trained "
                        "on: train it with --ewc_strength as well")
    return paths


def read_fragments(run: Run, files: ParameterFiles, fragments: Iterable[Fragment],
                   kinds: dict[str, dict[torch.Tensor, torch.Tensor]]) -> None:
    """Fills this rank's fragments of tensors from files. kinds: name -> tensors, by flat tensor, to fill."""
    def read() -> None:
        for fragment in fragments:
            for kind, tensors in kinds.items():
                files.read(kind, fragment.name, fragment.start, fragment.of(tensors[fragment.flat]))

    run.dist.on_all_ranks(read)


def write_side_file(run: Run, engine: "DeepSpeedEngine", name: str,
                    kinds: dict[str, Callable[[Fragment], torch.Tensor]]) -> None:
    """Writes values of all ranks' fragments next to the final checkpoint; without ZeRO rank 0 has all of them."""
    def remove_old() -> None:
        for old in run.directory.glob(f"{name}-*-of-*.safetensors"):  # left by a killed process
            old.unlink()

    run.dist.on_rank0(remove_old)
    sharded = engine.zero_optimization()
    path = run.directory / parameter_file_name(name, run.dist.rank, run.dist.world_size if sharded else 1)
    run.dist.on_all_ranks(lambda: write_parameter_file(path, local_fragments(engine), kinds)
                          if sharded or run.dist.rank == 0 else None)
