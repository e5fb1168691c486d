"""Variational fine-tuning: a Gaussian over every weight, by the improved variational online Newton method (IVON).

Shen et al., Variational Learning is Effective for Large Deep Networks, arXiv 2402.17641, algorithm 1. The posterior is
q(w) = N(m, 1 / s) for each weight by itself, with the precision s = λ (h + δ): h is the curvature of the loss, λ the
number of samples that the loss, a mean, stands for, and δ = p / λ what a prior N(m₀, 1 / p) adds. In each step the
gradient is taken at one draw of the weights, and moves both m and h.

The noise of a draw is a function of a key, such as (seed, step), and of the parameter's name alone: every process and
every micro-step see the same weights, however the parameters are cut into pieces.
"""
import torch

from model.posterior import standard_normal


class IVON(torch.optim.Optimizer):
    """IVON over the pieces of the parameters that this process keeps (partitions.Fragment).

    begin() has to be called with them once they are known. A step is perturb(key), which gives the model a draw of the
    weights, gradients at that draw, and step(), which may be called for one parameter group at a time. State by flat
    tensor: "momentum", "curvature" (h) and "step".

    lr: the most that a weight moves in a step, α · ξ of the paper, so that it compares with AdamW's; samples: λ;
    curvature: h at the start; betas: decay rates of momentum and curvature; clip_radius: ξ, the most that a weight's
    gradient over h + δ counts; noise: False takes the gradients at the mean, and leaves the curvature as it is.
    """

    def __init__(self, params, lr, samples, curvature, betas, clip_radius, noise=True):
        super().__init__(params, {"lr": lr})
        self.samples, self.start, self.betas = samples, curvature, betas
        self.clip_radius, self.noise = clip_radius, noise
        self.places, self.prior, self.means, self.key = {}, {}, {}, None

    @torch.no_grad()
    def begin(self, fragments, prior):
        """Takes up the pieces; the flat tensors hold the means.

        prior: flat -> (mean, precision), each as long as the flat tensor, or a number for all of its weights.
        """
        self.prior, self.places = prior, {}
        for fragment in fragments:
            self.places.setdefault(fragment.flat, []).append(fragment)
        for flat, pieces in self.places.items():
            self.state[flat] = {"momentum": torch.zeros_like(flat), "step": torch.tensor(0.0),
                                "curvature": torch.full_like(flat, self.start)}
            if pieces[0].shared:  # the model computes with the flat tensor itself: a draw overwrites the mean
                self.means[flat] = torch.empty_like(flat)

    def blocks(self, fragment):
        """(places in the flat tensor, noise) of the pieces that a fragment is worked on by."""
        moved = fragment.offset - fragment.start
        for low, high, noise in standard_normal(self.key, fragment.name, fragment.size, fragment.start, fragment.count,
                                                fragment.flat.device):
            yield slice(low + moved, high + moved), noise

    def mean(self, flat):
        """The means while there is a draw, flattened."""
        return self.means.get(flat, flat).detach().view(-1)

    def delta(self, flat, at):
        """δ = p / λ of the prior at some places."""
        precision = self.prior[flat][1]
        return (precision.view(-1)[at] if isinstance(precision, torch.Tensor) else precision) / self.samples

    def precision(self, flat, at):
        """The posterior's precision at some places: λ (h + δ)."""
        return (self.state[flat]["curvature"].view(-1)[at] + self.delta(flat, at)) * self.samples

    @torch.no_grad()
    def perturb(self, fragments, key):
        """Draws the weights that the model computes with, and remembers the key of their noise."""
        self.key = key
        for flat, mean in self.means.items():
            mean.copy_(flat)
        for fragment in fragments if self.noise else ():
            flat, weights, moved = fragment.flat, fragment.weights, fragment.offset
            for at, noise in self.blocks(fragment):
                drawn = torch.addcdiv(self.mean(flat)[at], noise, self.precision(flat, at).sqrt_())
                weights[at.start - moved:at.stop - moved].copy_(drawn)

    @torch.no_grad()
    def restore(self, fragments):
        """Gives the model the means again, in place of a draw that no step came of."""
        for fragment in fragments:
            fragment.weights.copy_(fragment.of(self.mean(fragment.flat)))

    @torch.no_grad()
    def step(self, closure=None):
        """Moves mean and curvature by the gradients at the last draw."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None or flat not in self.places:  # a piece of padding alone
                    continue
                if flat in self.means:
                    flat.copy_(self.means[flat])
                self.state[flat]["step"] += 1
                for fragment in self.places[flat]:
                    for at, noise in self.blocks(fragment):
                        self.update(flat, at, noise, group["lr"])

    def update(self, flat, at, noise, lr):
        """Lines 3 to 6 of the algorithm for some places of a flat tensor, with the prior's own mean in place of 0."""
        state, prior_mean = self.state[flat], self.prior[flat][0].view(-1)[at]
        mean, gradient = flat.view(-1)[at], flat.grad.view(-1)[at]
        momentum, curvature = state["momentum"].view(-1)[at], state["curvature"].view(-1)[at]
        delta, (beta1, beta2) = self.delta(flat, at), self.betas
        if self.noise:
            whole = curvature + delta  # h + δ
            # Price's theorem: the gradient times noise / variance estimates the Hessian's diagonal
            gap = (whole * self.samples).sqrt_().mul_(noise).mul_(gradient).sub_(curvature)
            curvature.add_(gap, alpha=1 - beta2)
            curvature.addcdiv_(gap.square_(), whole, value=(1 - beta2) ** 2 / 2)  # which keeps h + δ above 0
        momentum.lerp_(gradient, 1 - beta1)
        move = (mean - prior_mean).mul_(delta).add_(momentum, alpha=1 / (1 - beta1 ** float(state["step"])))
        mean.sub_(move.div_(curvature + delta).div_(self.clip_radius).clamp_(-1, 1), alpha=lr)
