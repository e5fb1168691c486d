"""Low-rank adapters: W x + alpha / r · B A x, with W frozen (LoRA: Hu et al., arXiv 2106.09685, section 4.1;
B starts at 0 and A uniform, as in PEFT, where the paper has a Gaussian).

An adapted model is written twice: merged, as a checkpoint that any tool loads, and as an adapter in the format of PEFT.

Dimensions:  r rank, I inputs and O outputs of a linear layer.
"""
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import UserError
from common.writing import write_json
from model.checkpoint import NamedTensors, write_safetensors
from model.config import ModelConfig
from model.linear import Linear, linear
from model.noise import named_generator
from model.transformer import Transformer, parameter_shapes

ADAPTER = "adapter"  # the folder of an adapter, next to the merged weights
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
TARGETS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"  # what may be adapted
A, B = "lora_A", "lora_B"


@dataclass(frozen=True)
class LoRA:
    """The adapters of a model: rank; alpha, as the update is scaled by alpha / rank; targets, the linear layers that
    have an adapter."""
    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS


class AdaptedLinear(Linear):
    """A linear layer with a low-rank update: lora_A [r, I] and lora_B [O, r]."""

    def __init__(self, base: nn.Linear, lora: LoRA):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.lora_A = nn.Parameter(torch.empty(lora.rank, base.in_features))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, lora.rank))
        self.scale = lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * linear(linear(x, self.lora_A), self.lora_B)

    def merged(self) -> Tensor:
        """Returns the weight [O, I] with the update added to it, in its dtype; the sum is computed in fp32."""
        return (self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the weight, for good. The matrices stay, but have no effect any more."""
        self.weight.copy_(self.merged())
        self.scale = 0.0


def is_adapter(name: str) -> bool:
    """Returns whether a parameter is a matrix of an adapter."""
    return name.rpartition(".")[2] in (A, B)


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the adapters' matrices, in model order. Raises UserError if the rank is too large."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module.rpartition(".")[2] not in lora.targets:
            continue
        outputs, inputs = shape
        if lora.rank > min(shape):
            raise UserError(f"lora_rank is {lora.rank}, more than the {min(shape)} of {name} {list(shape)}: lower it")
        found |= {f"{module}.{A}": (lora.rank, inputs), f"{module}.{B}": (outputs, lora.rank)}
    return found


def insert_adapters(model: Transformer, lora: LoRA) -> None:
    """Replaces the target layers of a model on the meta device by adapted ones."""
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if leaf in lora.targets and isinstance(module, nn.Linear):
            with torch.device("meta"):
                setattr(model.get_submodule(owner), leaf, AdaptedLinear(module, lora))


def adapted_tensors(model: Transformer, weights: NamedTensors, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of a model with adapters, in model order, from the weights of the model without.

    A is uniform in ±1/√I, as in PEFT, and a function of (seed, name). B is 0, so that the function is preserved.
    """
    weights = iter(weights)
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            yield next(weights)
        elif name.endswith(B):
            yield name, torch.zeros(parameter.shape)
        else:
            bound = 1 / math.sqrt(parameter.shape[1])
            yield name, torch.empty(parameter.shape).uniform_(-bound, bound, generator=named_generator(seed, name))


def write_adapter(directory: Path, lora: LoRA, base: str, tensors: NamedTensors, shapes: Mapping[str, tuple[int, ...]],
                  dtype: torch.dtype) -> None:
    """Writes an adapter into an existing directory in the format of PEFT. base: the checkpoint that it adapts."""
    write_json(directory / ADAPTER_CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "target_modules": list(lora.targets), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True})
    write_safetensors(directory / ADAPTER_WEIGHTS, {peft_name(name): (dtype, shape) for name, shape in shapes.items()},
                      ((peft_name(name), tensor) for name, tensor in tensors))


def peft_name(name: str) -> str:
    """Returns PEFT's name of an adapter's matrix."""
    return f"base_model.model.{name}.weight"
