"""What fine-tuning does against forgetting: pulls towards the weights before, or a distribution over them.

A method is told of each step before and after it, of the end of training, and writes what the next task needs beside
the checkpoint. What it keeps lies by the flat tensors that the optimizer updates (see partitions.py), so it works alike
under every ZeRO stage.
"""
import contextlib
import dataclasses
import math

import torch
from tqdm import tqdm

from common.files import UserError
from model.parameter_files import (
    FISHER,
    POSTERIOR,
    find_parameter_files,
    open_fisher,
    open_prior,
    parameter_file_name,
    write_parameter_file,
)
from training.batches import count_tokens
from training.ivon import IVON
from training.zero_shards import base_optimizer, changing_weights, flats, fragments, update_weights


def side_files(cfg):
    """Which files beside the checkpoint that it starts from a run reads."""
    return [POSTERIOR] * (cfg.optimizer == "ivon" and cfg.prior != "weights") + [FISHER] * (cfg.ewc_strength > 0)


def check_method(cfg, source, config, past):
    """Raises UserError where a method needs what is not beside the checkpoint that a run starts from."""
    open_prior(prior_files(cfg, source), source, config)
    open_fisher(fisher_files(cfg, source, past), source, config)


def prior_files(cfg, source):
    """The files of the posterior that is to be the prior; none for a prior around the weights."""
    files = find_parameter_files(source, POSTERIOR) if POSTERIOR in side_files(cfg) else []
    if not files and cfg.optimizer == "ivon" and cfg.prior == "posterior":
        raise UserError(f"{source} has no posterior to be the prior: fine-tune it with IVON first, or give "
                        "--prior weights")
    return files


def fisher_files(cfg, source, past):
    """The files of the earlier tasks' Fisher information; none for the first task."""
    files = find_parameter_files(source, FISHER) if FISHER in side_files(cfg) else []
    if not files and FISHER in side_files(cfg) and past.get("tasks"):
        raise UserError(f"{source} has no Fisher information of {past['tasks'][-1]['task']}, which it was trained on: "
                        "train it with --ewc_strength as well")
    return files


def make_optimizer(cfg, groups):
    """The optimizer of the run's mode: AdamW, with pulls where they are asked for, or IVON."""
    if cfg.optimizer == "ivon":
        return IVON(groups, cfg.learning_rate, cfg.ess, cfg.curvature, (cfg.adam_beta1, cfg.ivon_beta2),
                    cfg.clip_radius, cfg.sample_params)
    kind = AnchoredAdamW if cfg.l2_sp_rate or cfg.ewc_strength else torch.optim.AdamW
    return kind(groups, cfg.learning_rate, (cfg.adam_beta1, cfg.adam_beta2), cfg.adam_epsilon, fused=True)


def make_method(cfg, engine, source, past, dist):
    """The method of a run, for a fresh engine whose weights are those of the checkpoint `source` with that lineage.

    Which files there are rank 0 says, so that all processes read the same or fail together.
    """
    config = engine.module.config
    if cfg.optimizer == "ivon":
        names = dist.on_rank0(lambda: [path.name for path in prior_files(cfg, source)])
        parts = dist.on_all_ranks(lambda: open_prior([source / name for name in names], source, config))
        return Probabilistic(cfg, engine, parts, dist)
    names = dist.on_rank0(lambda: [path.name for path in fisher_files(cfg, source, past)])
    parts = dist.on_all_ranks(lambda: open_fisher([source / name for name in names], source, config))
    return Deterministic(cfg, engine, parts, dist)


class AnchoredAdamW(torch.optim.AdamW):
    """AdamW, pulled towards the weights that the run started from: by the gradient of EWC's penalty,
    strength · F · (w - w₀), which is added to that of the loss, and by `rate`, a share of the way that each step ends
    with. With `squares` it adds up squared gradients and leaves the weights as they are."""
    anchors, fisher, rate, strength = {}, {}, 0.0, 0.0  # by flat tensors; set by Deterministic
    squares, square_weight = None, 1.0

    @torch.no_grad()
    def step(self, closure=None):
        mine = [flat for group in self.param_groups for flat in group["params"]
                if flat.grad is not None and flat in self.anchors]  # not those of padding alone
        if self.squares is not None:
            for flat in mine:
                self.squares[flat].addcmul_(flat.grad, flat.grad, value=self.square_weight)
            return
        for flat in mine if self.fisher else ():
            flat.grad.addcmul_(self.fisher[flat], flat - self.anchors[flat], value=self.strength)
        super().step()
        for flat in mine if self.rate else ():
            flat.lerp_(self.anchors[flat], self.rate)


