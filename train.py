"""Trains a model: one explicit DeepSpeed loop, for pretraining and for fine-tuning.

    python train.py --config configs/train/finetune.toml --task simp --init runs/tiny/stack/m0 \
        --data data/prepared/sample/simp.json --out runs/tiny/stack/m1-simp
    torchrun --nproc_per_node 8 train.py …        deepspeed --num_gpus 8 train.py …        (the same flags)

What the two uses differ in is passed in: the samples (a task's, or slices of a text), the weights (read, or new), the
schedule. What is done against forgetting is a method (methods.py). A step is a function of (seed, step) alone: neither
the number of processes nor the size of the micro-batches changes which samples it sees or what it minimises, the mean
negative log-likelihood over all target tokens of the global batch.
"""
import contextlib
import dataclasses
import datetime
import math
import resource
import shutil
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from common import settings
from common.distributed import Distributed, StopRequest
from common.files import UserError, new_directory
from common.formatting import format_duration, show
from common.metrics_log import StepLog, watchers
from common.provenance import lineage
from corpus.tasks import encode_prompts
from model.checkpoint import write_checkpoint
from model.generation import GenerationConfig, generate
from training.batches import count_tokens, global_batch, make_microbatches
from training.data import check_same_data, first_sample, load_data, samples_to_train, task_of, text_of
from training.engine import build_engine, build_model
from training.methods import make_method
from training.resume import Saving, find_state, load_state, save_state
from training.run import find_weights, prepare
from training.run_directory import (
    continue_run,
    drop_state,
    finish_run,
    lock,
    partial_directory,
    print_result,
    start_run,
)
from training.train_config import TrainConfig

SPIKE_WINDOW, SPIKE_LEAST = 50, 10  # steps whose mean loss a spike is measured by, and how many there have to be


def learning_rate(cfg, step, steps):
    """The rate of a step (0 ≤ step < steps): linear warm-up, then constant, cosine, linear or WSD decay to
    min_lr_ratio. WSD (warm-up, stable, decay): Hu et al., arXiv 2404.06395."""
    warm = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    done = max(0, step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)  # share of what follows the warm-up, [0, 1)
    left = {"constant": 1.0,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "wsd": min(1.0, (steps - step) / max(1.0, cfg.decay_ratio * steps))}[cfg.lr_scheduler_type]
    return cfg.learning_rate * warm * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


@dataclass
class TrainState:
    """How far a run has come: the counters of the loop, saved with its state."""
    step: int = 0
    tokens: int = 0  # read in training
    slots: int = 0  # token places that went through the model: with padding, a prefix once for all that share it
    seconds: float = 0.0
    flops: float = 0.0  # those on the checkpoint that the run started from included
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    losses: list = dataclasses.field(default_factory=list)  # of the last steps, spikes left out

    def add(self, tokens, slots, seconds, flops):
        """Counts a step."""
        self.step, self.tokens, self.slots = self.step + 1, self.tokens + tokens, self.slots + slots
        self.seconds, self.flops = self.seconds + seconds, self.flops + flops

    def limit(self, ratio):
        """The loss above which a batch is passed over, for a ratio to the mean of the last steps."""
        return ratio * statistics.fmean(self.losses) if ratio and len(self.losses) >= SPIKE_LEAST else math.inf

    def line(self, steps, loss, rate, norm):
        """What is printed of a step."""
        return (f"step {self.step:>{len(str(steps))}}/{steps}  loss {loss:7.4f}  lr {rate:.2e}  norm {norm:7.3f}  "
                f"{self.tokens / self.seconds:9,.0f} tokens/s  computed {self.slots / self.tokens:4.0%}  "
                f"left {format_duration(self.seconds / self.step * (steps - self.step))}")


