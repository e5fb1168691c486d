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
import math
import os
import resource
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import settings
from batches import (TaskData, TokenShards, count_tokens, data_digest, encode_prompts, global_batch, micro_batches,
                     read_task)
from distributed import Processes
from model.checkpoint import Weights, check_vocabulary, checkpoint_digest, load_model, locate, write_checkpoint
from model.config import ModelConfig
from model.files import UserError, new_directory, read_json
from model.generate import greedy
from model.tokenizer import Tokenizer, same_tokenizer
from model.transformer import Transformer
from runs import StepLog, clock, describe, finish_run, history, is_finished, print_result, show, start_run
from settings import CONFIGS, read_config, setting


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
    # how it is computed
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 where the hardware multiplies it")
    zero: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage; none: 0 for one process in fp32, otherwise 1")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, 1/3 more work")
    local_rank: int | None = setting(None, "set by the deepspeed launcher")
    # what is written
    eval_steps: int = setting(300, "evaluate every N steps; before the first and after the last in any case")
    logging_steps: int = setting(10, "print every N steps; metrics.jsonl has every one")
    save_total_limit: int = setting(1, "epochs' checkpoints to keep beside the final weights")

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
                   ("micro_step_slots", 0), ("num_hidden_layers", 1))
                  if getattr(self, name) is not None and not getattr(self, name) >= least]
        found += [f"{name} is {getattr(self, name)}, expected a number above 0"
                  for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "max_flops")
                  if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf]
        found += [f"{name} is {getattr(self, name)}, expected a number from 0 to 1"
                  for name in ("min_lr_ratio", "decay_ratio") if not 0 <= getattr(self, name) <= 1]
        found += [f"{name} is {getattr(self, name)}, expected a number from 0 to below 1"
                  for name in ("adam_beta1", "adam_beta2") if not 0 <= getattr(self, name) < 1]
        if self.zero == 0 and self.dtype in ("bf16", "auto") and weights_dtype(self) == "bf16":
            found.append("ZeRO 0 keeps no fp32 master weights of a bf16 model: use --zero 1 or more")
        return found


DEFAULTS = dataclasses.asdict(TrainSettings())


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


def main(s):
    """One run, from settings to a finished checkpoint."""
    with Processes() as world:
        run, finished = world.on_main(lambda: prepare(s, world))
        if finished:
            world.say(f"{s.out} is finished already, nothing to do")
            return world.on_main(lambda: print_result(s.out))
        source = world.first_on_node(lambda: find_weights(s))
        past = history(source) if s.init else {}
        tokenizer, model = build_model(s, source, world.device)
        data = load_data(s, tokenizer, model.config, world)
        engine = build_engine(s, model, world)
        directory = world.on_main(lambda: start_run(s.out, run))
        log = StepLog(directory if world.rank == 0 else None)

        run["result"] = train(s, engine, data, tokenizer, world, log, directory, past)
        run["history"] = past | {"flops": run["result"]["flops"]} | \
            ({} if s.task else {"text": text_of(s) | {"samples": run["result"]["last_sample"]}})
        run["result"]["examples"] = decode_examples(s, engine.module, data["test"], tokenizer)
        save(engine, directory, tokenizer, world)
        world.on_main(lambda: finish_run(s.out, directory, run))
        world.on_main(lambda: print_result(s.out))


def prepare(s, world):
    """Rank 0's work before anything is loaded: checks data and weights.

    Returns what run.json will say of the run, and whether it was finished before.
    """
    data = Path(s.data)
    if not (data.is_file() if s.task else (data / "meta.json").is_file()):
        expected = "a preprocessed task file" if s.task else "a directory of token shards with a meta.json"
        raise UserError(f"{s.data} does not exist or is not {expected}: make it with data_prep.py, or `make data`")
    resolved = dataclasses.asdict(s) | {"dtype": weights_dtype(s), "zero": zero_stage(s, world)}
    facts = {"processes": world.size, "device": world.device.type}
    if Path(s.out).exists() and s.init and not Path(s.init).is_dir():  # a finished stage outlives what it came from
        parent = read_json(Path(s.out) / "run.json").get("parent_digest")
        return None, is_finished(s.out, describe(resolved, parent, data_digest(s.data)), DEFAULTS)
    if s.task and (dropped := read_task(s.data)[1]):
        more = f" and {len(dropped) - 20} more" if len(dropped) > 20 else ""
        print(f"{s.data}: {len(dropped)} samples have no target and are left out: {', '.join(dropped[:20])}{more}")
    source = find_weights(s)
    config = ModelConfig.read(source / "config.json") if s.init else new_config(s, Tokenizer(source))
    check_vocabulary(source, config)
    if s.init:
        Weights(source).check(config)
    if s.task and Tokenizer(source).eos_id is None:
        raise UserError(f"{source} names no end-of-text token: add eos_token_id to its config.json")
    if not s.task and not same_tokenizer(source, data):
        raise UserError(f"{s.data} was made with another tokenizer than that of {s.init}: make it anew with "
                        f"data_prep.py text --tokenizer {s.init}")
    longest = s.max_source_length + s.max_target_length if s.task else s.seq_length
    if longest > config.max_position_embeddings:
        names = "max_source_length + max_target_length" if s.task else "seq_length"
        raise UserError(f"{names} is {longest}, more than the model's max_position_embeddings "
                        f"{config.max_position_embeddings}: lower it")
    past = history(source) if s.init else {}
    if s.max_flops and not samples_to_train(s, config, 0, past):
        raise UserError(f"max_flops is {s.max_flops:.4g}, but one step costs "
                        f"{config.flops(s.global_batch_size * s.seq_length):.4g} and what was spent on --init before "
                        f"{past.get('flops', 0):.4g}: raise it")
    if not s.task and s.skip_samples is None and "text" in past and not first_sample(s, past):
        print(f"{s.init} was trained on another text, or on this one in other samples (seed, seq_length): starting at "
              "the first sample")
    run = describe(resolved, checkpoint_digest(source) if s.init else None, data_digest(s.data), **facts)
    return run, is_finished(s.out, run, DEFAULTS)


