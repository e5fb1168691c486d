"""The processes of a run: one alone, or many under torchrun or the deepspeed launcher."""
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as torch_dist

from common.files import UserError

LOST = "[Cc]onnection (closed|reset|refused)|[Tt]imed out|timeout|Broken pipe|remote process exited"


class Distributed:
    """This process among those of the run: `rank`, `world_size`, `device`. A context manager: it joins and leaves the group.

    Launchers say who is who in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without them
    the process is alone. Processes talk over NCCL on GPUs and over gloo on CPUs.
    """

    def __init__(self, timeout=datetime.timedelta(minutes=30)):
        self.timeout = timeout  # how long a process waits for the others before it gives up

    def __enter__(self):
        if "RANK" not in os.environ:
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        if torch.cuda.is_available():
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"{beside} processes on a node with {torch.cuda.device_count()} GPUs: start one a GPU")
            # torch would round what it pins of host memory, such as offloaded weights, up to a power of two
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "pinned_max_round_threshold_mb:1024")
            torch.cuda.set_device(self.local_rank)
            self.device = torch.device("cuda", self.local_rank)
        else:
            self.device = torch.device("cpu")
            if beside > 1 or "OMP_NUM_THREADS" not in os.environ:
                # torchrun sets one thread a process, which leaves most of a CPU idle
                cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
                torch.set_num_threads(max(1, cores // beside))
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                timeout=self.timeout)
        return self

    def __exit__(self, kind, error, trace):
        if kind is None or self.device.type == "cpu":
            torch_dist.destroy_process_group()  # over NCCL it may wait for processes that do not come
        if self.world_size > 1 and kind and issubclass(kind, RuntimeError) and re.search(LOST, str(error)):
            raise UserError("lost touch with another process, which died or hangs "
                            f"({str(error).splitlines()[0]:.200}): the same command goes on from what was saved") \
                from None

    def all_reduce_sum(self, *values):
        """The sums of scalars over all processes, as floats."""
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        torch_dist.all_reduce(values)
        return values.tolist()

    def scatter(self, shares=None):
        """This process's share of a list that rank 0 hands out, one of any kind for each process."""
        share = [None]
        torch_dist.scatter_object_list(share, shares, src=0)
        return share[0]

    def gather(self, value):
        """The values of all processes in the order of their ranks, on rank 0; None elsewhere."""
        values = [None] * self.world_size if self.rank == 0 else None
        torch_dist.gather_object(value, values, dst=0)
        return values

    def local_rank0_first(self, function):
        """What `function()` returns, called by the first process of each node before the others call it."""
        if self.local_rank == 0:
            result = function()
        torch_dist.barrier()
        return result if self.local_rank == 0 else function()

    def on_all_ranks(self, function):
        """What `function()` returns on each process; where it fails on one, rank 0 says so and all of them exit."""
        result, failure = None, None
        try:
            result = function()
        except UserError as error:
            failure = str(error)
        failures = [None] * self.world_size
        torch_dist.all_gather_object(failures, failure)
        for rank, reason in enumerate(failures):
            if reason is not None:
                self.fail(UserError(reason if self.world_size == 1 else f"{reason} (on rank {rank})"))
        return result

    def on_rank0(self, function):
        """What `function()` returns on rank 0, for every process; where it fails there, the others exit in silence."""
        result, failure = [None, False], None
        if self.rank == 0:
            try:
                result = [function(), False]
            except UserError as error:
                result, failure = [None, True], error
        torch_dist.broadcast_object_list(result, device=torch.device("cpu"))
        if result[1]:
            self.fail(failure)
        return result[0]

    def fail(self, error):
        """Ends a run for a reason that all processes know: rank 0 raises the UserError, the others exit in silence."""
        if self.rank == 0:
            raise error
        sys.exit(2)

    def say(self, text):
        """Prints a line, once for all processes."""
        if self.rank == 0:
            print(text, flush=True)


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StopRequest:
    """Whether somebody asked the run to end: SIGTERM or SIGINT, as a context. `signal` is its name, or None.

    The first one is a wish that the loop grants after its step. A second one ends the process at once, unless it comes
    within two seconds: launchers pass on what the terminal has sent to every process already. A thread listens, since
    Python's own handlers wait for the end of a call, which may be one to a process that hangs.
    """

    def __enter__(self):
        self.signal, self.since = None, 0.0
        self.ear, self.voice = socket.socketpair()
        self.voice.setblocking(False)
        self.before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        self.descriptor = signal.set_wakeup_fd(self.voice.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def __exit__(self, *error):
        signal.set_wakeup_fd(self.descriptor)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.voice.close()

    def listen(self):
        while heard := self.ear.recv(1):
            if heard[0] not in self.before:
                continue
            if self.signal and time.monotonic() - self.since > 2:
                os._exit(128 + heard[0])
            if not self.signal:
                self.signal, self.since = signal.Signals(heard[0]).name, time.monotonic()


def resolve_dtype(dtype: str) -> str:
    """"bf16" or "fp32"; auto is bf16 where the hardware multiplies bf16 matrices."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16") else "fp32"
