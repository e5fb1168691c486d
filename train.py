"""Trains a model: one explicit DeepSpeed loop, for pretraining and for fine-tuning.

    python train.py --config configs/train/finetune.toml --task simp --init runs/tiny/stack/m0 \\
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

import settings
from batches import count_tokens, encode_prompts, global_batch, micro_batches
from build import (
    build_engine,
    build_model,
    check_same_data,
    find_weights,
    first_sample,
    load_data,
    prepare,
    samples_to_train,
    task_of,
    text_of,
)
from distributed import Processes, StopRequest
from methods import make_method
from model.checkpoint import write_checkpoint
from model.files import UserError, new_directory
from model.generate import Decoding, generate
from resume import Saving, find_state, load_state, save_state
from runs import (
    StepLog,
    clock,
    continue_run,
    drop_state,
    finish_run,
    history,
    lock,
    partial_directory,
    print_result,
    show,
    start_run,
    watchers,
)
from train_settings import TrainSettings

SPIKE_WINDOW, SPIKE_LEAST = 50, 10  # steps whose mean loss a spike is measured by, and how many there have to be


def learning_rate(s, step, steps):
    """The rate of a step (0 ≤ step < steps): linear warm-up, then constant, cosine, linear or WSD decay to
    min_lr_ratio. WSD (warm-up, stable, decay): Hu et al., arXiv 2404.06395."""
    warm = min(1.0, (step + 1) / (s.warmup_steps + 1))
    done = max(0, step - s.warmup_steps) / max(1, steps - s.warmup_steps)  # share of what follows the warm-up, [0, 1)
    left = {"constant": 1.0,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "wsd": min(1.0, (steps - step) / max(1.0, s.decay_ratio * steps))}[s.lr_scheduler_type]
    return s.learning_rate * warm * (s.min_lr_ratio + (1 - s.min_lr_ratio) * left)


@dataclass
class Progress:
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
                f"left {clock(self.seconds / self.step * (steps - self.step))}")


def main(s):
    """One run, from settings to a finished checkpoint."""
    with StopRequest() as request, Processes(datetime.timedelta(minutes=s.timeout_minutes)) as world:
        run, finished = world.on_main(lambda: prepare(s, world))
        if finished:
            world.say(f"{s.out} is finished already, nothing to do")
            world.on_main(lambda: drop_state(s.out))
            return world.on_main(lambda: print_result(s.out))
        source = world.first_on_node(lambda: find_weights(s))
        past = world.on_main(lambda: history(source)) if s.init else {}
        check_same_data(s, past, world)
        tokenizer, model = build_model(s, source, world)
        data = load_data(s, past, tokenizer, model.config, world)
        engine = build_engine(s, model, world)
        method = make_method(s, engine, source, past, world)
        directory, progress = partial_directory(s.out), Progress(flops=past.get("flops", 0))
        world.on_main(lambda: directory.exists() and lock(directory))
        if state := world.on_main(lambda: find_state(directory, run)):
            progress = Progress(**load_state(engine, state, world))
            world.say(f"going on after step {progress.step}, from {state}")
            run = world.on_main(lambda: continue_run(directory, run, progress.step))
        else:
            world.on_main(lambda: start_run(s.out, run))
        log = StepLog(directory, progress.step, watchers(s, directory, run)) if world.rank == 0 else StepLog(None)

        saving = Saving(s.save_minutes, request, world)
        run["result"] = train(s, engine, method, data, tokenizer, world, log, run, progress, past, saving)
        run["history"] = past | {"flops": run["result"]["flops"]} | \
            ({"tasks": [*past.get("tasks", []), task_of(s)]} if s.task else
             {"text": text_of(s) | {"samples": run["result"]["last_sample"]}})
        run["result"]["examples"] = decode_examples(s, engine.module, data["test"], tokenizer)
        save(engine, directory, tokenizer, world)
        picked = global_batch(s.seed, len(data["train"]), 0, min(s.fisher_samples, len(data["train"])))
        began = time.perf_counter()
        method.write(directory, [data["train"][index] for index in picked],
                     lambda settings, samples: take_step(settings, engine, samples, world))
        run["result"]["seconds_after"] = time.perf_counter() - began  # for the next task's sake
        log.close()
        world.on_main(lambda: finish_run(s.out, directory, run))
        world.on_main(lambda: print_result(s.out))


def train(s, engine, method, data, tokenizer, world, log, run, progress, past, saving):
    """The loop, from where `progress` says on. Returns what run.json says of the result: eval losses, FLOPs, speed, ….

    run: what run.json says so far; past: the `history` of the checkpoint that the run started from.
    """
    size, config, directory = len(data["train"]), engine.module.config, partial_directory(s.out)
    first = first_sample(s, past)
    end = first + samples_to_train(s, config, size, past)
    steps = math.ceil((end - first) / s.global_batch_size)
    if not progress.step:
        progress.eval_loss_before = progress.eval_loss_after = evaluate(s, engine, data["eval"], world)
        log.write(step=0, eval_loss=progress.eval_loss_before, flops=progress.flops)
        world.say(f"eval loss before: {show(progress.eval_loss_before)}")
    saving.check(progress.step, steps, lambda: None)
    for step in range(progress.step, steps):
        began = time.perf_counter()
        start = first + step * s.global_batch_size
        stop = min(start + s.global_batch_size, end)
        indices = global_batch(s.seed, size, start, stop)
        batch = [data["train"][index] for index in indices]
        rate = learning_rate(s, step, steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        limit = progress.limit(s.skip_loss_above)
        method.before_step(step)
        loss, norm, filled = take_step(s, engine, batch, world, limit)
        method.after_step(math.isfinite(norm))
        spike = limit < loss < math.inf
        if not spike and not (math.isfinite(loss) and math.isfinite(norm)):
            world.fail(UserError(stop_message(step + 1, loss, norm, indices, directory)))

        took, (read, _) = time.perf_counter() - began, count_tokens(batch)
        progress.add(read, filled, took, config.flops(read))
        log.write(step=step + 1, loss=loss, lr=rate, grad_norm=None if spike else norm, tokens=progress.tokens,
                  flops=progress.flops, tokens_per_s=read / took, elapsed=progress.seconds,
                  computed=filled / read, **({"skipped_samples": indices} if spike else {}))
        if spike:
            world.say(f"step {step + 1} passed over: its loss {loss:.4f} is above {limit:.4f}; samples {indices}")
        else:
            progress.losses = [*progress.losses, loss][-SPIKE_WINDOW:]
        last = step + 1 == steps
        if last:
            method.finish()
        if (step + 1) % s.logging_steps == 0 or step == 0 or last:
            world.say(progress.line(steps, loss, rate, norm))
        if (step + 1) % s.eval_steps == 0 or last:
            progress.eval_loss_after = evaluate(s, engine, data["eval"], world)
            log.write(step=step + 1, eval_loss=progress.eval_loss_after, flops=progress.flops)
            world.say(f"step {step + 1}/{steps}  eval loss {show(progress.eval_loss_after)}")
        if stop // size > start // size and not last and s.save_total_limit:
            if not world.on_main((directory / f"checkpoint-{step + 1}").exists):  # it is after a step done again
                save(engine, directory / f"checkpoint-{step + 1}", tokenizer, world)
            world.on_main(lambda: prune(directory, s.save_total_limit))
        if not last:
            saving.check(step + 1, steps, lambda: save_state(engine, directory, run, asdict(progress), world))
    return {"eval_loss_before": progress.eval_loss_before, "eval_loss_after": progress.eval_loss_after, "steps": steps,
            "first_sample": first, "last_sample": end, "tokens": progress.tokens, "flops": progress.flops,
            "seconds": progress.seconds, "tokens_per_s": progress.tokens / progress.seconds,
            "computed": progress.slots / progress.tokens, "peak_memory_bytes": peak_memory(world)}


def peak_memory(world):
    """The most memory that this process has held, in bytes: of its GPU, or of the machine."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def take_step(s, engine, samples, world, limit=math.inf):
    """One optimizer step on a global batch. Returns (mean loss, gradient norm before clipping, token places computed).

    Every micro-batch adds the gradient of its summed negative log-likelihood over the target tokens of the whole
    global batch. DeepSpeed averages gradients over the processes, which the factor `world.size` undoes. A loss or
    norm that is not finite, or a loss above `limit`, is returned before the optimizer has changed a weight.
    """
    _, wanted = count_tokens(samples)
    batches = micro_batches(samples, s.micro_batch_tokens, s.micro_step_slots, world.rank, world.size)
    nll, scale = torch.zeros((), device=world.device), world.size / wanted
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        part = engine(*(tensor.to(world.device) for tensor in batch))
        nll += part.detach()
        if last:  # the loss is known before the gradient is whole: one that is not wanted makes it no number
            loss, slots = world.sum(nll, sum(len(prefix) + input_ids.numel() for input_ids, _, prefix in batches))
            loss /= wanted
            scale = scale if loss <= limit and math.isfinite(loss) else math.nan
        engine.backward(part * scale, scale_wrt_gas=False)
    if engine.zero_optimization():
        engine.step()  # passes over the optimizer where the norm is not finite
        if getattr(engine.optimizer, "cpu_offload", False) and not math.isfinite(scale):
            # DeepSpeed's ZeRO-2 keeps the gradients that it has passed over if the optimizer is offloaded
            engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
        return loss, float(engine.get_global_grad_norm()) if math.isfinite(scale) else math.nan, slots
    norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), s.max_grad_norm or math.inf))
    if math.isfinite(norm):
        engine.step()
    else:
        engine.optimizer.zero_grad()
    return loss, norm, slots


