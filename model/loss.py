"""The output head and the loss on it."""
import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100  # no target here: cross_entropy's own default

# N·V of one slice of the loss. 32 MiB in fp32 is the largest block that glibc uses again; GPUs are faster on more rows.
LOGITS_PER_CHUNK = {"cpu": 1 << 23, "cuda": 1 << 25}


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Negative log-likelihood of targets [N] given hidden states [N, C] and the head's weight [V, C], summed, in fp32.

    It runs in slices, so that the logits of a long batch never exist at once. What the gradients need of a slice is at
    hand as soon as its loss is, so they are computed with it, and the backward pass has only to scale them (as in Liger
    Kernel: Hsu et al., arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradients):
        rows = max(1, LOGITS_PER_CHUNK[hidden.device.type] // len(weight))
        nll, gradients, of_weight = 0.0, [], None
        for states, wanted in zip(hidden.split(rows), targets[:, None].split(rows)):
            log_p = F.linear(states, weight).float().log_softmax(-1)  # n V
            nll -= log_p.gather(1, wanted).sum()
            if with_gradients:
                error = log_p.exp_().scatter_add_(1, wanted, torch.full_like(log_p[:, :1], -1.0)).to(states.dtype)
                gradients.append(error @ weight)
                of_weight = error.T @ states if of_weight is None else of_weight.addmm_(error.T, states)
        if with_gradients:
            ctx.gradients = torch.cat(gradients), of_weight
        return nll

    @staticmethod
    def backward(ctx, gradient):
        of_hidden, of_weight = ctx.gradients
        return of_hidden.mul_(gradient), of_weight.mul_(gradient), None, None


class Head(nn.Linear):
    """The output head: logits of hidden states, or the loss on targets [N], in one call of the module.

    It is one call however many slices of the loss there are, since ZeRO-3 gathers the weight once a call and every
    process has to make the same calls.
    """

    def forward(self, hidden, targets=None):
        if targets is None:
            return super().forward(hidden)
        return FusedLinearCrossEntropy.apply(hidden, self.weight, targets, torch.is_grad_enabled())
