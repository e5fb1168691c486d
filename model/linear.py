"""Linear layers, and their weights in the memory layout of oneDNN's kernels for decoding on CPUs.

A matrix product usually copies the weights to the layout of its kernel. With the few rows of a decoding step this takes
longer than the arithmetic.
"""
import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.oom import available_memory, is_out_of_memory


class Linear(nn.Linear):
    """x · weightᵀ + bias, computed with the packed copy of the weight while there is one."""
    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Lets the linear layers of a model on a CPU compute with packed copies of their weights, without gradients.

    In bf16 the results are the same to the bit. The copies take as much memory as the weights, and are not made if less
    than twice as much is left, since batches need memory, too. Weights that oneDNN has no kernels for, and those that
    ZeRO-3 has divided among processes, are not packed.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and can_pack(module.weight)]
    try:
        pack(layers)
        yield
    finally:
        unpack(layers)


def pack(layers: Sequence[Linear]) -> None:
    """Makes the packed copies, or none if there is not enough memory for all."""
    if 2 * sum(layer.weight.nbytes for layer in layers) > available_memory():
        return
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        unpack(layers)


def unpack(layers: Sequence[Linear]) -> None:
    """Deletes the packed copies."""
    for layer in layers:
        vars(layer).pop("packed", None)  # setting it to None would make compiled blocks compile again


def can_pack(weight: Tensor) -> bool:
    """Returns whether a weight is a matrix that oneDNN can multiply with on this CPU."""
    if weight.device.type != "cpu" or weight.dim() != 2 or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16
                                             and torch.ops.mkldnn._is_mkldnn_bf16_supported())
