"""What several benchmarks need: random weights and samples, steps in turns, a profile, train.py as a command."""
import contextlib
import dataclasses
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from common.distributed import Distributed, resolve_dtype
from common.files import UserError, new_directory
from common.settings import ROOT
from model.checkpoint import assemble, write_checkpoint
from model.config import ModelConfig
from model.loss import IGNORE_INDEX
from model.tokenizer import train_tokenizer
from model.transformer import initial_weights
from pipeline.jobs import shape
from train import train_step
from training.batches import count_tokens

# For a process's memory to be what its tensors hold: freed memory is given back.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def random_checkpoint(folder, config):
    """A checkpoint with random weights in `folder`, made if it is not there; its tokenizer is of the sample's texts.
    Raises UserError if one of another shape is there."""
    if not folder.exists():
        with new_directory(folder) as partial:
            (partial / "tokenizer").mkdir()
            texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("data/sample/*/*.json"))]
            train_tokenizer(texts, config.vocab_size, partial / "tokenizer")
            write_checkpoint(partial, config, initial_weights(config, 0), partial / "tokenizer")
    elif ModelConfig.read(folder / "config.json") != config:
        raise UserError(f"{folder} holds a model of another shape than the preset's: delete it, or give another folder")
    return folder


def small_checkpoint(folder):
    """A checkpoint of the size small with random weights."""
    return random_checkpoint(folder / "small", dataclasses.replace(shape("small"), bos_token_id=1, eos_token_id=2))


def dtype_of(settings):
    """The dtype of a run's weights."""
    return torch.bfloat16 if resolve_dtype(settings.dtype) == "bf16" else torch.float32


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


def our_step(engine, samples, settings, dist):
    """One step of train.py on a global batch; returns the mean loss over its target tokens."""
    return train_step(settings, engine, samples, dist)[0]


def serve(connection, make):
    """A process of `compare`: takes steps on the global batches that it is sent, and answers (loss, seconds)."""
    with Distributed() as dist, contextlib.suppress(EOFError):
        step = make(dist)
        while True:
            samples, began = connection.recv(), time.perf_counter()
            loss = step(samples)
            synchronize(dist.device)
            connection.send((loss, time.perf_counter() - began))


def compare(ways, batches, warm_up, dtype, config):
    """Takes the same steps in several ways, in turns, each in a process of its own, and prints their rates beside those
    of the first.

    ways: name -> what makes of the process's `world` a function from a global batch to the loss of a step on it. The
    first `warm_up` global batches are not measured. `of a matrix product` is 6·N FLOPs a token over the rate of a large
    square matrix product in the same dtype, measured in between.
    """
    context, connections, processes = torch.multiprocessing.get_context("spawn"), {}, []
    for way, make in ways.items():
        connections[way], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, make)))
        processes[-1].start()
        theirs.close()  # for its end to be noticed here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds, losses, products = {way: [] for way in ways}, {way: [] for way in ways}, []
    for number, samples in enumerate(tqdm(batches, "steps", leave=False)):
        for way, connection in connections.items():
            try:
                connection.send(samples)
                loss, seconds = connection.recv()
            except (EOFError, BrokenPipeError):
                raise UserError(f"{way} ended before its step {number}; what it said is above") from None
            losses[way].append(loss)
            if number >= warm_up:
                speeds[way].append(count_tokens(samples)[0] / seconds)
        products.append(matrix_rate(device, dtype, repeats=5))
    for connection, process in zip(connections.values(), processes):
        connection.close()
        process.join()
    product, first = statistics.median(products[warm_up:]), next(iter(ways))
    print(f"a matrix product: {product / 1e9:,.0f} GFLOP/s; medians of {len(batches) - warm_up} steps, losses of all")
    print(f"{'':<30} {'tokens/s':>9} {'ratio':>6} {'of a matrix product':>20} {'losses apart: most':>18} {'mean':>8}")
    for way, found in speeds.items():
        speed = statistics.median(found)
        apart = [abs(a / b - 1) for a, b in zip(losses[way], losses[first])]
        print(f"{way:<30} {speed:>9,.1f} {speed / statistics.median(speeds[first]):>6.2f} "
              f"{config.flops(speed) / product:>20.1%} {max(apart):>18.1e} {statistics.fmean(apart):>8.1e}")


def kind(event, vocabulary):
    """What the time that an operator spends itself is for."""
    name, shapes, above = event.name, [shape for shape in event.input_shapes or [] if shape], event.cpu_parent
    product = name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mkldnn_linear", "aten::_mkldnn_linear")
    while above:
        if "AccumulateGrad" in above.name:
            return "DeepSpeed: gradients"
        if above.name == "engine.step":
            return "optimizer" if "adamw" in name else "DeepSpeed: step"
        above = above.cpu_parent
    if any(vocabulary in shape if product else shape[-1] == vocabulary for shape in shapes):
        return "head and loss"
    if product:
        return "matrix products"
    attention = "scaled_dot_product" in name or name in ("aten::baddbmm", "aten::bmm", "aten::_softmax",
                                                         "aten::_softmax_backward_data")
    return "attention" if attention else "norms, rotation, elementwise"


def print_profile(settings, engine, batches, dist):
    """Prints where the time of our steps goes on a CPU, after a first one: operators by what they are for, and what is
    left between them."""
    step, vocabulary, spent = engine.step, engine.module.config.vocab_size, Counter()

    def named_step():
        with record_function("engine.step"):
            step()

    train_step(settings, engine, batches[0], dist)
    engine.step = named_step
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        began = time.perf_counter()
        for samples in batches[1:]:
            train_step(settings, engine, samples, dist)
        took = (time.perf_counter() - began) / (len(batches) - 1)
    engine.step = step
    for event in profiled.events():
        if event.name.startswith("aten::"):
            spent[kind(event, vocabulary)] += event.self_cpu_time_total / 1e6 / (len(batches) - 1)
    spent["between operators: Python, DeepSpeed, autograd"] = took - sum(spent.values())
    tokens = sum(count_tokens(samples)[0] for samples in batches[1:]) / (len(batches) - 1)
    print(f"a step of ours, {tokens:,.0f} tokens in {took:.3f} s while it is profiled:")
    for name, seconds in spent.most_common():
        print(f"  {name:<48} {seconds:7.3f} s {seconds / took:6.1%}")


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