def main(cfg):
    """One run, from settings to a finished checkpoint."""
    with StopRequest() as request, Distributed(datetime.timedelta(minutes=cfg.timeout_minutes)) as dist:
        run, finished = dist.on_rank0(lambda: prepare(cfg, dist))
        if finished:
            dist.print0(f"{cfg.out} is finished already, nothing to do")
            dist.on_rank0(lambda: drop_state(cfg.out))
            return dist.on_rank0(lambda: print_result(cfg.out))
        source = dist.local_rank0_first(lambda: find_weights(cfg))
        past = dist.on_rank0(lambda: lineage(source)) if cfg.init else {}
        check_same_data(cfg, past, dist)
        tokenizer, model = build_model(cfg, source, dist)
        data = load_data(cfg, past, tokenizer, model.config, dist)
        engine = build_engine(cfg, model, dist)
        method = make_method(cfg, engine, source, past, dist)
        directory, progress = partial_directory(cfg.out), TrainState(flops=past.get("flops", 0))
        dist.on_rank0(lambda: directory.exists() and lock(directory))
        if state := dist.on_rank0(lambda: find_state(directory, run)):
            progress = TrainState(**load_state(engine, state, dist))
            dist.print0(f"going on after step {progress.step}, from {state}")
            run = dist.on_rank0(lambda: continue_run(directory, run, progress.step))
        else:
            dist.on_rank0(lambda: start_run(cfg.out, run))
        log = StepLog(directory, progress.step, watchers(cfg, directory, run)) if dist.rank == 0 else StepLog(None)

        saving = Saving(cfg.save_minutes, request, dist)
        run["result"] = train(cfg, engine, method, data, tokenizer, dist, log, run, progress, past, saving)
        run["lineage"] = past | {"flops": run["result"]["flops"]} | \
            ({"tasks": [*past.get("tasks", []), task_of(cfg)]} if cfg.task else
             {"text": text_of(cfg) | {"samples": run["result"]["last_sample"]}})
        run["result"]["examples"] = decode_examples(cfg, engine.module, data["test"], tokenizer)
        save(engine, directory, tokenizer, dist)
        picked = global_batch(cfg.seed, len(data["train"]), 0, min(cfg.fisher_samples, len(data["train"])))
        began = time.perf_counter()
        method.write(directory, [data["train"][index] for index in picked],
                     lambda settings, samples: train_step(settings, engine, samples, dist))
        run["result"]["seconds_after"] = time.perf_counter() - began  # for the next task's sake
        log.close()
        dist.on_rank0(lambda: finish_run(cfg.out, directory, run))
        dist.on_rank0(lambda: print_result(cfg.out))


def train(cfg, engine, method, data, tokenizer, dist, log, run, progress, past, saving):
    """The loop, from where `progress` says on. Returns what run.json says of the result: eval losses, FLOPs, speed, ….

    run: what run.json says so far; past: the `lineage` of the checkpoint that the run started from.
    """
    size, config, directory = len(data["train"]), engine.module.config, partial_directory(cfg.out)
    first = first_sample(cfg, past)
    end = first + samples_to_train(cfg, config, size, past)
    steps = math.ceil((end - first) / cfg.global_batch_size)
    if not progress.step:
        progress.eval_loss_before = progress.eval_loss_after = evaluate(cfg, engine, data["eval"], dist)
        log.write(step=0, eval_loss=progress.eval_loss_before, flops=progress.flops)
        dist.print0(f"eval loss before: {show(progress.eval_loss_before)}")
    saving.check(progress.step, steps, lambda: None)
    for step in range(progress.step, steps):
        began = time.perf_counter()
        start = first + step * cfg.global_batch_size
        stop = min(start + cfg.global_batch_size, end)
        indices = global_batch(cfg.seed, size, start, stop)
        batch = [data["train"][index] for index in indices]
        rate = learning_rate(cfg, step, steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        limit = progress.limit(cfg.skip_loss_above)
        method.before_step(step)
        loss, norm, filled = train_step(cfg, engine, batch, dist, limit)
        method.after_step(math.isfinite(norm))
        spike = limit < loss < math.inf
        if not spike and not (math.isfinite(loss) and math.isfinite(norm)):
            dist.fail(UserError(stop_message(step + 1, loss, norm, indices, directory)))

        took, (read, _) = time.perf_counter() - began, count_tokens(batch)
        progress.add(read, filled, took, config.flops(read))
        log.write(step=step + 1, loss=loss, lr=rate, grad_norm=None if spike else norm, tokens=progress.tokens,
                  flops=progress.flops, tokens_per_s=read / took, elapsed=progress.seconds,
                  computed=filled / read, **({"skipped_samples": indices} if spike else {}))
        if spike:
            dist.print0(f"step {step + 1} passed over: its loss {loss:.4f} is above {limit:.4f}; samples {indices}")
        else:
            progress.losses = [*progress.losses, loss][-SPIKE_WINDOW:]
        last = step + 1 == steps
        if last:
            method.finish()
        if (step + 1) % cfg.logging_steps == 0 or step == 0 or last:
            dist.print0(progress.line(steps, loss, rate, norm))
        if (step + 1) % cfg.eval_steps == 0 or last:
            progress.eval_loss_after = evaluate(cfg, engine, data["eval"], dist)
            log.write(step=step + 1, eval_loss=progress.eval_loss_after, flops=progress.flops)
            dist.print0(f"step {step + 1}/{steps}  eval loss {show(progress.eval_loss_after)}")
        if stop // size > start // size and not last and cfg.save_total_limit:
            if not dist.on_rank0((directory / f"checkpoint-{step + 1}").exists):  # it is after a step done again
                save(engine, directory / f"checkpoint-{step + 1}", tokenizer, dist)
            dist.on_rank0(lambda: prune(directory, cfg.save_total_limit))
        if not last:
            saving.check(step + 1, steps, lambda: save_state(engine, directory, run, asdict(progress), dist))
    return {"eval_loss_before": progress.eval_loss_before, "eval_loss_after": progress.eval_loss_after, "steps": steps,
            "first_sample": first, "last_sample": end, "tokens": progress.tokens, "flops": progress.flops,
            "seconds": progress.seconds, "tokens_per_s": progress.tokens / progress.seconds,
            "computed": progress.slots / progress.tokens, "peak_memory_bytes": peak_memory(dist)}


def peak_memory(dist):
    """The most memory that this process has held, in bytes: of its GPU, or of the machine."""
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def train_step(cfg, engine, samples, dist, limit=math.inf):
    """One optimizer step on a global batch. Returns (mean loss, gradient norm before clipping, token places computed).

    Every micro-batch adds the gradient of its summed negative log-likelihood over the target tokens of the whole
    global batch. DeepSpeed averages gradients over the processes, which the factor `dist.world_size` undoes. A loss or
    norm that is not finite, or a loss above `limit`, is returned before the optimizer has changed a weight.
    """
    _, wanted = count_tokens(samples)
    batches = make_microbatches(samples, cfg.max_tokens_per_microbatch, cfg.microbatch_overhead_tokens, dist.rank, dist.world_size)
    nll, scale = torch.zeros((), device=dist.device), dist.world_size / wanted
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        part = engine(*(tensor.to(dist.device) for tensor in batch))
        nll += part.detach()
        if last:  # the loss is known before the gradient is whole: one that is not wanted makes it no number
            loss, slots = dist.all_reduce_sum(nll, sum(len(prefix) + input_ids.numel() for input_ids, _, prefix in batches))
            loss /= wanted
            scale = scale if loss <= limit and math.isfinite(loss) else math.nan
        engine.backward(part * scale, scale_wrt_gas=False)
    if engine.zero_optimization():
        engine.step()  # passes over the optimizer where the norm is not finite
        if getattr(engine.optimizer, "cpu_offload", False) and not math.isfinite(scale):
            # DeepSpeed's ZeRO-2 keeps the gradients that it has passed over if the optimizer is offloaded
            engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
        return loss, float(engine.get_global_grad_norm()) if math.isfinite(scale) else math.nan, slots
    norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), cfg.max_grad_norm or math.inf))
    if math.isfinite(norm):
        engine.step()
    else:
        engine.optimizer.zero_grad()
    return loss, norm, slots