@torch.no_grad()
def evaluate(s, engine, data, world):
    """Mean negative log-likelihood of the target tokens of all samples of a split, in nats; None if it is empty."""
    nll, wanted = torch.zeros((), device=world.device), 0
    share, hidden = 64 * world.size, None if world.rank == 0 else True
    cutting = s.micro_batch_tokens, s.micro_step_slots, world.rank, world.size
    for start in tqdm(range(0, len(data), share), "evaluating", leave=False, disable=hidden):
        samples = [data[index] for index in range(start, min(start + share, len(data)))]
        wanted += count_tokens(samples)[1]
        for batch in micro_batches(samples, *cutting):
            nll += engine.module(*(tensor.to(world.device) for tensor in batch))
    return world.sum(nll)[0] / wanted if wanted else None


def decode_examples(s, model, items, tokenizer):
    """The first three test items, decoded greedily: a list of {input, output, prediction}."""
    items = items[:3]
    if not items:
        return []
    prompts = encode_prompts(tokenizer, [item["input"] for item in items], s.max_source_length)
    decoded = generate(model, prompts, Decoding(min(64, s.max_target_length)), tokenizer.eos_ids)
    return [{"input": item["input"], "output": item["output"], "prediction": tokenizer.decode(ids).strip()}
            for item, ids in zip(items, decoded)]


def save(engine, directory, tokenizer, world):
    """Writes the weights as a checkpoint into `directory`, which is made whole or not at all if it is not there.

    Under ZeRO-3 every process takes part, since a tensor is gathered from all of them, one at a time.
    """
    from deepspeed.runtime.zero import GatheredParameters

    def tensors():
        for name, parameter in engine.module.named_parameters():
            with GatheredParameters([parameter], enabled=engine.zero_optimization_partition_weights()):
                yield name, parameter.detach()

    if world.rank == 0:
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
    settings.run((TrainSettings, main), __doc__)
