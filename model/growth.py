"""Growth operators: from the depth of a base to a layer map, the list of the base's layer that each new layer copies.

Every operator is a pure function operator(depth, target) -> list of `target` layers, and raises a UserError that says
why where it is not defined. stack.py moves the weights by them.
"""
import hashlib
from dataclasses import replace

import torch

from common.files import UserError
from model.checkpoint import assemble
from model.transformer import parameter_shapes


def stack(depth, target):
    """G_stack: all layers in order, a whole number of times. 0 1 2 -> 0 1 2 0 1 2."""
    if target % depth:
        raise UserError(f"stack repeats {depth} layers a whole number of times and cannot make {target}: "
                        f"choose a multiple of {depth}, or the operator interleave")
    return list(range(depth)) * (target // depth)


def interleave(depth, target):
    """Each layer repeated in place, as evenly as the target allows (G_direct of the depthwise operators in Du et al.;
    Chang et al., arXiv 1710.10348). 0 1 2 -> 0 0 1 1 2 2."""
    return [index * depth // target for index in range(target)]


def partial(depth, target, first, last):
    """A block of layers, `first` to `last` with both included, repeated in order; those before and behind it stay
    (Du et al., appendix on partial stacking). Block 1 to 2: 0 1 2 3 -> 0 1 2 1 2 3."""
    block = list(range(first, last + 1))
    if not 0 <= first <= last < depth:
        raise UserError(f"block {first},{last} is no block of the base's layers 0 to {depth - 1}")
    if (target - depth) % len(block):
        raise UserError(f"repeating layers {first} to {last} adds {len(block)} layers at a time to {depth} and cannot "
                        f"make {target}: choose {depth} plus a multiple of {len(block)}, or another --block")
    times = 1 + (target - depth) // len(block)
    return [*range(first), *block * times, *range(last + 1, depth)]


def middle(depth, target):
    """The middle third repeated, the layers next to the embedding and to the head kept once.
    0 1 2 3 4 5 -> 0 1 2 3 2 3 4 5."""
    return partial(depth, target, depth // 3, depth - 1 - depth // 3)


def solar(depth, target):
    """Two overlapping copies, the first without its last layers and the second without its first ones (Kim et al.,
    SOLAR 10.7B, arXiv 2312.15166, where 32 layers make 48). 0 1 2 3 -> 0 1 2 1 2 3."""
    half = target // 2
    if target % 2 or half > depth:
        raise UserError(f"solar joins two copies of at most {depth} layers and cannot make {target}: "
                        f"choose an even number from {depth + 1} to {2 * depth}")
    return [*range(half), *range(depth - half, depth)]


OPERATORS = {"stack": stack, "interleave": interleave, "middle": middle, "partial": partial, "solar": solar}


def new_layers(layer_map):
    """The layers of the grown model that are not the first copy of their source."""
    return {index for index, source in enumerate(layer_map) if source in layer_map[:index]}


def grown_tensors(weights, config, layer_map, zero_init=False, noise=0.0, seed=42):
    """Yields (name, tensor) of the grown model, in its own order of names, one tensor at a time.

    weights: a mapping from the base's names to tensors, such as Weights or a state dict; config: the grown shape. Layer
    i is layer `layer_map[i]`, bit for bit. Two variations change the new layers, the later copies of a source. Noise:
    each matrix gets Gaussian noise of `noise` times its own standard deviation, a function of (seed, name) alone.
    `zero_init`: the projections that write into the residual stream are 0, so that the layer adds nothing and the
    grown model computes what the base does (as in Gong et al., arXiv 1904.01038, and bert2BERT, arXiv 2110.07143, for
    other operators).
    """
    new = new_layers(layer_map)
    for name in parameter_shapes(config):
        before, _, inside = name.partition("layers.")
        if not inside:
            yield name, weights[name]
            continue
        index, _, leaf = inside.partition(".")
        tensor = weights[f"{before}layers.{layer_map[int(index)]}.{leaf}"]
        if int(index) in new and noise and tensor.ndim == 2:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            sigma = noise * float(tensor.float().std())
            noisy = tensor.float() + sigma * torch.randn(tensor.shape, generator=generator).to(tensor.device)
            tensor = noisy.to(tensor.dtype)
        if int(index) in new and zero_init and ("o_proj" in leaf or "down_proj" in leaf):
            tensor = torch.zeros_like(tensor)
        yield name, tensor


def check_map(layer_map, depth, zero_init):
    """Raises UserError where zero initialisation would not preserve the function."""
    first = list(dict.fromkeys(layer_map))
    if zero_init and first != list(range(depth)):
        raise UserError(f"zero_init preserves the function only where every layer of the base comes, in its order; "
                        f"this map brings {first} of {list(range(depth))}")


def grow_model(model, layer_map, **variation):
    """A grown copy of a live Transformer; `variation` as for `grown_tensors`. What stack.py does on disk."""
    check_map(layer_map, model.config.num_hidden_layers, variation.get("zero_init", False))
    config = replace(model.config, num_hidden_layers=len(layer_map))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return assemble(config, ((name, tensor.clone()) for name, tensor in grown_tensors(weights, config, layer_map,
                                                                                      **variation)))
