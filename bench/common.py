"""What several benchmarks need: a checkpoint with random weights, and train.py as a command."""
import dataclasses
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from data_prep import train_tokenizer
from model.checkpoint import write_checkpoint
from model.transformer import initial_weights
from settings import ROOT
from stages import shape

# For a process's memory to be what its tensors hold: freed memory is given back, few compiled kernels are kept.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def random_checkpoint(folder, config):
    """A checkpoint with random weights in `folder`, made if it is not there; its tokenizer is of the sample's texts."""
    if not (folder / "config.json").exists():
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("data/sample/*/*.json"))]
        train_tokenizer(texts, config.vocab_size, folder / "tokenizer")
        write_checkpoint(folder, config, initial_weights(config, 0), folder / "tokenizer")
    return folder


def small_checkpoint(folder):
    """A checkpoint of the size small with random weights."""
    return random_checkpoint(folder / "small", dataclasses.replace(shape("small"), bos_token_id=1, eos_token_id=2))


def matrix_rate(device, dtype, repeats=20):
    """FLOPs a second of a large square matrix product: the median of several."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.rand(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size ** 3 / statistics.median(times)


def synchronize(device):
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(processes, *flags):
    """Runs train.py under torchrun to its end; its output is shown only where it fails."""
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", processes, "train.py",
               "--task", "simp", *flags]
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        print(result.stdout + result.stderr, file=sys.stderr)
        sys.exit(result.returncode)
