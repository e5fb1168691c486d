"""What each process keeps of the fp32 master weights and of the optimizer's state, by the names of the parameters.

Without ZeRO a process keeps all of every parameter. ZeRO-1 and 2 lay the parameters of a group end to end and give each
process a slice of the whole; ZeRO-3 gives it a slice of every parameter. What the optimizer sees is the flat tensor of
the slices, so whoever wants to know a parameter's state has to know where in it the parameter lies.
"""
import contextlib
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
    size: int  # of the whole parameter

    @property
    def shared(self):
        """Whether the model computes with `flat` itself, as it does without ZeRO."""
        return self.flat is self.parameter

    @property
    def weights(self):
        """The fragment's elements of what the model computes with, in the model's dtype: a view [count]."""
        if hasattr(self.parameter, "ds_tensor"):
            return self.parameter.ds_tensor.detach().view(-1)[:self.count]
        return self.parameter.detach().view(-1)[self.start:self.start + self.count]

    def of(self, tensor):
        """The fragment's elements of a tensor that is laid out as `flat` is: a view [count]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def fragments(engine):
    """The fragments of this process under the ZeRO stage of a DeepSpeed engine, in the order of the model."""
    return [fragment for name, parameter in engine.module.named_parameters()
            if (fragment := find_fragment(engine, name, parameter)).count]


def flats(mine):
    """The flat tensors that fragments lie in, each once."""
    return list(dict.fromkeys(fragment.flat for fragment in mine))


def find_fragment(engine, name, parameter):
    """The fragment of one parameter; one without elements if this process keeps nothing of it."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return Fragment(name, parameter, parameter, 0, 0, parameter.numel(), parameter.numel())
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; the last processes' slices are padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = engine.global_rank * size
        count = max(0, min(size, parameter.ds_numel - start))
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return Fragment(name, parameter, flat, offset, start, count, parameter.ds_numel)
    if (mapping := parameter._hp_mapping) is None:
        return Fragment(name, parameter, parameter, 0, 0, 0, parameter.numel())
    flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
    return Fragment(name, parameter, flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start,
                    mapping.lp_fragment_address.numel, parameter.numel())


def base_optimizer(engine):
    """The torch optimizer that the engine steps, with its state by flat tensors."""
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


@contextlib.contextmanager
def changing_weights(engine):
    """The fragments of this process, whose `weights` the block may change; then every process gets all changes.

    What the optimizer has by `flat` is not changed by that, but for fragments whose weights are `flat` itself.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:  # forget the small parameters that are kept whole beside the slices: they are gathered when needed
        optimizer.checkpoint_event_prologue()
    yield fragments(engine)
    if stage in (0, 3):
        return
    from deepspeed.runtime.utils import all_gather_dp_groups
    names = ("bf16_groups_flat", "bf16_partitioned_groups") if hasattr(optimizer, "bf16_groups_flat") else \
        ("bit16_groups_flat", "parallel_partitioned_bit16_groups")  # of ZeRO-1 in bf16, and of ZeRO-1 and 2
    with torch.no_grad():
        all_gather_dp_groups(*(getattr(optimizer, name) for name in names), optimizer.real_dp_process_group,
                             optimizer.nccl_start_alignment_factor, optimizer.allgather_bucket_size)


def update_weights(engine):
    """Gives the model what the optimizer has in `flat`."""
    with changing_weights(engine) as mine:
        for fragment in mine:
            fragment.weights.copy_(fragment.of(fragment.flat))
