"""Trains a model: one explicit DeepSpeed loop, for pretraining and for fine-tuning.

    python train.py --config configs/train/finetune.toml --task simp --init runs/tiny/stack/m0 \\
        --data data/prepared/sample/simp.json --out runs/tiny/stack/m1-simp
    torchrun --nproc_per_node 8 train.py …        deepspeed --num_gpus 8 train.py …        (the same flags)

What the two uses differ in is passed in: the samples (a task's, or slices of a text), the weights (read, or new), the
schedule. A step is a function of (seed, step) alone: neither the number of processes nor the size of the micro-batches
changes which samples it sees or what it minimises, the mean negative log-likelihood over all target tokens of the
global batch.
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
from typing import Literal

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
    text_of,
)
from distributed import Processes, weights_dtype
from model.checkpoint import write_checkpoint
from model.files import UserError, new_directory
from model.generate import Decoding, generate
from resume import Saving, find_state, load_state, save_state
from runs import (
    StepLog,
    clock,
    continue_run,
    finish_run,
    history,
    partial_directory,
    print_result,
    show,
    start_run,
    watchers,
)
from settings import setting

SPIKE_WINDOW, SPIKE_LEAST = 50, 10  # steps whose mean loss a spike is measured by, and how many there have to be


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run. The defaults are for fine-tuning, the published runs' values but for the batch."""
    task: str | None = setting(None, "task to fine-tune on (a file in configs/task); none: pretraining on text")
    size: str | None = setting(None, "size preset (a file in configs/size): the shape of new weights, and the recipe")
    phase: Literal["base", "stack", "llm", "finetune"] | None = setting(None, "which table of the size's file to read")
    init: str | None = setting(None, "checkpoint to start from, a directory or a Hub id; none: new weights")
    num_hidden_layers: int | None = setting(None, "layers of new weights, if not the size's: a base that grows later")
    data: str | None = setting(None, "preprocessed task file, or directory of token shards")
    out: str | None = setting(None, "directory of the run")
    seed: int = setting(42, "seed of new weights and of the order of the samples")
    # the batch
    global_batch_size: int = setting(32, "samples in a step, over all processes")
    micro_batch_tokens: int = setting(4096, "most padded tokens in a micro-batch; changes speed and memory, no number")
    micro_step_slots: int = setting(32, "the padding that one more micro-batch has to save; changes no number")
    seq_length: int = setting(1024, "tokens in a pretraining sample")
    max_source_length: int = setting(1024, "most tokens of a prompt, <bos> included")
    max_target_length: int = setting(256, "most tokens of a target, <eos> included")
    train_on_source: bool = setting(False, "let the loss fall on the prompt as well")
    # how long
    num_train_epochs: float = setting(3.0, "passes over the data")
    max_steps: int | None = setting(None, "steps, in place of the epochs")
    max_tokens: int | None = setting(None, "tokens to pretrain on, in place of the epochs")
    max_flops: float | None = setting(None, "FLOPs to pretrain for, those spent on --init before included")
    max_train_samples: int | None = setting(None, "use only the first N training samples")
    max_eval_samples: int | None = setting(None, "use only the first N evaluation samples")
    skip_samples: int | None = setting(None, "start this many samples into the stream; none: in pretraining where the "
                                             "run that made --init stopped, otherwise 0")
    # the optimizer
    learning_rate: float = setting(2e-5, "peak learning rate")
    lr_scheduler_type: Literal["constant", "cosine", "linear", "wsd"] = setting("constant", "rate after the warm-up")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    min_lr_ratio: float = setting(0.0, "last learning rate, as a share of the peak")
    decay_ratio: float = setting(0.2, "share of the steps in which wsd decays")
    weight_decay: float = setting(0.0, "decoupled weight decay of the matrices; norms and biases have none")
    adam_beta1: float = setting(0.9, "decay rate of the first moment")
    adam_beta2: float = setting(0.999, "decay rate of the second moment")
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment")
    max_grad_norm: float = setting(0.3, "clip the gradient to this norm; 0: do not")
    skip_loss_above: float | None = setting(None, "pass over a batch whose loss is above this many times the mean of "
                                                  "the last 50 steps'")
    # how it is computed
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 where the hardware multiplies it")
    zero: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage; none: 0 for one process in fp32, otherwise 1")
    offload: bool = setting(False, "keep the optimizer, with ZeRO-3 the weights as well, in the memory of the host")
    deepspeed: str | None = setting(None, "DeepSpeed file to use in place of the stage's in configs/deepspeed")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, 1/3 more work")
    local_rank: int | None = setting(None, "set by the deepspeed launcher")
    # what is written
    eval_steps: int = setting(300, "evaluate every N steps; before the first and after the last in any case")
    logging_steps: int = setting(10, "print every N steps; metrics.jsonl has every one")
    save_total_limit: int = setting(1, "epochs' checkpoints to keep beside the final weights")
    save_minutes: float = setting(15.0, "minutes after which the state is saved, to resume from; 0: after every step")
    timeout_minutes: float = setting(30.0, "minutes that a process waits for the others before it gives up")
    tensorboard: bool = setting(False, "write the log for TensorBoard as well (needs the package tensorboard)")
    wandb: str | None = setting(None, "project of Weights & Biases to log to as well (needs the package wandb)")

    def problems(self):
        """What contradicts what, as sentences."""
        found = [f"--{name} is missing" for name in ("data", "out") if getattr(self, name) is None]
        if self.task is not None:
            found += settings.unknown_name("task", self.task)
        if self.init is None and self.size is None:
            found.append("neither --init nor --size says which model to train")
        if self.task is not None and self.init is None:
            found.append("fine-tuning needs a checkpoint to start from: give --init")
        lengths = [name for name in ("max_steps", "max_tokens", "max_flops") if getattr(self, name) is not None]
        if len(lengths) > 1:
            found.append(f"{' and '.join(lengths)} each say how long to train: give one, and none for the other")
        if self.max_tokens is not None and self.max_tokens < self.seq_length:
            found.append(f"max_tokens is {self.max_tokens}, less than one sample of seq_length {self.seq_length}")
        if self.task is not None and set(lengths) - {"max_steps"}:
            found.append(f"{lengths[-1]} is for pretraining; for fine-tuning give num_train_epochs or max_steps")
        if self.init is not None and self.num_hidden_layers is not None:
            found.append("num_hidden_layers is for new weights, but --init gives weights: stack.py makes them deeper")
        found += [f"{name} is {getattr(self, name)}, expected at least {least}" for name, least in
                  (("global_batch_size", 1), ("micro_batch_tokens", 1), ("seq_length", 2), ("max_source_length", 16),
                   ("max_target_length", 2), ("max_steps", 1), ("max_tokens", 1), ("max_train_samples", 1),
                   ("max_eval_samples", 1), ("eval_steps", 1), ("logging_steps", 1), ("warmup_steps", 0),
                   ("skip_samples", 0), ("save_total_limit", 0), ("weight_decay", 0), ("max_grad_norm", 0), ("seed", 0),
                   ("micro_step_slots", 0), ("num_hidden_layers", 1), ("save_minutes", 0))
                  if getattr(self, name) is not None and not getattr(self, name) >= least]
        found += [f"{name} is {getattr(self, name)}, expected a number above 0"
                  for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "max_flops", "timeout_minutes",
                               "skip_loss_above")
                  if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf]
        found += [f"{name} is {getattr(self, name)}, expected a number from 0 to 1"
                  for name in ("min_lr_ratio", "decay_ratio") if not 0 <= getattr(self, name) <= 1]
        found += [f"{name} is {getattr(self, name)}, expected a number from 0 to below 1"
                  for name in ("adam_beta1", "adam_beta2") if not 0 <= getattr(self, name) < 1]
        if self.offload and not (self.zero or 0) >= 2:
            found.append("--offload needs --zero 2 or 3")
        if self.zero == 0 and self.dtype in ("bf16", "auto") and weights_dtype(self) == "bf16":
            found.append("ZeRO 0 keeps no fp32 master weights of a bf16 model: use --zero 1 or more")
        return found


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
    slots: int = 0  # the same with padding
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
                f"{self.tokens / self.seconds:9,.0f} tokens/s  padding {1 - self.tokens / self.slots:5.1%}  "
                f"left {clock(self.seconds / self.step * (steps - self.step))}")


