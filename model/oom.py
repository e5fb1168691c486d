"""Recovery from running out of memory."""
import sys

import torch

from common.files import UserError, first_line


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that the memory of the GPU or the machine is exhausted."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or \
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator on a CPU


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
