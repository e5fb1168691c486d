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

from batches import count_tokens
from model.checkpoint import FISHER, POSTERIOR
from model.files import UserError
from model.transformer import parameter_shapes
from partitions import Parts, base_optimizer, changing_weights, fragments, part_files, part_name, write_parts
from runs import stage_of
from variational import IVON


def check_method(s, source, config):
    """Raises UserError where a method needs what is not beside the checkpoint that a run starts from."""
    if s.mode == "probabilistic":
        open_prior(s, source, config)
    if s.ewc_strength:
        open_fisher(source, config)


def open_prior(s, source, config):
    """The posterior beside a checkpoint that is to be the prior, as Parts; None for a prior around the weights."""
    parts = open_posterior(source, config) if s.prior != "weights" else None
    if parts is None and s.prior == "posterior":
        raise UserError(f"{source} has no posterior to be the prior: fine-tune it in probabilistic mode first, or give "
                        "--prior weights")
    return parts


def open_posterior(source, config):
    """The posterior beside a checkpoint, as Parts; None where there is none."""
    return open_parts(part_files(source, POSTERIOR), f"the posterior in {source}", ("mean", "precision"), config)


def open_fisher(source, config):
    """The Fisher information beside a checkpoint, as Parts; None where no task was learned before."""
    files = part_files(source, FISHER)
    if not files and (stage := stage_of(source)):
        raise UserError(f"{source} has no Fisher information of {stage['task']}, which it was trained on: train it "
                        "with --ewc_strength as well")
    return open_parts(files, f"the Fisher information in {source}", ("fisher",), config)


def open_parts(files, what, kinds, config):
    """Files of parts, compared with the shape of the model; None where there are none."""
    if not files:
        return None
    parts = Parts(files, what)
    parts.check(kinds, {name: math.prod(shape) for name, shape in parameter_shapes(config).items()})
    return parts


def make_optimizer(s, groups):
    """The optimizer of the run's mode: AdamW, with pulls where they are asked for, or IVON."""
    if s.mode == "probabilistic":
        return IVON(groups, s.learning_rate, s.effective_samples, s.curvature, (s.adam_beta1, s.curvature_beta),
                    s.clip_radius, s.weight_noise)
    kind = PulledAdamW if s.average_rate or s.ewc_strength else torch.optim.AdamW
    return kind(groups, s.learning_rate, (s.adam_beta1, s.adam_beta2), s.adam_epsilon, fused=True)


def make_method(s, engine, source, world):
    """The method of a run, for a fresh engine whose weights are those of the checkpoint `source`."""
    return (Probabilistic if s.mode == "probabilistic" else Deterministic)(s, engine, source, world)


