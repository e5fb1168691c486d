"""Running out of memory: the work is halved and tried again."""
import sys

import torch


def out_of_memory(error):
    """Whether an exception says that the memory of the GPU or of the machine did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or \
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator on a CPU


def halve(size, what, error):
    """Half of a number of tokens or prompts, and says so; raises the error again where it is one already."""
    if size <= 1:
        raise error
    print(f"out of memory with {size:,} {what} at once: trying again with {size // 2:,}", file=sys.stderr)
    return size // 2