def main(s):
    """One run, from settings to a finished checkpoint."""
    with Processes(datetime.timedelta(minutes=s.timeout_minutes)) as world:
        run, finished = world.on_main(lambda: prepare(s, world))
        if finished:
            world.say(f"{s.out} is finished already, nothing to do")
            return world.on_main(lambda: print_result(s.out))
        check_same_data(s, world)
        source = world.first_on_node(lambda: find_weights(s))
        past = history(source) if s.init else {}
        tokenizer, model = build_model(s, source, world)
        data = load_data(s, tokenizer, model.config, world)
        engine = build_engine(s, model, world)
        directory, progress = partial_directory(s.out), Progress(flops=past.get("flops", 0))
        if state := world.on_main(lambda: find_state(directory, run)):
            progress = Progress(**load_state(engine, state, world))
            world.say(f"going on after step {progress.step}, from {state}")
            run = world.on_main(lambda: continue_run(directory, run, progress.step))
        else:
            world.on_main(lambda: start_run(s.out, run))
        log = StepLog(directory, progress.step, watchers(s, directory, run)) if world.rank == 0 else StepLog(None)

        run["result"] = train(s, engine, data, tokenizer, world, log, run, progress, past)
        run["history"] = past | {"flops": run["result"]["flops"]} | \
            ({} if s.task else {"text": text_of(s) | {"samples": run["result"]["last_sample"]}})
        run["result"]["examples"] = decode_examples(s, engine.module, data["test"], tokenizer)
        save(engine, directory, tokenizer, world)
        log.close()
        world.on_main(lambda: finish_run(s.out, directory, run))
        world.on_main(lambda: print_result(s.out))