class PulledAdamW(torch.optim.AdamW):
    """AdamW, pulled towards the weights that the run started from: by the gradient of EWC's penalty,
    strength · F · (w - w₀), which is added to that of the loss, and by `rate`, a share of the way that each step ends
    with. With `squares` it adds up squared gradients and leaves the weights as they are."""
    anchors, fisher, rate, strength = {}, {}, 0.0, 0.0  # by flat tensors; set by Deterministic
    squares, square_weight = None, 1.0

    @torch.no_grad()
    def step(self, closure=None):
        flats = [flat for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        if self.squares is not None:
            for flat in flats:
                self.squares[flat].addcmul_(flat.grad, flat.grad, value=self.square_weight)
            return
        for flat in flats if self.fisher else ():
            flat.grad.addcmul_(self.fisher[flat], flat - self.anchors[flat], value=self.strength)
        super().step()
        for flat in flats if self.rate else ():
            flat.lerp_(self.anchors[flat], self.rate)


class Deterministic:
    """AdamW with what its settings ask for: averaging with the weights before, during training or after it, and EWC
    (Kirkpatrick et al., arXiv 1612.00796) with one Fisher information for all tasks (Schwarz et al., arXiv 1805.06370).
    """

    def __init__(self, s, engine, source, world):
        self.s, self.engine, self.world, self.anchors = s, engine, world, {}
        optimizer, mine = base_optimizer(engine), fragments(engine)
        if s.average_rate or s.ewc_strength or s.average_after < 1:
            self.anchors = {fragment.flat: fragment.flat.detach().clone() for fragment in mine}
        if isinstance(optimizer, PulledAdamW):
            optimizer.anchors, optimizer.rate, optimizer.strength = self.anchors, s.average_rate, s.ewc_strength
        parts = world.on_all(lambda: open_fisher(source, engine.module.config)) if s.ewc_strength else None
        if parts:
            optimizer.fisher = {fragment.flat: torch.zeros_like(fragment.flat) for fragment in mine}
            world.on_all(lambda: [parts.read("fisher", fragment.name, fragment.start,
                                             fragment.of(optimizer.fisher[fragment.flat])) for fragment in mine])

    def before_step(self, step):
        """Nothing: gradients are taken at the weights."""

    def after_step(self, done):
        """Nothing: the optimizer has done it all, or a step was passed over and changed nothing."""

    @torch.no_grad()
    def finish(self):
        """WiSE-FT: the mean of the trained weights and those before (Wortsman et al., arXiv 2109.01903, eq. 1)."""
        if self.s.average_after < 1:
            for flat, anchor in self.anchors.items():
                flat.lerp_(anchor, 1 - self.s.average_after)
            with changing_weights(self.engine) as mine:
                for fragment in mine:
                    fragment.weights.copy_(fragment.of(fragment.flat))

    def write(self, directory, samples, take_step):
        """Measures the diagonal Fisher information on samples of the run and writes it, added to the earlier tasks'.

        It is the empirical information: the mean over samples of the squared gradient of a target's log-likelihood.
        take_step: a function of settings and a list of samples that takes a step.
        """
        if not self.s.ewc_strength:
            return
        optimizer, settings = base_optimizer(self.engine), dataclasses.replace(self.s, max_grad_norm=0.0)
        squares = optimizer.fisher or {fragment.flat: torch.zeros_like(fragment.flat)
                                       for fragment in fragments(self.engine)}
        with adding_squares(self.engine, optimizer, squares):
            hidden = None if self.world.rank == 0 else True
            for sample in tqdm(samples, "Fisher information", leave=False, disable=hidden):
                tokens = count_tokens([sample])[1]  # over which the loss of a step is the mean
                optimizer.square_weight = tokens ** 2 / len(samples)
                loss, norm, _ = take_step(settings, [sample])
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self.world.fail(UserError(f"the Fisher information cannot be measured: loss {loss}, gradient norm "
                                              f"{norm} of a training sample"))
        write(self.engine, self.world, directory, FISHER,
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

    def __init__(self, s, engine, source, world):
        self.s, self.engine, self.world = s, engine, world
        self.optimizer, mine = base_optimizer(engine), fragments(engine)
        prior = {fragment.flat: (fragment.flat.detach().clone(), s.prior_precision) for fragment in mine}
        if parts := world.on_all(lambda: open_prior(s, source, engine.module.config)):
            prior = {flat: (mean, torch.zeros_like(mean)) for flat, (mean, _) in prior.items()}
            world.on_all(lambda: [parts.read(kind, fragment.name, fragment.start, fragment.of(into))
                                  for fragment in mine
                                  for kind, into in zip(("mean", "precision"), prior[fragment.flat])])
            with torch.no_grad():
                for flat, (mean, precision) in prior.items():
                    flat.copy_(mean)  # in full precision, as the checkpoint need not be
                    precision.mul_(s.tau)
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

    def write(self, directory, samples, take_step):
        """Writes the posterior: the means and precisions of all weights."""
        write(self.engine, self.world, directory, POSTERIOR, {
            "mean": lambda fragment: fragment.of(fragment.flat),
            "precision": lambda fragment: self.optimizer.precision(
                fragment.flat, slice(fragment.offset, fragment.offset + fragment.count))})


def write(engine, world, directory, name, kinds):
    """Writes what all processes have of some kinds beside a checkpoint; without ZeRO rank 0 has all of it."""
    shared = not engine.zero_optimization()
    if world.rank == 0 or not shared:
        path = directory / part_name(name, world.rank, 1 if shared else world.size)
    world.on_all(lambda: None if shared and world.rank else write_parts(path, fragments(engine), kinds))