def find_weights(s):
    """The directory that weights and tokenizer come from, downloaded and converted to safetensors where needed."""
    if not s.init:
        return Path(s.data)  # new weights: only the tokenizer, which lies beside the text
    source = locate(s.init)
    Weights(source)
    return source


def text_of(s):
    """What tells the stream of pretraining samples: places in it mean the same only where all of this is equal."""
    return {"data_digest": data_digest(s.data), "seed": s.seed, "seq_length": s.seq_length,
            "max_train_samples": s.max_train_samples}


def first_sample(s, past):
    """The place in the stream of samples where the run starts: in pretraining behind what its checkpoint has seen."""
    text = past.get("text", {})
    if s.skip_samples is not None or s.task or {**text_of(s), "samples": text.get("samples")} != text:
        return s.skip_samples or 0
    return text["samples"]


def samples_to_train(s, config, size, past):
    """How many samples the run takes from the stream, of a split of `size`."""
    if s.max_steps:
        return s.max_steps * s.global_batch_size
    if s.max_tokens:
        return s.max_tokens // s.seq_length
    if s.max_flops:  # whole batches
        steps = (s.max_flops - past.get("flops", 0)) // config.flops(s.global_batch_size * s.seq_length)
        return max(0, int(steps)) * s.global_batch_size
    return max(1, round(s.num_train_epochs * size))


def new_config(s, tokenizer):
    """The shape of new weights: the size's, with the number of layers that was asked for."""
    tables = read_config("size", s.size)
    if "model" not in tables:
        raise UserError(f"the size {s.size} has no recipe: it starts from published weights, give --init")
    depth = {} if s.num_hidden_layers is None else {"num_hidden_layers": s.num_hidden_layers}
    return ModelConfig(**tables["model"] | depth, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)


def build_model(s, source, device):
    """The tokenizer and the model, on `device` and in the dtype of the run."""
    tokenizer, dtype = Tokenizer(source), torch.bfloat16 if weights_dtype(s) == "bf16" else torch.float32
    if s.init:
        model = load_model(source, dtype, device)
    else:
        model = Transformer(new_config(s, tokenizer))
        model.init_weights(s.seed)
        model.to(device=device, dtype=dtype)
    model.model.gradient_checkpointing = s.gradient_checkpointing
    return tokenizer, model.train()


def zero_stage(s, world):
    """The ZeRO stage of the run: as set, or the cheapest one that its dtype and processes allow."""
    return s.zero if s.zero is not None else 0 if world.size == 1 and weights_dtype(s) == "fp32" else 1


def weights_dtype(s):
    """"bf16" or "fp32"; auto is bf16 where the hardware multiplies bf16 matrices."""
    if s.dtype != "auto":
        return s.dtype
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16") else "fp32"


def load_data(s, tokenizer, config, world):
    """The samples: {"train", "eval"} to index, and for a task {"test"}, its raw items."""
    if s.task:
        splits, _ = read_task(s.data)
        lengths = s.max_source_length, s.max_target_length
        data = {"train": TaskData(splits["train"][:s.max_train_samples], tokenizer, *lengths, s.train_on_source),
                "eval": TaskData(splits["eval"][:s.max_eval_samples], tokenizer, *lengths),
                "test": splits["test"]}
    else:
        data = {"train": TokenShards(s.data, "train", s.seq_length, s.max_train_samples),
                "eval": TokenShards(s.data, "val", s.seq_length, s.max_eval_samples), "test": []}
    world.say(f"model: {config.num_parameters:,} parameters, {config.num_hidden_layers} layers, "
              f"{weights_dtype(s)} on {world.size} × {world.device.type}; "
              f"{len(data['train']):,} training samples, {len(data['eval']):,} to evaluate on")
    return data


