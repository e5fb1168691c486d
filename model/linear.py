"""Linear layers, and the kernels that compute them on CPUs.

PyTorch's packages for x86 multiply fp32 matrices by MKL, which uses AVX-512 on Intel's CPUs only. On others, oneDNN's
kernels are twice as fast (PyTorch 2.13 uses them for bf16 alone).

A matrix product usually copies the weights to the layout of its kernel. With the few rows of a decoding step this takes
longer than the arithmetic, so that decoding uses weights in the layout of oneDNN's kernels.
"""
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.oom import available_memory, is_out_of_memory

CPU = torch.cpu.get_capabilities()
FP32_BY_ONEDNN = torch.backends.mkldnn.is_available() and CPU.get("avx512_f", False) and \
    "Intel" not in CPU.get("cpu_name", "")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x · weightᵀ + bias by oneDNN, without gradients. The weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """x · weightᵀ + bias by oneDNN, with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (None if weight is None else onednn_linear(gradient, weight.T),
                None if x is None else onednn_linear(rows.T, x.reshape(-1, x.shape[-1]).T),
                rows.sum(0) if ctx.needs_input_grad[2] else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x · weightᵀ + bias by the faster library.

    oneDNN has no kernel for the gradients of no rows, and PyTorch's compiler calls oneDNN for constant weights only.
    """
    if FP32_BY_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and \
            not torch.compiler.is_compiling():
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """x · weightᵀ + bias, computed with the packed copy of the weight while there is one."""
    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return onednn_linear(x, self.packed, self.bias)
        return linear(x, self.weight, self.bias)


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
