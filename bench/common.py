"""What several benchmarks need: random weights and samples, a step of a peer, train.py as a command, a clock."""
import dataclasses
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from batches import count_tokens
from data_prep import train_tokenizer
from distributed import weights_dtype
from model.checkpoint import assemble, write_checkpoint
from model.transformer import IGNORE_INDEX, initial_weights
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


def dtype_of(settings):
    """The dtype of a run's weights."""
    return torch.bfloat16 if weights_dtype(settings) == "bf16" else torch.float32


def random_weights(config, device, dtype):
    """New weights, as pairs (name, tensor)."""
    return ((name, tensor.to(device, dtype)) for name, tensor in initial_weights(config, 0))


def random_model(config, device, dtype):
    """A model with new weights, to be trained."""
    return assemble(config, random_weights(config, device, dtype)).train()


def random_samples(generator, config, count, length):
    """Samples of random tokens, each of them a target."""
    return [(generator.integers(0, config.vocab_size, length + 1), 1) for _ in range(count)]


def in_batches(samples, size):
    """Samples in the order in which they come, so many at once."""
    return [samples[start:start + size] for start in range(0, len(samples), size)]


def padded(samples, device):
    """Input ids, attention mask and labels of samples as transformers takes them, padded on the right."""
    width = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros((len(samples), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (tokens, first) in enumerate(samples):
        ids[row, :len(tokens)] = torch.from_numpy(tokens)
        mask[row, :len(tokens)] = 1
        labels[row, first:len(tokens)] = ids[row, first:len(tokens)]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def their_step(engine, samples, batch_size):
    """One step of transformers' model on a global batch; returns the mean loss over its target tokens."""
    wanted, total, batches = count_tokens(samples)[1], 0.0, in_batches(samples, batch_size)
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss = engine(**padded(batch, engine.device), num_items_in_batch=wanted, use_cache=False).loss
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach()
    engine.step()
    return float(total)


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