def build_engine(s, model, world):
    """The DeepSpeed engine: AdamW on two groups, since only matrices decay, under the ZeRO stage of the run.

    Master weights, moments and accumulated gradients are fp32. DeepSpeed's own schedule and loss scaling by
    accumulation steps are not used: the loop below sets the rate and the weight of each micro-batch.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed
    deepspeed.utils.logger.setLevel("ERROR")
    if world.device.type == "cpu":
        # DeepSpeed would compile a C++ library for reductions in shared memory; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, s.learning_rate, (s.adam_beta1, s.adam_beta2), s.adam_epsilon, fused=True)
    zero = zero_stage(s, world)
    config = read_json(CONFIGS / "deepspeed" / f"zero{zero}.json") | {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,  # the loop decides, see take_step()
        "gradient_clipping": s.max_grad_norm if zero else 0.0,  # without ZeRO the loop clips itself
        "bf16": {"enabled": weights_dtype(s) == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
    }
    with contextlib.redirect_stdout(None):  # one of its optimizers prints a page about memory
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(s, engine, data, tokenizer, world, log, directory, past):
    """The loop. Returns what run.json says of the result: eval losses, FLOPs, speed, padding, memory.

    past: the `history` of the checkpoint that the run starts from.
    """
    size, config = len(data["train"]), engine.module.config
    first = first_sample(s, past)
    end = first + samples_to_train(s, config, size, past)
    steps = math.ceil((end - first) / s.global_batch_size)
    tokens, slots, seconds, spent = 0, 0, 0.0, past.get("flops", 0)
    before = after = evaluate(s, engine, data["eval"], world)
    log.write(step=0, eval_loss=before, flops=spent)
    world.say(f"eval loss before: {show(before)}")
    for step in range(steps):
        began = time.perf_counter()
        start = first + step * s.global_batch_size
        stop = min(start + s.global_batch_size, end)
        indices = global_batch(s.seed, size, start, stop)
        batch = [data["train"][index] for index in indices]
        rate = learning_rate(s, step, steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        loss, norm, filled = take_step(s, engine, batch, world)
        if not math.isfinite(loss) or not math.isfinite(norm):
            world.fail(UserError(stop_message(step + 1, loss, norm, indices, directory)))

        took = time.perf_counter() - began
        read, _ = count_tokens(batch)
        tokens, slots, seconds, spent = tokens + read, slots + filled, seconds + took, spent + config.flops(read)
        log.write(step=step + 1, loss=loss, lr=rate, grad_norm=norm, tokens=tokens, flops=spent,
                  tokens_per_s=read / took, elapsed=seconds, padding=1 - read / filled)
        last = step + 1 == steps
        if (step + 1) % s.logging_steps == 0 or step == 0 or last:
            world.say(f"step {step + 1:>{len(str(steps))}}/{steps}  loss {loss:7.4f}  lr {rate:.2e}  norm {norm:7.3f}  "
                      f"{tokens / seconds:9,.0f} tokens/s  padding {1 - tokens / slots:5.1%}  "
                      f"left {clock(seconds / (step + 1) * (steps - step - 1))}")
        if (step + 1) % s.eval_steps == 0 or last:
            after = evaluate(s, engine, data["eval"], world)
            log.write(step=step + 1, eval_loss=after, flops=spent)
            world.say(f"step {step + 1}/{steps}  eval loss {show(after)}")
        if stop // size > start // size and not last and s.save_total_limit:
            save(engine, directory / f"checkpoint-{step + 1}", tokenizer, world)
            world.on_main(lambda: prune(directory, s.save_total_limit))
    return {"eval_loss_before": before, "eval_loss_after": after, "steps": steps, "first_sample": first,
            "last_sample": end, "tokens": tokens, "flops": spent, "seconds": seconds, "tokens_per_s": tokens / seconds,
            "padding": 1 - tokens / slots, "peak_memory_bytes": peak_memory(world)}


def peak_memory(world):
    """The most memory that this process has held, in bytes: of its GPU, or of the machine."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def take_step(s, engine, samples, world):
    """One optimizer step on a global batch. Returns (mean loss, gradient norm before clipping, padded token slots).

    Every micro-batch adds the gradient of its summed negative log-likelihood over the target tokens of the whole
    global batch. DeepSpeed averages gradients over the processes, which the factor `world.size` undoes. A loss or
    norm that is not finite is returned before the optimizer has changed a weight.
    """
    _, wanted = count_tokens(samples)
    batches = micro_batches(samples, s.micro_batch_tokens, s.micro_step_slots, world.rank, world.size)
    nll = torch.zeros((), device=world.device)
    for index, (input_ids, targets) in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        part = engine(input_ids.to(world.device), targets.to(world.device))
        engine.backward(part * (world.size / wanted), scale_wrt_gas=False)
        nll += part.detach()
    loss, slots = world.sum(nll, sum(input_ids.numel() for input_ids, _ in batches))
    loss /= wanted
    if not math.isfinite(loss):
        return loss, math.nan, slots
    if not engine.zero_optimization():
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), s.max_grad_norm or math.inf))
        if not math.isfinite(norm):
            return loss, norm, slots
    engine.step()  # ZeRO skips the optimizer where the norm is not finite
    return loss, float(engine.get_global_grad_norm()) if engine.zero_optimization() else norm, slots


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
    decoded = greedy(model, prompts, min(64, s.max_target_length), tokenizer.eos_id)
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
