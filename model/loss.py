"""The output head and its loss.

Dimensions:  N tokens with a target, n tokens of a chunk, C hidden size, V vocabulary.

The loss is the negative log-likelihood of targets, or the divergence from the predictions of another model, a teacher.
"""
from typing import Any

import torch
import torch.nn.functional as F

from model.linear import Linear, linear

IGNORE_INDEX = -100  # marks a position without a target, as in F.cross_entropy


def chunk_rows(vocab_size: int, device: str) -> int:
    """Returns n, the rows of hidden states whose logits exist at once on a device of this type.

    On CPUs the logits should stay in the caches and the head should be read few times; GPUs are faster with more rows.
    """
    return 256 if device == "cpu" else max(1, (1 << 25) // vocab_size)


class FusedLinearLoss(torch.autograd.Function):
    """Summed negative log-likelihood, in fp32, of targets [N] given hidden states [N, C] and a head weight [V, C].

    With the head weight of a teacher, `targets` are its hidden states [N, C], and the result is the summed divergence
    KL(teacher || model) of the next token.

    The loss is computed in chunks, so the logits of a long batch never exist at once. The forward pass also computes
    the gradients of each chunk, and the backward pass only scales them (as in Liger Kernel: Hsu et al.,
    arXiv 2410.10989, section 3.2). The weight's gradient is summed over the chunks in fp32: in bf16 its error grows
    with their number, to 1.7% of its norm with 128 chunks instead of the 0.15% of one chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                teacher_weight: torch.Tensor | None, needs_grad: bool) -> torch.Tensor:
        needs_weight_grad = needs_grad and weight.requires_grad
        rows = chunk_rows(len(weight), hidden.device.type)
        loss, hidden_grads = torch.zeros((), device=hidden.device), []
        weight_grad: torch.Tensor | None = None
        for states, target in zip(hidden.split(rows), targets.split(rows)):  # target: n, with a teacher n C
            log_q = linear(states, weight).float().log_softmax(-1)  # n V
            if teacher_weight is None:
                loss -= log_q.gather(1, target[:, None]).sum()
            else:
                log_p = linear(target, teacher_weight).float().log_softmax(-1)  # n V
                loss += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            if not needs_grad:
                continue
            grad = log_q.exp_()  # of the logits: q - p, where p is 1 at the target, or the teacher's
            grad = grad.scatter_add_(1, target[:, None], torch.full_like(grad[:, :1], -1.0)) \
                if teacher_weight is None else grad.sub_(log_p.exp_())
            grad = grad.to(states.dtype)
            hidden_grads.append(linear(grad, weight.T))
            if not needs_weight_grad:
                continue
            if weight_grad is None:
                weight_grad = (grad.T @ states).to(weight.dtype if len(hidden) <= rows else torch.float32)
            elif weight_grad.dtype == weight.dtype:
                weight_grad.addmm_(grad.T, states)
            else:
                weight_grad += grad.T @ states
        if needs_grad:
            ctx.gradients = torch.cat(hidden_grads), None if weight_grad is None else weight_grad.to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: what depends on these gradients would be silently left out
            raise RuntimeError("the loss has no second derivatives: leave out create_graph")
        hidden_grad, weight_grad = ctx.gradients
        ctx.gradients = None  # they are changed in place, so that a second call has to fail
        scale = gradient.view(1)  # GPUs would round a scalar tensor to bf16 before the product
        return hidden_grad.mul_(scale), None if weight_grad is None else weight_grad.mul_(scale), None, None, None


class Head(Linear):
    """The output head. Returns logits of hidden states, or the summed loss if targets [N] are given. With the weight
    [V, C] of a teacher's head, the targets are the teacher's hidden states [N, C].

    The loss is one call of the module, however many chunks it has: ZeRO-3 gathers the weight once per call, and all
    processes must make the same calls.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None,
                teacher_weight: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return super().forward(hidden)
        return FusedLinearLoss.apply(hidden, self.weight, targets, teacher_weight, torch.is_grad_enabled())
