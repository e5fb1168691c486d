"""Logits of hidden states."""
import math

import torch
from torch import Tensor

from common.files import UserError
from model.transformer import Transformer


def finite_logits(model: Transformer, hidden: Tensor, name: str = "the model") -> Tensor:
    """Returns the logits [..., V] of hidden states [..., C] in fp32. Raises UserError, with the name of the model, if
    some are not finite."""
    logits = model.lm_head(hidden).float()
    lowest, highest = torch.stack(torch.aminmax(logits)).tolist()  # both are NaN if one logit is
    if not math.isfinite(highest - lowest):
        raise UserError(f"{name}'s logits are not finite (from {lowest} to {highest}): {why_not_finite(model)}")
    return logits


def why_not_finite(model: Transformer) -> str:
    """Returns what may have caused a value that is not finite, and what to do, as words after a colon."""
    dtype = model.lm_head.weight.dtype
    return "the weights are damaged" + (": copy the checkpoint or train it again" if dtype == torch.float32 else
                                        f", or too large for {dtype}: try --dtype fp32")
