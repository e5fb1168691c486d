"""Logits of hidden states."""
import math

import torch
from torch import Tensor

from common.files import UserError
from model.transformer import Transformer


def finite_logits(model: Transformer, hidden: Tensor) -> Tensor:
    """Returns the logits [..., V] of hidden states [..., C] in fp32. Raises UserError if some are not finite."""
    logits = model.lm_head(hidden).float()
    lowest, highest = torch.stack(torch.aminmax(logits)).tolist()  # both are NaN if one logit is
    if not math.isfinite(highest - lowest):
        is_fp32 = model.lm_head.weight.dtype == torch.float32
        raise UserError(f"the model's logits are not finite (from {lowest} to {highest}): the weights are damaged"
                        + ("" if is_fp32 else f", or too large for {model.lm_head.weight.dtype}: try fp32"))
    return logits