class Deterministic:
    """AdamW with what its settings ask for: averaging with the weights before, during training or after it, and EWC
    (Kirkpatrick et al., arXiv 1612.00796) with one Fisher information for all tasks (Schwarz et al., arXiv 1805.06370).
    """

    def __init__(self, cfg, engine, parts, dist):
        self.s, self.engine, self.dist, self.anchors = cfg, engine, dist, {}
        optimizer, mine = base_optimizer(engine), fragments(engine)
        if cfg.l2_sp_rate or cfg.ewc_strength or cfg.wise_ft_alpha < 1:
            self.anchors = {flat: flat.detach().clone() for flat in flats(mine)}
        if isinstance(optimizer, AnchoredAdamW):
            optimizer.anchors, optimizer.rate, optimizer.strength = self.anchors, cfg.l2_sp_rate, cfg.ewc_strength
        if parts:
            optimizer.fisher = {flat: torch.zeros_like(flat) for flat in flats(mine)}
            dist.on_all_ranks(lambda: [parts.read("fisher", fragment.name, fragment.start,
                                             fragment.of(optimizer.fisher[fragment.flat])) for fragment in mine])

    def before_step(self, step):
        """Nothing: gradients are taken at the weights."""

    def after_step(self, done):
        """Nothing: the optimizer has done it all, or a step was passed over and changed nothing."""

    @torch.no_grad()
    def finish(self):
        """WiSE-FT: the mean of the trained weights and those before (Wortsman et al., arXiv 2109.01903, eq. 1)."""
        if self.s.wise_ft_alpha < 1:
            for flat, anchor in self.anchors.items():
                flat.lerp_(anchor, 1 - self.s.wise_ft_alpha)
            update_weights(self.engine)

    def write(self, directory, samples, train_step):
        """Measures the diagonal Fisher information on samples of the run and writes it, added to the earlier tasks'.

        It is the empirical information: the mean over samples of the squared gradient of a target's log-likelihood.
        train_step: a function of settings and a list of samples that takes a step.
        """
        if not self.s.ewc_strength:
            return
        optimizer, settings = base_optimizer(self.engine), dataclasses.replace(self.s, max_grad_norm=0.0)
        squares = optimizer.fisher or {flat: torch.zeros_like(flat) for flat in flats(fragments(self.engine))}
        with adding_squares(self.engine, optimizer, squares):
            hidden = None if self.dist.rank == 0 else True
            for sample in tqdm(samples, "Fisher information", leave=False, disable=hidden):
                tokens = count_tokens([sample])[1]  # over which the loss of a step is the mean
                optimizer.square_weight = tokens ** 2 / len(samples)
                loss, norm, _ = train_step(settings, [sample])
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self.dist.fail(UserError(f"the Fisher information cannot be measured: loss {loss}, gradient norm "
                                              f"{norm} of a training sample"))
        write(self.engine, self.dist, directory, FISHER,
              {"fisher": lambda fragment: fragment.of(squares[fragment.flat])})


@contextlib.contextmanager
def adding_squares(engine, optimizer, squares):
    """Steps of the engine add the squares of unclipped gradients to `squares` and change no weight."""
    outer = engine.optimizer
    clipping = getattr(outer, "clip_grad", None)  # ZeRO's optimizers clip, without ZeRO the loop does
    optimizer.squares, outer.clip_grad = squares, 0.0
    yield
    optimizer.squares, outer.clip_grad = None, clipping


class Probabilistic:
    """IVON: each step at a draw of the weights, and the posterior as the next task's prior, tempered by tau.

    Variational continual learning (Nguyen et al., arXiv 1710.10628) with a Gaussian for every weight: the prior is the
    posterior before with its precision times tau, or for the first task one precision around the pretrained weights.
    """

    def __init__(self, cfg, engine, parts, dist):
        self.s, self.engine, self.dist = cfg, engine, dist
        self.optimizer, mine = base_optimizer(engine), fragments(engine)
        prior = {flat: (flat.detach().clone(), cfg.prior_precision) for flat in flats(mine)}
        if parts:
            prior = {flat: (mean, torch.zeros_like(mean)) for flat, (mean, _) in prior.items()}
            dist.on_all_ranks(lambda: [parts.read(kind, fragment.name, fragment.start, fragment.of(into))
                                  for fragment in mine
                                  for kind, into in zip(("mean", "precision"), prior[fragment.flat])])
            with torch.no_grad():
                for flat, (mean, precision) in prior.items():
                    flat.copy_(mean)  # in full precision, as the checkpoint need not be
                    precision.mul_(cfg.tau)
            update_weights(engine)
        self.optimizer.begin(mine, prior)

    def before_step(self, step):
        """Draws the weights of a step."""
        with changing_weights(self.engine) as mine:
            self.optimizer.perturb(mine, (self.s.seed, step))

    def after_step(self, done):
        """Gives the model the means again where the optimizer has passed over the step."""
        if not done:
            with changing_weights(self.engine) as mine:
                self.optimizer.restore(mine)

    def finish(self):
        """Nothing: the weights are the means."""

    def write(self, directory, samples, train_step):
        """Writes the posterior: the means and precisions of all weights."""
        write(self.engine, self.dist, directory, POSTERIOR, {
            "mean": lambda fragment: fragment.of(fragment.flat),
            "precision": lambda fragment: self.optimizer.precision(
                fragment.flat, slice(fragment.offset, fragment.offset + fragment.count))})


def write(engine, dist, directory, name, kinds):
    """Writes what all processes have of some kinds beside a checkpoint; without ZeRO rank 0 has all of it."""
    dist.on_rank0(lambda: [old.unlink() for old in directory.glob(f"{name}-*-of-*.safetensors")])  # of a killed attempt
    shared = not engine.zero_optimization()
    if dist.rank == 0 or not shared:
        path = directory / parameter_file_name(name, dist.rank, 1 if shared else dist.world_size)
    dist.on_all_ranks(lambda: None if shared and dist.rank else write_parameter_file(path, fragments(engine), kinds))
