"""Growth in depth: operators, layer maps, and the weights of the grown model.

A layer map lists, for each layer of the grown model, the layer of the base that it copies. An operator is a pure
function operator(depth, target) that returns the layer map from `depth` layers to a larger number `target`, and raises
UserError if it cannot make that number. To add one, write the function and list it in OPERATORS.
"""
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import UserError
from model.checkpoint import CheckpointReader, materialize_model
from model.config import ModelConfig
from model.noise import named_generator
from model.parameter_files import (
    MOMENTS,
    SIDE_FILES,
    ParameterFiles,
    open_side_files,
    parameter_file_name,
    write_parameter_file,
)
from model.transformer import Transformer, parameter_shapes


def stack(depth: int, target: int) -> list[int]:
    """G_stack: repeats all layers in order, a whole number of times. 0 1 2 -> 0 1 2 0 1 2."""
    if target % depth:
        raise UserError(f"stack repeats {depth} layers a whole number of times and cannot make {target}: "
                        f"choose a multiple of {depth}, or the operator interleave")
    return list(range(depth)) * (target // depth)


def interleave(depth: int, target: int) -> list[int]:
    """Repeats each layer in place, as evenly as possible (Chang et al., arXiv 1710.10348, without their smaller
    residual branches). 0 1 2 -> 0 0 1 1 2 2."""
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
    """Repeats the middle, and keeps one copy of a third of the layers, rounded down, at either end.
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


def midas(depth: int, target: int) -> list[int]:
    """One stage of MIDAS (Saunshi et al., arXiv 2409.19044): of the blocks of target - depth layers, repeats the middle
    one, or the first of the two in the middle. Blocks of two: 0 1 2 3 -> 0 1 0 1 2 3."""
    size = block_size(depth, target, "midas")
    start = (depth // size - 1) // 2 * size
    return [*range(start + size), *range(start, depth)]


def lidas(depth: int, target: int) -> list[int]:
    """One stage of LIDAS (Kapl et al., arXiv 2512.08819): inserts a copy of the layers around the middle in the middle,
    half a block of those before it and half a block of those after it. Blocks of two: 0 1 2 3 -> 0 1 1 2 2 3."""
    size, centre = block_size(depth, target, "lidas"), depth // 2
    start = centre - size // 2
    return [*range(centre), *range(start, start + size), *range(centre, depth)]


def block_size(depth: int, target: int, operator: str) -> int:
    """Returns the size of the block that one stage of growth adds. It has to divide the depth of the base."""
    size = target - depth
    if size < 1 or depth % size:
        raise UserError(f"{operator} adds one block, whose size must divide the {depth} layers of the base, and cannot "
                        f"make {target}: choose {depth} plus a divisor of {depth}")
    return size


def expand(depth: int, target: int) -> list[int]:
    """Block expansion (LLaMA Pro: Wu et al., arXiv 2401.02415, section 3.2): inserts a copy of a layer behind it, in
    evenly spaced places. The copies add nothing at first (`zero_init`), so that the function is preserved.
    0 1 2 3 -> 0 1 1 2 3 3."""
    if target > 2 * depth:
        raise UserError(f"expand inserts at most one layer behind each of {depth} and cannot make {target}: choose at "
                        f"most {2 * depth} layers")
    added = target - depth
    copied = {(place + 1) * depth // added - 1 for place in range(added)}
    return [layer for layer in range(depth) for _ in range(1 + (layer in copied))]


OPERATORS: dict[str, Callable[..., list[int]]] = {
    operator.__name__: operator for operator in (stack, interleave, middle, partial, solar, midas, lidas, expand)}

# The operators that also need a block of layers, `first` and `last`.
BLOCK_OPERATORS = ["partial"]

# The operators whose new layers add nothing at first.
ZERO_OPERATORS = ["expand"]


def check_layer_map(layer_map: Sequence[int], depth: int, zero_init: bool = False) -> None:
    """Raises UserError if a map names layers that a base of `depth` layers lacks, or if zero initialization would not
    preserve the function."""
    if outside := [layer for layer in layer_map if not 0 <= layer < depth]:
        raise UserError(f"layers names {', '.join(map(str, outside))}, but the base has the layers 0 to {depth - 1}")
    first = list(dict.fromkeys(layer_map))
    if zero_init and first != list(range(depth)):
        raise UserError("zero_init preserves the function only if the map contains every layer of the base, in order "
                        f"of first use; this map uses {first} of {list(range(depth))}")


def new_layers(layer_map: Sequence[int]) -> list[int]:
    """Returns the indices of the new layers of a grown model: every copy of a layer but the first, wherever an operator
    inserts its copies."""
    return [index for index, source in enumerate(layer_map) if source in layer_map[:index]]


def base_names(config: ModelConfig, layer_map: Sequence[int]) -> dict[str, str]:
    """Returns the parameters of the grown model in model order -> the parameters of the base that they copy."""
    return {name: re.sub(r"layers\.(\d+)", lambda match: f"layers.{layer_map[int(match[1])]}", name)
            for name in parameter_shapes(config)}


def grown_tensors(weights: CheckpointReader | Mapping[str, torch.Tensor], config: ModelConfig,
                  layer_map: Sequence[int], zero_init: bool = False, noise: float = 0.0,
                  seed: int = 42) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of the grown model in model order, from the base's weights and the grown configuration.

    Layer i is a bitwise copy of layer `layer_map[i]`. Two options change the new layers only, the second and later
    copies of a layer. `zero_init` sets the projections that write into the residual stream to 0, or the gains of the
    norms after them: a new layer then adds nothing, and the grown model computes the function of the base (as the new
    layers of Gesmundo and Maile, arXiv 2308.06103, and of LLaMA Pro). `noise` adds Gaussian noise to each matrix, with
    `noise` times its standard deviation; it is a function of (seed, name).
    """
    new = new_layers(layer_map)
    # A norm of zeros has a gradient of 1/√eps, so that its gain is zero instead of the projection before it.
    outputs = ("post_attention_layernorm", "post_feedforward_layernorm") if config.family.norm_after else \
        ("o_proj", "down_proj")
    for name, source in base_names(config, layer_map).items():
        tensor, match = weights[source], re.search(r"layers\.(\d+)", name)
        is_new = match is not None and int(match[1]) in new
        if is_new and noise and tensor.ndim == 2:
            sigma = noise * float(tensor.float().std())
            normal = torch.randn(tensor.shape, generator=named_generator(seed, name)).to(tensor.device)
            noisy = tensor.float() + sigma * normal
            tensor = noisy.to(tensor.dtype)
        if is_new and zero_init and any(output in name for output in outputs):
            tensor = torch.zeros_like(tensor)
        yield name, tensor


@dataclass(frozen=True)
class WholeParameter:
    """All elements of a parameter, as write_parameter_file takes them."""
    name: str
    count: int
    start: int = 0


def open_moments(source: Path, base: ModelConfig) -> ParameterFiles:
    """The optimizer moments next to a checkpoint. Raises UserError if it has none."""
    moments = open_side_files(source, MOMENTS, base)
    if moments is None:
        raise UserError(f"{source} has no optimizer moments: train it with --carry_moments, or leave out --moments")
    return moments


def write_moments(folder: Path, moments: ParameterFiles, base: ModelConfig, layer_map: Sequence[int],
                  zero: bool) -> None:
    """Writes the optimizer moments of a grown model, given those of its base: each parameter has those of the one that
    it copies, or with `zero` the new layers have zero."""
    config = base.with_layers(layer_map)
    names = base_names(config, layer_map)
    new = [f"layers.{layer}." for layer in new_layers(layer_map)] if zero else []

    def values(kind: str, parameter: WholeParameter) -> torch.Tensor:
        found = torch.zeros(parameter.count)
        if not any(place in parameter.name for place in new):
            moments.read(kind, names[parameter.name], 0, found)
        return found

    write_parameter_file(folder / parameter_file_name(MOMENTS, 0, 1),
                         [WholeParameter(name, math.prod(shape)) for name, shape in parameter_shapes(config).items()],
                         {kind: functools.partial(values, kind) for kind in SIDE_FILES[MOMENTS]})


def grow_model(model: Transformer, layer_map: Sequence[int], **options: Any) -> Transformer:
    """Returns a grown copy of a model in memory, as stack.py does on disk. For `options` see `grown_tensors`."""
    check_layer_map(layer_map, model.config.num_hidden_layers, options.get("zero_init", False))
    config = model.config.with_layers(layer_map)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = grown_tensors(weights, config, layer_map, **options)
    return materialize_model(config, ((name, tensor.clone()) for name, tensor in tensors))
