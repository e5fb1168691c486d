"""Growth in depth: operators, layer maps, and the weights of the grown model.

A layer map lists, for each layer of the grown model, the layer of the base that it copies. An operator is a pure
function operator(depth, target) that returns the layer map from `depth` to `target` layers, and raises UserError if it
cannot make that many. To add one, write the function and list it in OPERATORS.
"""
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from common.files import UserError
from model.checkpoint import CheckpointReader, materialize_model
from model.config import ModelConfig
from model.transformer import Transformer, parameter_shapes


def stack(depth: int, target: int) -> list[int]:
    """G_stack: repeats all layers in order, a whole number of times. 0 1 2 -> 0 1 2 0 1 2."""
    if target % depth:
        raise UserError(f"stack repeats {depth} layers a whole number of times and cannot make {target}: "
                        f"choose a multiple of {depth}, or the operator interleave")
    return list(range(depth)) * (target // depth)


def interleave(depth: int, target: int) -> list[int]:
    """Repeats each layer in place, as evenly as the target allows (G_direct of the depthwise operators in Du et al.;
    Chang et al., arXiv 1710.10348). 0 1 2 -> 0 0 1 1 2 2."""
    return [index * depth // target for index in range(target)]


def partial(depth: int, target: int, first: int, last: int) -> list[int]:
    """Repeats the block of layers from `first` to `last`, both included, and keeps the layers before and after it
    (Du et al., appendix on partial stacking). Block 1 to 2: 0 1 2 3 -> 0 1 2 1 2 3."""
    block = list(range(first, last + 1))
    if not 0 <= first <= last < depth:
        raise UserError(f"block {first},{last} is not a block of the base's layers 0 to {depth - 1}")
    if (target - depth) % len(block):
        raise UserError(f"repeating layers {first} to {last} adds {len(block)} layers at a time to {depth} and cannot "
                        f"make {target}: choose {depth} plus a multiple of {len(block)}, or another --block")
    times = 1 + (target - depth) // len(block)
    return [*range(first), *block * times, *range(last + 1, depth)]


def middle(depth: int, target: int) -> list[int]:
    """Repeats the middle third, and keeps one copy of the layers near the embedding and the head.
    0 1 2 3 4 5 -> 0 1 2 3 2 3 4 5."""
    return partial(depth, target, depth // 3, depth - 1 - depth // 3)


def solar(depth: int, target: int) -> list[int]:
    """Joins two overlapping copies, the first without its last layers and the second without its first layers (Kim et
    al., SOLAR 10.7B, arXiv 2312.15166, where 32 layers make 48). 0 1 2 3 -> 0 1 2 1 2 3."""
    half = target // 2
    if target % 2 or half > depth:
        raise UserError(f"solar joins two copies of at most {depth} layers and cannot make {target}: "
                        f"choose an even number from {depth + 1} to {2 * depth}")
    return [*range(half), *range(depth - half, depth)]


OPERATORS: dict[str, Callable[..., list[int]]] = {
    operator.__name__: operator for operator in (stack, interleave, middle, partial, solar)}

# The operators that also need a block of layers, `first` and `last`.
BLOCK_OPERATORS = [name for name, operator in OPERATORS.items() if "first" in inspect.signature(operator).parameters]


def check_layer_map(layer_map: Sequence[int], depth: int, zero_init: bool = False) -> None:
    """Raises UserError if a map names layers that a base of `depth` layers lacks, or if zero initialization would not
    preserve the function."""
    if outside := [layer for layer in layer_map if not 0 <= layer < depth]:
        raise UserError(f"layers names {', '.join(map(str, outside))}, but the base has the layers 0 to {depth - 1}")
    first = list(dict.fromkeys(layer_map))
    if zero_init and first != list(range(depth)):
        raise UserError("zero_init preserves the function only if the map contains every layer of the base, in order "
                        f"of first use; this map uses {first} of {list(range(depth))}")


def base_names(config: ModelConfig, layer_map: Sequence[int]) -> dict[str, str]:
    """Returns the parameters of the grown model in model order -> the parameters of the base that they copy."""
    return {name: re.sub(r"layers\.(\d+)", lambda match: f"layers.{layer_map[int(match[1])]}", name)
            for name in parameter_shapes(config)}


def grown_tensors(weights: CheckpointReader | Mapping[str, torch.Tensor], config: ModelConfig,
                  layer_map: Sequence[int], zero_init: bool = False, noise: float = 0.0,
                  seed: int = 42) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of the grown model in model order, from the base's weights and the grown configuration.

    Layer i is a bitwise copy of layer `layer_map[i]`. Two options change the new layers only, the second and later
    copies of a layer. `zero_init` sets the projections that write into the residual stream to 0: a new layer then adds
    nothing, and the grown model computes the function of the base (as in Gong et al., arXiv 1904.01038, and bert2BERT,
    arXiv 2110.07143, for other operators). `noise` adds Gaussian noise to each matrix, with `noise` times its standard
    deviation; it is a function of (seed, name).
    """
    first = {source: index for index, source in reversed(list(enumerate(layer_map)))}
    new = set(range(len(layer_map))) - set(first.values())
    for name, source in base_names(config, layer_map).items():
        tensor, match = weights[source], re.search(r"layers\.(\d+)", name)
        is_new = match is not None and int(match[1]) in new
        if is_new and noise and tensor.ndim == 2:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            sigma = noise * float(tensor.float().std())
            noisy = tensor.float() + sigma * torch.randn(tensor.shape, generator=generator).to(tensor.device)
            tensor = noisy.to(tensor.dtype)
        if is_new and zero_init and ("o_proj" in name or "down_proj" in name):
            tensor = torch.zeros_like(tensor)
        yield name, tensor


def grow_model(model: Transformer, layer_map: Sequence[int], **options: Any) -> Transformer:
    """Returns a grown copy of a model in memory, as stack.py does on disk. For `options` see `grown_tensors`."""
    check_layer_map(layer_map, model.config.num_hidden_layers, options.get("zero_init", False))
    config = replace(model.config, num_hidden_layers=len(layer_map))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = grown_tensors(weights, config, layer_map, **options)
    return materialize_model(config, ((name, tensor.clone()) for name, tensor in tensors))