def train(s, engine, data, tokenizer, world, log, run, progress, past):
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
    with Saving(s.save_minutes, world) as saving:
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
            loss, norm, filled = take_step(s, engine, batch, world, limit)
            spike = limit < loss < math.inf
            if not spike and not (math.isfinite(loss) and math.isfinite(norm)):
                world.fail(UserError(stop_message(step + 1, loss, norm, indices, directory)))

            took, (read, _) = time.perf_counter() - began, count_tokens(batch)
            progress.add(read, filled, took, config.flops(read))
            log.write(step=step + 1, loss=loss, lr=rate, grad_norm=None if spike else norm, tokens=progress.tokens,
                      flops=progress.flops, tokens_per_s=read / took, elapsed=progress.seconds,
                      padding=1 - read / filled, **({"skipped_samples": indices} if spike else {}))
            if spike:
                world.say(f"step {step + 1} passed over: its loss {loss:.4f} is above {limit:.4f}; samples {indices}")
            else:
                progress.losses = [*progress.losses, loss][-SPIKE_WINDOW:]
            last = step + 1 == steps
            if (step + 1) % s.logging_steps == 0 or step == 0 or last:
                world.say(progress.line(steps, loss, rate, norm))
            if (step + 1) % s.eval_steps == 0 or last:
                progress.eval_loss_after = evaluate(s, engine, data["eval"], world)
                log.write(step=step + 1, eval_loss=progress.eval_loss_after, flops=progress.flops)
                world.say(f"step {step + 1}/{steps}  eval loss {show(progress.eval_loss_after)}")
            if stop // size > start // size and not last and s.save_total_limit:
                save(engine, directory / f"checkpoint-{step + 1}", tokenizer, world)
                world.on_main(lambda: prune(directory, s.save_total_limit))
            if not last:
                saving.after_step(step + 1, steps, lambda: save_state(engine, directory, run, asdict(progress), world))
    return {"eval_loss_before": progress.eval_loss_before, "eval_loss_after": progress.eval_loss_after, "steps": steps,
            "first_sample": first, "last_sample": end, "tokens": progress.tokens, "flops": progress.flops,
            "seconds": progress.seconds, "tokens_per_s": progress.tokens / progress.seconds,
            "padding": 1 - progress.tokens / progress.slots, "peak_memory_bytes": peak_memory(world)}


def peak_memory(world):
    """The most memory that this process has held, in bytes: of its GPU, or of the machine."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def take_step(s, engine, samples, world, limit=math.inf):
    """One optimizer step on a global batch. Returns (mean loss, gradient norm before clipping, padded token slots).

    Every micro-batch adds the gradient of its summed negative log-likelihood over the target tokens of the whole
    global batch. DeepSpeed averages gradients over the processes, which the factor `world.size` undoes. A loss or
    norm that is not finite, or a loss above `limit`, is returned before the optimizer has changed a weight.
    """
    _, wanted = count_tokens(samples)
    batches = micro_batches(samples, s.micro_batch_tokens, s.micro_step_slots, world.rank, world.size)
    nll, scale = torch.zeros((), device=world.device), world.size / wanted
    for index, (input_ids, targets) in enumerate(batches):
        last = index == len(batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        part = engine(input_ids.to(world.device), targets.to(world.device))
        nll += part.detach()
        if last:  # the loss is known before the gradient is whole: one that is not wanted makes it no number
            loss, slots = world.sum(nll, sum(input_ids.numel() for input_ids, _ in batches))
            loss /= wanted
            scale = scale if loss <= limit and math.isfinite(loss) else math.nan
        engine.backward(part * scale, scale_wrt_gas=False)
    if engine.zero_optimization():
        engine.step()  # passes over the optimizer where the norm is not finite
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
        for input_ids, targets in micro_batches(samples, *cutting):
            nll += engine.module(input_ids.to(world.device), targets.to(world.device))
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
