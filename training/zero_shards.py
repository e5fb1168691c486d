"""Locations of the fp32 master weights and optimizer state of each parameter, under every ZeRO stage.

Without ZeRO every rank stores all parameters. ZeRO-1 and 2 concatenate the parameters of a group and give each rank a
slice of the result; ZeRO-3 gives each rank a slice of every parameter. The optimizer updates the flat tensor of a
rank's slices. To find the state of one parameter, its position in the flat tensor has to be known: a Fragment.
"""
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from model.parameter_files import ParameterFiles

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that this rank stores: elements [start, start + count) of the flattened parameter.

    They are elements [offset, offset + count) of `flat`, the tensor that the optimizer updates and keys its state by.
    """
    name: str
    parameter: torch.nn.Parameter
    flat: torch.Tensor
    offset: int
    start: int
    count: int
    size: int  # of the whole parameter

    @property
    def shared(self) -> bool:
        """Whether the model computes with `flat` itself, as it does without ZeRO."""
        return self.flat is self.parameter

    @property
    def weights(self) -> torch.Tensor:
        """The fragment of the tensor that the model computes with, in the model's dtype: a view [count]."""
        if hasattr(self.parameter, "ds_tensor"):
            return self.parameter.ds_tensor.detach().view(-1)[:self.count]
        return self.parameter.detach().view(-1)[self.start:self.start + self.count]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fragment of a tensor with the layout of `flat`: a view [count]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def local_fragments(engine: "DeepSpeedEngine") -> list[Fragment]:
    """The fragments of this rank of the parameters that are trained, in the order of the model."""
    return [fragment for name, parameter in engine.module.named_parameters() if parameter.requires_grad
            and (fragment := find_fragment(engine, name, parameter)).count]


def flat_tensors(fragments: Iterable[Fragment]) -> list[torch.Tensor]:
    """The flat tensors of fragments, each once."""
    return list(dict.fromkeys(fragment.flat for fragment in fragments))


def find_fragment(engine: "DeepSpeedEngine", name: str, parameter: Any) -> Fragment:
    """The fragment of one parameter; its count is 0 if this rank stores nothing of it."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return Fragment(name, parameter, parameter, 0, 0, parameter.numel(), parameter.numel())
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; the last ranks' slices are padded
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


def base_optimizer(engine: "DeepSpeedEngine") -> Any:
    """The PyTorch optimizer inside the engine, whose state is keyed by flat tensors."""
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def state_of(state: Mapping[torch.Tensor, Any], kind: str, fragment: Fragment) -> torch.Tensor:
    """The elements of a fragment of one kind of optimizer state."""
    return fragment.of(state[fragment.flat][kind])


@torch.no_grad()
def fill_optimizer_state(engine: "DeepSpeedEngine", files: ParameterFiles, kinds: Iterable[str], updates: int) -> None:
    """Fills this rank's optimizer state, of an optimizer that has made a number of updates, from files."""
    optimizer, kinds = base_optimizer(engine), sorted(kinds)
    for fragment in local_fragments(engine):
        if updates and fragment.flat not in optimizer.state:
            optimizer.state[fragment.flat] = {"step": torch.tensor(0.0, device=fragment.flat.device),
                                              **{kind: torch.zeros_like(fragment.flat) for kind in kinds}}
        state = optimizer.state.get(fragment.flat, {})
        if "step" in state:
            state["step"].fill_(updates)
        for kind in kinds:
            files.read(kind, fragment.name, fragment.start, fragment.of(state[kind]))


@contextlib.contextmanager
def changing_weights(engine: "DeepSpeedEngine") -> Iterator[list[Fragment]]:
    """Yields this rank's fragments, whose `weights` the block may change; then all ranks get all changes.

    The flat tensors do not change, except where they are the weights themselves.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:  # drop the small parameters that are kept gathered: they are gathered again when needed
        optimizer.checkpoint_event_prologue()
    yield local_fragments(engine)
    if stage == 3:
        wait_for_changes()
    if stage in (0, 3):
        return
    from deepspeed.runtime.utils import all_gather_dp_groups
    names = ("bf16_groups_flat", "bf16_partitioned_groups") if hasattr(optimizer, "bf16_groups_flat") else \
        ("bit16_groups_flat", "parallel_partitioned_bit16_groups")  # ZeRO-1 in bf16; ZeRO-1 in fp32 and ZeRO-2
    with torch.no_grad():
        all_gather_dp_groups(*(getattr(optimizer, name) for name in names), optimizer.real_dp_process_group,
                             optimizer.nccl_start_alignment_factor, optimizer.allgather_bucket_size)


def wait_for_changes() -> None:
    """Waits until the GPU of this rank has changed its weights: ZeRO-3 gathers weights on a separate stream, which does
    not wait for the stream that has changed them."""
    from deepspeed.accelerator import get_accelerator
    get_accelerator().synchronize()


def update_weights(engine: "DeepSpeedEngine") -> None:
    """Copies the optimizer's flat tensors to the weights that the model computes with."""
    with changing_weights(engine) as fragments:
        for fragment in fragments:
            fragment.weights.copy_(fragment.of(fragment.flat))
