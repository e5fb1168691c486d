"""Variational fine-tuning: a Gaussian over every weight, by the improved variational online Newton method (IVON).

Shen et al., Variational Learning is Effective for Large Deep Networks, arXiv 2402.17641, algorithm 1. The posterior is
q(w) = N(m, 1 / s), independently for each weight, with precision s = λ (h + δ): h is the Hessian estimate, λ the
effective sample size (ess) of the mean loss, and δ = p / λ the contribution of a prior N(m₀, 1 / p). Each step takes
the gradient at one sample of the weights and updates both m and h.

The training loop clips the gradients by their norm before a step, as for AdamW; the paper's algorithm does not.
Gradients that are divided by 3 give a third of the Hessian estimate. With `max_grad_norm = 0` they are not clipped.

The noise of a sample is a function of a key, such as (seed, step), and of the parameter's name (model/noise.py):
all ranks and micro-steps use the same weights, no matter how the parameters are sharded.
"""
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from model.noise import standard_normal
from training.zero_shards import Fragment

Prior = Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor | float]]


class IVON(torch.optim.Optimizer):
    """IVON over the fragments of the parameters that this rank stores.

    Call `begin` once with the fragments. A step is `perturb`, which gives the model sampled weights, then the gradients
    at them, then `step`, which may be called for one parameter group at a time. State by flat tensor: "momentum",
    "hess" (h) and "step".

    Args:
        params: parameter groups.
        lr: the most that a weight moves in a step (α · ξ in the paper), which makes it comparable to AdamW's.
        ess: effective sample size λ.
        hess_init: initial value of h.
        betas: decay rates of momentum and Hessian estimate.
        clip_radius: ξ, bound on the absolute value of a gradient divided by h + δ.
        sample_params: False takes the gradients at the mean and leaves h unchanged.
    """

    # without importing PyTorch's compiler, as AdamW in optimizers.py
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]

    def __init__(self, params: Any, lr: float, ess: float, hess_init: float, betas: tuple[float, float],
                 clip_radius: float, sample_params: bool = True):
        super().__init__(params, {"lr": lr})
        self.ess, self.hess_init, self.betas = ess, hess_init, betas
        self.clip_radius, self.sample_params = clip_radius, sample_params
        self.fragments: dict[torch.Tensor, list[Fragment]] = {}
        self.prior: Prior = {}
        self.means: dict[torch.Tensor, torch.Tensor] = {}
        self.key: Any = None
        self.device: torch.device | str = "cpu"

    @torch.no_grad()
    def begin(self, fragments: Iterable[Fragment], prior: Prior, device: torch.device | str) -> None:
        """Sets the fragments and the prior; the flat tensors hold the means.

        prior: flat tensor -> (mean, precision), each of the flat tensor's length; the precision may be one number.
        device: on which the noise is drawn: the model's, also if the flat tensors are offloaded, since CPUs draw other
        numbers, and slowly.
        """
        self.prior, self.fragments, self.device = prior, {}, device
        for fragment in fragments:
            self.fragments.setdefault(fragment.flat, []).append(fragment)
        for flat, pieces in self.fragments.items():
            self.state[flat] = {"momentum": torch.zeros_like(flat), "step": torch.tensor(0.0),
                                "hess": torch.full_like(flat, self.hess_init)}
            if pieces[0].shared:  # the model computes with the flat tensor itself: sampling overwrites the mean
                self.means[flat] = torch.empty_like(flat)

    def blocks(self, fragment: Fragment) -> Iterator[tuple[slice, torch.Tensor]]:
        """(slice of the flat tensor, noise) of the blocks of a fragment."""
        shift = fragment.offset - fragment.start
        for low, high, noise in standard_normal(self.key, fragment.name, fragment.size, fragment.start, fragment.count,
                                                self.device):
            yield slice(low + shift, high + shift), noise.to(fragment.flat.device)

    def mean(self, flat: torch.Tensor) -> torch.Tensor:
        """The means while the model has sampled weights, flattened."""
        return self.means.get(flat, flat).detach().view(-1)

    def delta(self, flat: torch.Tensor, at: slice) -> torch.Tensor | float:
        """δ = p / λ of the prior for a slice of a flat tensor."""
        precision = self.prior[flat][1]
        return (precision.view(-1)[at] if isinstance(precision, torch.Tensor) else precision) / self.ess

    def precision(self, flat: torch.Tensor, at: slice) -> torch.Tensor:
        """Precision of the posterior, λ (h + δ), for a slice of a flat tensor."""
        return (self.state[flat]["hess"].view(-1)[at] + self.delta(flat, at)) * self.ess

    @torch.no_grad()
    def perturb(self, fragments: Iterable[Fragment], key: Any) -> None:
        """Samples the weights that the model computes with, and stores the key of the noise."""
        self.key = key
        for flat, mean in self.means.items():
            mean.copy_(flat)
        for fragment in fragments if self.sample_params else ():
            flat, weights, shift = fragment.flat, fragment.weights, fragment.offset
            for at, noise in self.blocks(fragment):
                sample = torch.addcdiv(self.mean(flat)[at], noise, self.precision(flat, at).sqrt_())
                weights[at.start - shift:at.stop - shift].copy_(sample)

    @torch.no_grad()
    def restore(self, fragments: Iterable[Fragment]) -> None:
        """Gives the model the means again, after a sample whose step was skipped."""
        for fragment in fragments:
            fragment.weights.copy_(fragment.of(self.mean(fragment.flat)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates means and Hessian estimates by the gradients at the last sample."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None or flat not in self.fragments:  # padding
                    continue
                if flat in self.means:
                    flat.copy_(self.means[flat])
                self.state[flat]["step"] += 1
                for fragment in self.fragments[flat]:
                    whole = slice(fragment.offset, fragment.offset + fragment.count)
                    for at, noise in self.blocks(fragment) if self.sample_params else [(whole, None)]:
                        self.update(flat, at, noise, group["lr"])

    def update(self, flat: torch.Tensor, at: slice, noise: torch.Tensor | None, lr: float) -> None:
        """Updates Hessian, momentum and mean of a slice of a flat tensor, with the prior's mean instead of 0 and the
        move clipped. noise: of the sample; None: the gradients are at the mean."""
        state, prior_mean = self.state[flat], self.prior[flat][0].view(-1)[at]
        assert flat.grad is not None
        mean, gradient = flat.view(-1)[at], flat.grad.view(-1)[at]
        momentum, hess = state["momentum"].view(-1)[at], state["hess"].view(-1)[at]
        delta, (beta1, beta2) = self.delta(flat, at), self.betas
        if noise is not None:
            total = hess + delta  # h + δ
            # Price's theorem: gradient · (sample − mean) / σ² = gradient · noise / σ estimates the Hessian's diagonal
            gap = (total * self.ess).sqrt_().mul_(noise).mul_(gradient).sub_(hess)
            hess.add_(gap, alpha=1 - beta2)
            hess.addcdiv_(gap.square_(), total, value=(1 - beta2) ** 2 / 2)  # keeps h + δ positive
        momentum.lerp_(gradient, 1 - beta1)
        move = (mean - prior_mean).mul_(delta).add_(momentum, alpha=1 / (1 - beta1 ** float(state["step"])))
        mean.sub_(move.div_(hess + delta).div_(self.clip_radius).clamp_(-1, 1), alpha=lr)
