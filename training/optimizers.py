"""The optimizers of train.py by name. AdamW is PyTorch's; AnchoredAdamW adds EWC and L2-SP; IVON is in ivon.py."""
from collections.abc import Iterator
from typing import Any

import torch

from training.ivon import IVON
from training.train_config import TrainConfig

BLOCK = 1 << 24  # elements


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW without the decorators that exclude its methods from compilation: their first call imports the
    compiler, which takes more than a second."""
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)  # type: ignore[attr-defined]


class AnchoredAdamW(AdamW):
    """AdamW that is pulled towards anchors, the weights that the run started from.

    EWC adds the gradient of its penalty, strength · F · (w − w₀), to that of the loss, and L2-SP strength · (w − w₀).
    Decoupled L2-SP then moves the weights towards the anchors, w ← w + rate · lr · (w₀ − w). `Anchored` divides the
    rate by the peak of the schedule, so that the share follows the schedule alone (as weight decay in Loshchilov and
    Hutter, arXiv 1711.05101, and other than in PyTorch's AdamW). With `squares` a step accumulates squared gradients
    and leaves the weights unchanged; this measures Fisher information. All mappings are by flat tensor
    (training/zero_shards.py) and are set by the method (training/methods.py).
    """
    anchors: dict[torch.Tensor, torch.Tensor] = {}
    fisher: dict[torch.Tensor, torch.Tensor] = {}
    rate, ewc_strength, l2_strength = 0.0, 0.0, 0.0
    squares: dict[torch.Tensor, torch.Tensor] | None = None
    square_weight = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes one step."""
        flats = [flat for group in self.param_groups for flat in group["params"]
                 if flat.grad is not None and flat in self.anchors]  # not the padding of ZeRO's last slices
        if self.squares is not None:
            for flat in flats:
                self.squares[flat].addcmul_(flat.grad, flat.grad, value=self.square_weight)
            return
        for flat in flats if self.fisher else ():
            for grad, weight, anchor, fisher in in_blocks(flat.grad, flat, self.anchors[flat], self.fisher[flat]):
                grad.addcmul_(fisher, weight - anchor, value=self.ewc_strength)
        for flat in flats if self.l2_strength else ():
            for grad, weight, anchor in in_blocks(flat.grad, flat, self.anchors[flat]):
                grad.add_(weight - anchor, alpha=self.l2_strength)
        super().step()
        for flat in flats if self.rate else ():
            flat.lerp_(self.anchors[flat], self.rate * self.param_groups[0]["lr"])  # the same in all groups


def in_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of several tensors in blocks of the same BLOCK elements, so that temporary tensors stay small."""
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors))


def make_optimizer(cfg: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for two parameter groups: with and without weight decay."""
    if cfg.optimizer == "ivon":
        return IVON(groups, cfg.learning_rate, cfg.ess, cfg.hess_init, (cfg.adam_beta1, cfg.ivon_beta2),
                    cfg.clip_radius, cfg.sample_params)
    kind = AnchoredAdamW if cfg.anchored else AdamW
    return kind(groups, cfg.learning_rate, (cfg.adam_beta1, cfg.adam_beta2), cfg.adam_epsilon, fused=True)
