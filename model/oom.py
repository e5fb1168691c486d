"""Recovery from running out of memory."""
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.files import UserError, first_line

# What other errors say, in lower case: torch's allocator on a CPU and the system; pinned host memory, CUDA, its driver
# and NCCL; cuBLAS and cuDNN.
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "cublas_status_alloc_failed",
                 "cudnn_status_alloc_failed")


def available_memory() -> float:
    """Returns the bytes of memory that programs can still get on this machine; infinity where that is not known. Limits
    of a container or a Slurm job are not counted. An allocation may succeed beyond that: the system then ends the
    program that uses the memory."""
    with suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].removesuffix("kB"))
    return math.inf


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that the memory of the GPU or the machine is exhausted."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or \
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


@contextmanager
def oom_remedy(remedy: str) -> Iterator[None]:
    """Within the block, an error that means that memory is exhausted becomes a UserError that ends with a remedy."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {first_line(error).rstrip('.')}. {remedy}") from error


def halve_batch(size: int, unit: str, error: Exception) -> int:
    """Returns half of a batch size, after an error, and prints it.

    Raises the error again if it does not mean that the memory of the GPU or the machine is exhausted, and UserError if
    the size is 1.
    """
    if not is_out_of_memory(error):
        raise error
    if size <= 1:
        raise UserError(f"there is not enough memory for one of the {unit}: {first_line(error)}") from error
    print(f"out of memory with {size:,} {unit} at once: trying again with {size // 2:,}", file=sys.stderr)
    return size // 2
