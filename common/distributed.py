"""The processes of a run: a single one, or many under torchrun or the deepspeed launcher."""
import contextlib
import datetime
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from common.files import UserError

CONNECTION_ERRORS = "[Cc]onnection (closed|reset|refused)|[Tt]imed out|timeout|Broken pipe|remote process exited"
T = TypeVar("T")

# Micro-batches differ in size, which fragments memory; expandable segments avoid that. By default torch rounds pinned
# host memory, such as offloaded weights, up to a power of two.
ALLOCATOR = "expandable_segments:True,pinned_max_round_threshold_mb:1024"

# On CPUs oneDNN compiles kernels for each shape, and every micro-batch has shapes that no other has. By default oneDNN
# caches the kernels of 1,024 shapes, and torch as many again: gigabytes.
KERNEL_CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


class Distributed:
    """The process group of a run, as a context manager.

    Attributes: `rank`, `world_size`, `local_rank` and `local_world_size` (on this node), `device`.

    Launchers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment; without them the group
    has one process. Communication uses NCCL on GPUs and gloo on CPUs.
    """

    def __init__(self, timeout: datetime.timedelta = datetime.timedelta(minutes=30)):
        self.timeout = timeout  # how long a rank waits for the others

    def __enter__(self) -> "Distributed":
        if "RANK" not in os.environ:
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.world_size = launcher_number("WORLD_SIZE", None, at_least=1)
        self.rank = launcher_number("RANK", None, below=self.world_size)
        if "LOCAL_SIZE" in os.environ:  # the deepspeed launcher's name for it
            os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
        self.local_world_size = launcher_number("LOCAL_WORLD_SIZE", self.world_size, at_least=1)
        self.local_rank = launcher_number("LOCAL_RANK", 0, below=self.local_world_size)
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the user's own, under the variable's older name
            os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
        for cache in KERNEL_CACHES:
            os.environ.setdefault(cache, "64")
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is None or threads == "1" and self.local_world_size > 1:
            # torchrun sets one thread per process, which leaves most of a CPU unused, by an offloaded optimizer, too
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // self.local_world_size))
        if torch.cuda.is_available():
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"{self.local_world_size} processes on a node with {torch.cuda.device_count()} GPUs: "
                                "start one for each GPU")
            torch.cuda.set_device(self.local_rank)
            self.device = torch.device("cuda", self.local_rank)
        else:
            self.device = torch.device("cpu")
        launcher_number("MASTER_PORT", None, below=1 << 16)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError("the environment has RANK, but no MASTER_ADDR: start with torchrun, or unset RANK")
        try:
            torch_dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                          timeout=self.timeout)
        except (RuntimeError, ValueError) as error:  # also of an unknown GLOO_SOCKET_IFNAME
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}"
            raise UserError(f"cannot meet the other processes at {place} ({str(error).splitlines()[0]:.200}): choose "
                            "another port, or check the address and that all processes were started") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None or self.device.type == "cpu":
            torch_dist.destroy_process_group()  # NCCL's may wait for processes that have failed
        if self.world_size > 1 and kind and issubclass(kind, RuntimeError) and re.search(CONNECTION_ERRORS, str(error)):
            raise UserError("lost the connection to another process, which has died or hangs "
                            f"({str(error).splitlines()[0]:.200}): see its error above, then run the same command "
                            "again") from None

    def all_reduce_sum(self, *values: Any) -> list[float]:
        """The sums of scalars over all ranks."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        torch_dist.all_reduce(sums)
        return sums.tolist()

    @property
    def hides_progress(self) -> bool | None:
        """`disable` of a progress bar: shown on rank 0 if its output is a terminal."""
        return None if self.rank == 0 else True

    def scatter(self, shares: list[T] | None = None) -> T:
        """This rank's item of rank 0's list, which has one picklable item for each rank."""
        share: list[Any] = [None]
        torch_dist.scatter_object_list(share, shares, src=0)
        return share[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order, on rank 0; an empty list elsewhere."""
        values: list[Any] = [None] * self.world_size
        torch_dist.gather_object(value, values if self.rank == 0 else None, dst=0)
        return values if self.rank == 0 else []

    def local_rank0_first(self, function: Callable[[], T]) -> T:
        """Calls a function on local rank 0 of each node, then on the other ranks; returns its result. If any rank
        raises UserError, all ranks exit."""
        results = [self.on_all_ranks(lambda: function() if self.local_rank == 0 else None),
                   self.on_all_ranks(lambda: None if self.local_rank == 0 else function())]
        return cast("T", results[self.local_rank > 0])

    def on_all_ranks(self, function: Callable[[], T]) -> T:
        """Calls a function on every rank and returns its result. If any rank raises UserError, all ranks exit."""
        failure = None
        try:
            result = function()
        except UserError as error:
            failure = str(error)
        failures: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(failures, failure)
        for rank, reason in enumerate(failures):
            if reason is not None:
                self.fail(UserError(reason if self.world_size == 1 else f"{reason} (on rank {rank})"))
        return result

    def check_same_on_all_nodes(self, digests: Callable[[], Mapping[str, str | None]]) -> None:
        """Raises UserError, on all ranks, if a node has other copies of what is read than the node of rank 0.

        digests: returns {description of what is read: digest}; it is called on local rank 0 of each node.
        """
        found = self.gather(self.on_all_ranks(lambda: {} if self.local_rank else digests()))
        self.on_rank0(lambda: compare_digests(found))

    @contextlib.contextmanager
    def long_timeout(self) -> Iterator[None]:
        """Within this context the ranks wait for one another up to a day: one of them may download a model."""
        set_timeout(datetime.timedelta(days=1))
        yield
        set_timeout(self.timeout)

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Calls a function on rank 0 and returns its result on every rank. If it raises UserError, all ranks exit."""
        result: list[Any] = [None, False]
        failure = UserError()
        if self.rank == 0:
            try:
                result[0] = function()
            except UserError as error:
                result[1], failure = True, error
        torch_dist.broadcast_object_list(result, device=torch.device("cpu"))
        if result[1]:
            self.fail(failure)
        return result[0]

    def fail(self, error: UserError) -> NoReturn:
        """Ends a run for a reason known to all ranks: rank 0 raises the error, the others exit silently."""
        if self.rank == 0:
            raise error
        sys.exit(2)

    def print0(self, text: str) -> None:
        """Prints a line on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def compare_digests(digests: Sequence[Mapping[str, str | None]]) -> None:
    """Raises UserError if a digest of a rank, whose digests are {description: digest}, is not that of rank 0."""
    for rank, found in enumerate(digests):
        for name, digest in found.items():
            if digest != (expected := digests[0].get(name)):
                raise UserError(f"not the same on all nodes: {name} (digest {expected!s:.12} on rank 0, "
                                f"{digest!s:.12} on rank {rank}): copy the files there again, or use a shared folder")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to a device. From host memory it goes through pinned memory: the host does not wait for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def launcher_number(name: str, default: int | None, at_least: int = 0, below: int = 1 << 31) -> int:
    """An environment variable that launchers set. Raises UserError if it is not a whole number in the range."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or not at_least <= int(text) < below:
        raise UserError(f"the environment variable {name} is {text!r}, expected a whole number from {at_least} to "
                        f"{below - 1}: start this with torchrun or deepspeed, or unset RANK for one process")
    return int(text)


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
