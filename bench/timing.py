"""Timing: single calls, the same steps with several variants, a profile of a step, and peak memory."""
import contextlib
import re
import statistics
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from bench.workload import make_run
from common.distributed import Distributed
from common.files import UserError
from model.linear import linear
from train import train_step
from training.batches import count_tokens
from training.engine import build_engine, build_model


def timed(function, *arguments):
    """Calls a function and waits for the GPU; returns (seconds, result)."""
    synchronize()
    began = time.perf_counter()
    result = function(*arguments)
    synchronize()
    return time.perf_counter() - began, result


def synchronize():
    """Waits for the GPU if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def matrix_rate(device, dtype, repeats=20):
    """FLOP/s of a large square matrix product, by the library that the model uses: the median of several."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.rand(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / statistics.median(timed(linear, a, a)[0] for _ in range(repeats))


def read_rate(size=1 << 30, repeats=5):
    """Bytes per second at which all threads read memory: the best sum over a tensor far larger than the caches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = torch.ones(size // 4, device=device)
    return size / min(timed(values.sum)[0] for _ in range(repeats))


def serve(connection, make):
    """A process of `compare`: takes steps on the global batches it receives, and answers (seconds, loss)."""
    with Distributed() as dist, contextlib.suppress(EOFError):
        step = make(dist)
        while True:
            connection.send(timed(step, connection.recv()))


def take_steps(name, make, batches):
    """Takes the steps of a variant in a new process, which then ends; returns its (seconds, loss) of each."""
    context = torch.multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process, answers = context.Process(target=serve, args=(other_end, make)), []
    process.start()
    other_end.close()  # so that recv raises EOFError when the process ends
    for samples in tqdm(batches, name, leave=False):
        try:
            connection.send(samples)
            answers.append(connection.recv())
        except (EOFError, BrokenPipeError):
            raise UserError(f"{name} failed at step {len(answers)}; its error is above") from None
    connection.close()
    process.join()
    return answers


def compare(variants, batches, warm_up, dtype, config, rounds=2):
    """Takes the same steps with several variants, one after another, and prints their rates.

    Args:
        variants: name -> function from the process's `dist` to a function from a global batch to its loss. Ratios and
            loss differences are relative to the first.
        batches: global batches; the first `warm_up` are not measured.
        rounds: how often each variant takes the steps. No other variant is in memory meanwhile: on a CPU it would take
            caches, and on a GPU memory.

    The column `of a matrix product` is 6·N FLOPs per token, over the rate of a large square matrix product in the same
    dtype, which is measured between the variants.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds, losses, products = {name: [] for name in variants}, {}, []
    for _ in range(rounds):
        for name, make in variants.items():
            products.append(matrix_rate(device, dtype))
            answers = take_steps(name, make, batches)
            losses[name] = [loss for _, loss in answers]
            speeds[name] += [count_tokens(samples)[0] / seconds
                             for samples, (seconds, _) in zip(batches[warm_up:], answers[warm_up:])]
    product, first = statistics.median(products), next(iter(variants))
    print(f"a matrix product: {product / 1e9:,.0f} GFLOP/s; medians of {rounds} × {len(batches) - warm_up} steps")
    print(f"{'':<30} {'tokens/s':>9} {'ratio':>6} {'of a matrix product':>20} {'loss difference: max':>20} {'mean':>8}")
    for name, values in speeds.items():
        speed = statistics.median(values)
        difference = [abs(a / b - 1) for a, b in zip(losses[name], losses[first])]
        print(f"{name:<30} {speed:>9,.1f} {speed / statistics.median(speeds[first]):>6.2f} "
              f"{config.flops(speed) / product:>20.1%} {max(difference):>20.1e} {statistics.fmean(difference):>8.1e}")


def operator_group(event, vocab_size):
    """The part of a training step to which an operator's own time belongs."""
    name, shapes, parent = event.name, [shape for shape in event.input_shapes or [] if shape], event.cpu_parent
    is_product = name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mkldnn_linear", "aten::_mkldnn_linear",
                          "mkldnn::_linear_pointwise")
    while parent:
        if "AccumulateGrad" in parent.name:
            return "DeepSpeed: gradients"
        if parent.name == "engine.step":
            return "optimizer" if "adamw" in name else "DeepSpeed: step"
        parent = parent.cpu_parent
    if any(vocab_size in shape if is_product else shape[-1] == vocab_size for shape in shapes):
        return "head and loss"
    if is_product:
        return "matrix products"
    is_attention = "scaled_dot_product" in name or name in ("aten::baddbmm", "aten::bmm", "aten::_softmax",
                                                            "aten::_softmax_backward_data")
    return "attention" if is_attention else "norms, rotation, elementwise"


def profile_steps(cfg, config, batches):
    """Prints where the time of our steps goes, on a CPU only. The step on the first batch is not measured."""
    with Distributed() as dist:
        if dist.device.type != "cpu":
            return
        bench_run = make_run(cfg, dist, config)
        engine = build_engine(bench_run, build_model(bench_run))
        engine_step, num_steps, spent = engine.step, len(batches) - 1, Counter()

        def named_step():
            with record_function("engine.step"):
                engine_step()

        train_step(bench_run, engine, [batches[0]])
        engine.step = named_step
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            seconds = sum(timed(train_step, bench_run, engine, [samples])[0] for samples in batches[1:]) / num_steps
        for event in profiled.events():
            if event.name.startswith(("aten::", "mkldnn::")):
                spent[operator_group(event, config.vocab_size)] += event.self_cpu_time_total / 1e6 / num_steps
    spent["between operators: Python, DeepSpeed, autograd"] = seconds - sum(spent.values())
    tokens = sum(count_tokens(samples)[0] for samples in batches[1:]) / num_steps
    print(f"our step under the profiler, {tokens:,.0f} tokens in {seconds:.3f} s:")
    for name, share in spent.most_common():
        print(f"  {name:<48} {share:7.3f} s {share / seconds:6.1%}")


def peak_rss(status):
    """The peak memory of a process in bytes (VmHWM), from the text of its /proc/<pid>/status."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