@torch.no_grad()
def evaluate(cfg, engine, data, dist):
    """Mean negative log-likelihood of the target tokens of all samples of a split, in nats; None if it is empty."""
    nll, wanted = torch.zeros((), device=dist.device), 0
    share, hidden = 64 * dist.world_size, None if dist.rank == 0 else True
    cutting = cfg.max_tokens_per_microbatch, cfg.microbatch_overhead_tokens, dist.rank, dist.world_size
    for start in tqdm(range(0, len(data), share), "evaluating", leave=False, disable=hidden):
        samples = [data[index] for index in range(start, min(start + share, len(data)))]
        wanted += count_tokens(samples)[1]
        for batch in make_microbatches(samples, *cutting):
            nll += engine.module(*(tensor.to(dist.device) for tensor in batch))
    return dist.all_reduce_sum(nll)[0] / wanted if wanted else None


def decode_examples(cfg, model, items, tokenizer):
    """The first three test items, decoded greedily: a list of {input, output, prediction}."""
    items = items[:3]
    if not items:
        return []
    prompts = encode_prompts(tokenizer, [item["input"] for item in items], cfg.max_source_length)
    decoded = generate(model, prompts, GenerationConfig(min(64, cfg.max_target_length)), tokenizer.eos_ids)
    return [{"input": item["input"], "output": item["output"], "prediction": tokenizer.decode(ids).strip()}
            for item, ids in zip(items, decoded)]


def save(engine, directory, tokenizer, dist):
    """Writes the weights as a checkpoint into `directory`, which is made whole or not at all if it is not there.

    Under ZeRO-3 every process takes part, since a tensor is gathered from all of them, one at a time.
    """
    from deepspeed.runtime.zero import GatheredParameters

    def tensors():
        for name, parameter in engine.module.named_parameters():
            with GatheredParameters([parameter], enabled=engine.zero_optimization_partition_weights()):
                yield name, parameter.detach()

    if dist.rank == 0:
        with contextlib.nullcontext(directory) if directory.exists() else new_directory(directory) as folder:
            write_checkpoint(folder, engine.module.config, tensors(), tokenizer.directory)
    else:
        for _ in tensors():
            pass


def prune(directory, limit):
    """Removes the oldest epochs' checkpoints beyond the limit."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    for path in found[:max(0, len(found) - limit)]:
        shutil.rmtree(path)


def stop_message(step, loss, norm, indices, directory):
    """What to say when the loss or the gradient's norm is not finite."""
    kept = sorted(directory.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    return (f"step {step} was stopped before the optimizer: loss {loss}, gradient norm {norm}; samples {indices}; "
            f"last good checkpoint: {kept[-1] if kept else 'the one that the run started from'}. "
            "Try a lower learning_rate, more warmup_steps or dtype fp32")


if __name__ == "__main__":
    settings.run((TrainConfig, main), __doc__)
