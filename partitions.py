"""What each process keeps of the fp32 master weights and of the optimizer's state, by the names of the parameters.

Without ZeRO a process keeps all of every parameter. ZeRO-1 and 2 lay the parameters of a group end to end and give each
process a slice of the whole; ZeRO-3 gives it a slice of every parameter. What the optimizer sees is the flat tensor of
the slices, so whoever wants to know a parameter's state has to know where in it the parameter lies.
"""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this process keeps: elements [start, start + count) of the flattened parameter.

    They are elements [offset, offset + count) of `flat`, the tensor that the optimizer updates and has its state by.
    """
    name: str
    parameter: torch.nn.Parameter
    flat: torch.Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor):
        """The fragment's elements of a tensor that is laid out as `flat` is: a view [count]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def fragments(engine):
    """The fragments of this process under the ZeRO stage of a DeepSpeed engine, in the order of the model."""
    return [fragment for name, parameter in engine.module.named_parameters()
            if (fragment := find_fragment(engine, name, parameter)).count]


def find_fragment(engine, name, parameter):
    """The fragment of one parameter; one without elements if this process keeps nothing of it."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return Fragment(name, parameter, parameter, 0, 0, parameter.numel())
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; the last processes' slices are padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = engine.global_rank * size
        count = max(0, min(size, parameter.ds_numel - start))
        return Fragment(name, parameter, optimizer.fp32_partitioned_groups_flat[group], offset, start, count)
    if (mapping := parameter._hp_mapping) is None:
        return Fragment(name, parameter, parameter, 0, 0, 0)
    flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
    return Fragment(name, parameter, flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start,
                    mapping.lp_fragment_address.numel)


def base_optimizer(engine):
    """The torch optimizer that the engine steps, with its state by flat tensors."""
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer
