"""Growth operators: from the depth of a base to a layer map, the list of the base's layer that each new layer copies.

Every operator is a pure function operator(depth, target) -> list of `target` layers, and raises a UserError that says
why where it is not defined. stack.py moves the weights by them.
"""
from .files import UserError


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
