"""Trains a model: one explicit DeepSpeed loop for pretraining and fine-tuning.

    python train.py --config configs/train/finetune.toml --task simp --init runs/tiny/stack/m0 \\
        --data data/prepared/sample/simp.json --out runs/tiny/stack/m1-simp
    torchrun --nproc_per_node 8 train.py …        deepspeed --num_gpus 8 train.py …        (the same flags)

Pretraining and fine-tuning differ in the samples, the initial weights and the schedule, which are passed in. Methods
against forgetting are hooks around the step (training/methods.py). A step is a function of (seed, step): the samples
and the loss, the mean negative log-likelihood over all target tokens of the global batch, depend neither on the number
of processes nor on the size of the micro-batches.
"""
import common.preamble

import contextlib
import datetime
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm import tqdm

from common import scripts
from common.distributed import Distributed
from common.files import UserError
from common.metrics_log import MetricsLog
from common.stop_request import StopRequest
from model.oom import oom_remedy
from model.tokenizer import Tokenizer
from training.batches import GlobalBatch, Sample, SampleDataset, count_tokens, make_microbatches, to_inputs
from training.checks import open_run
from training.data import TrainData, load_data
from training.engine import (
    REMEDY,
    build_engine,
    build_model,
    eager_blocks,
    optimizer_step,
    peak_memory,
    save_checkpoint,
    save_epoch_checkpoint,
)
from training.examples import decode_examples
from training.methods import Method, make_method
from training.resume import StateSaver, optimizer_updates, resume
from training.run import Run
from training.run_directory import claim, finish_run, last_checkpoint, open_log, print_result, start_run
from training.selection import training_flops
from training.train_config import TrainConfig
from training.train_state import SPIKE_WINDOW, StepResult, TrainState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

OOM_REMEDY = "Try a smaller --max_tokens_per_microbatch, --zero 2 or 3, --gradient_checkpointing or, unless it was " \
             "the host's memory, --zero 2 --offload; `make plan` estimates the memory. The same command resumes from " \
             "the saved state, if there is one"
EVAL_SAMPLES = 64  # per rank that are cut into micro-batches together; the progress bar moves once for each


def learning_rate(cfg: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step (0 ≤ step < steps): linear warm-up, then constant, cosine, linear or WSD decay.

    The decaying schedules approach `min_lr_ratio` times the peak. WSD (warm-up, stable, decay: Hu et al., arXiv
    2404.06395) decays linearly here, over a share `decay_ratio` of the steps.
    """
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    progress = max(0, step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)  # after the warm-up, in [0, 1)
    decay = {"constant": 1.0,
             "cosine": (1 + math.cos(math.pi * progress)) / 2,
             "linear": 1 - progress,
             "wsd": min(1.0, (steps - step) / max(1.0, cfg.decay_ratio * steps))}[cfg.lr_scheduler_type]
    return cfg.learning_rate * warmup * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay)


def main(cfg: TrainConfig) -> None:
    """Runs one training run, from settings to a finished checkpoint."""
    with oom_remedy(OOM_REMEDY), contextlib.ExitStack() as claimed, StopRequest() as request, \
            Distributed(datetime.timedelta(minutes=cfg.timeout_minutes)) as dist:
        dist.on_rank0(lambda: claimed.enter_context(claim(cfg.out)))
        # On H100 PyTorch prefers cuDNN's attention, which compiles a plan for every shape: pretraining has only one.
        torch.backends.cuda.enable_cudnn_sdp(cfg.task is None)
        with dist.long_timeout():  # rank 0 may download weights, and reads all data
            run = open_run(cfg, dist, request)
        if run is None:  # finished earlier
            return dist.on_rank0(lambda: print_result(cfg.out))
        tokenizer = Tokenizer(run.source)
        with dist.long_timeout():  # all shards of a replayed text are read
            data = load_data(run, tokenizer)
        engine = build_engine(run, build_model(run))
        method = make_method(run, engine, data, train_step)
        run, state = resume(run, engine) or (run, TrainState(flops=run.lineage.get("flops", 0)))
        if not state.step:
            dist.on_rank0(lambda: start_run(run.directory, run.record))
        method.begin()
        log = open_log(run, state.step)

        result = train(run, engine, method, data, state, log)
        save_checkpoint(run, engine, run.directory)
        with eager_blocks(cfg.compile):
            examples = decode_examples(engine.module, tokenizer, data.test[:cfg.examples], cfg)
        began = time.perf_counter()
        method.write_side_files()
        seconds = time.perf_counter() - began
        log.close()
        dist.on_rank0(lambda: finish_run(run, result | {"examples": examples, "seconds_after": seconds}))
        dist.on_rank0(lambda: print_result(cfg.out))


def train(run: Run, engine: "DeepSpeedEngine", method: Method, data: TrainData, state: TrainState,
          log: MetricsLog) -> dict[str, Any]:
    """Trains from `state.step` to the last step; returns the result for run.json."""
    cfg, dist, saver = run.cfg, run.dist, StateSaver(run, engine)
    if not state.step:
        state.eval_loss_before = state.eval_loss_after = evaluate_and_log(run, engine, data.eval, state, log)
        state.text_loss_before = evaluate_and_log(run, engine, data.held_out, state, log, "text_loss")
        state.text_digest = run.record.get("held_out_digest")
    run.request.defers = True  # a signal now waits for the end of a step
    flops_per_token = training_flops(1, run.model_config, run.trained)
    for step in range(state.step, data.steps):
        if state.has_reached(cfg.stop_at_eval_loss):
            dist.print0(f"the eval loss is at most {cfg.stop_at_eval_loss}: ending after step {step}")
            break
        began, last = time.perf_counter(), step + 1 == data.steps
        batch = data.batch(step)
        lr = learning_rate(cfg, cfg.schedule_start + step, cfg.schedule_steps or data.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        max_loss = state.max_loss(cfg.skip_loss_above)
        divergences = method.before_step(step, batch.samples)
        result = train_step(run, engine, batch.groups, max_loss)
        method.after_step(result.applied)
        if not result.applied and not result.skipped(max_loss):
            abort(run, step, batch, result)

        seconds = time.perf_counter() - began
        state.add_step(batch, result, seconds, flops_per_token * batch.num_tokens)
        log.write(**state.log_entry(batch, result, lr, seconds), **divergences)
        if not result.applied:
            dist.print0(f"step {step + 1} skipped: loss {result.loss:.4f} > {max_loss:.4f}; {batch}")
        if state.skips == SPIKE_WINDOW:  # not a spike: no later loss would enter the mean that it is compared with
            dist.fail(UserError(f"the last {SPIKE_WINDOW} steps were skipped, since their losses exceed "
                                f"{cfg.skip_loss_above} times the mean before them; last good checkpoint: "
                                f"{last_checkpoint(run.directory)}. Try a larger skip_loss_above"))
        if last:
            method.finish()
        if (step + 1) % cfg.logging_steps == 0 or step == 0 or last:
            dist.print0(state.progress_line(data.steps, result, lr))
        if (step + 1) % cfg.eval_steps == 0 or last:
            state.eval_loss_after = evaluate_and_log(run, engine, data.eval, state, log)
        if batch.ends_epoch and not last:
            save_epoch_checkpoint(run, engine, state, data)
        if not last:
            saver.save_or_stop(state, data.steps)
    state.text_loss_after = evaluate_and_log(run, engine, data.held_out, state, log, "text_loss")
    return state.result(data) | {"updates": optimizer_updates(engine), "peak_memory_bytes": peak_memory(dist.device)}


def abort(run: Run, step: int, batch: GlobalBatch, result: StepResult) -> NoReturn:
    """Ends the run, on all ranks, at a step whose loss or gradient norm is not finite."""
    run.dist.fail(UserError(
        f"step {step + 1} was aborted before the optimizer update: loss {result.loss}, gradient norm "
        f"{result.grad_norm}; {batch}; last good checkpoint: {last_checkpoint(run.directory)}. "
        f"{REMEDY}"))


def train_step(run: Run, engine: "DeepSpeedEngine", groups: Sequence[Sequence[Sample]],
               max_loss: float = math.inf) -> StepResult:
    """Takes one optimizer step on a global batch, whose samples are in groups. Those of different groups are never in
    one micro-batch.

    Each micro-batch adds the gradient of its summed negative log-likelihood, divided by the number of targets of the
    global batch. DeepSpeed averages gradients over the ranks, which the factor `world_size` undoes. The weights do not
    change if the loss or the gradient norm is not finite, or if the loss exceeds `max_loss`.
    """
    cfg, dist = run.cfg, run.dist
    num_targets = sum(count_tokens(samples)[1] for samples in groups)
    microbatches = [microbatch for samples in groups for microbatch in make_microbatches(cfg, dist, samples)]
    computed = float(sum(len(prefix) + input_ids.numel() for input_ids, _, prefix in microbatches))
    nll, scale, rejected = torch.zeros((), device=dist.device), dist.world_size / num_targets, False
    for index, microbatch in enumerate(microbatches):
        last = index == len(microbatches) - 1
        engine.set_gradient_accumulation_boundary(last)
        microbatch_nll = engine(*to_inputs(microbatch, dist.device))
        nll += microbatch_nll.detach()
        if last:  # the loss is known before the last gradient: a rejected loss sets the gradients to NaN
            total, computed = dist.all_reduce_sum(nll, computed)
            loss = total / num_targets
            rejected = not (math.isfinite(loss) and loss <= max_loss)
        engine.backward(microbatch_nll * (math.nan if rejected else scale), scale_wrt_gas=False)
    return StepResult(loss, optimizer_step(engine, cfg.max_grad_norm, rejected), computed)


@torch.no_grad()
def evaluate(run: Run, engine: "DeepSpeedEngine", dataset: SampleDataset) -> float | None:
    """Mean negative log-likelihood of all target tokens of a split, in nats; None if it is empty."""
    cfg, dist = run.cfg, run.dist
    nll, num_targets, share = torch.zeros((), device=dist.device), 0, EVAL_SAMPLES * dist.world_size
    for start in tqdm(range(0, len(dataset), share), "evaluating", leave=False, disable=dist.hides_progress):
        samples = [dataset[index] for index in range(start, min(start + share, len(dataset)))]
        num_targets += count_tokens(samples)[1]
        for microbatch in make_microbatches(cfg, dist, samples):
            nll += engine.module(*to_inputs(microbatch, dist.device))
    if not num_targets:
        return None
    return dist.all_reduce_sum(nll)[0] / num_targets


def evaluate_and_log(run: Run, engine: "DeepSpeedEngine", dataset: SampleDataset, state: TrainState, log: MetricsLog,
                     name: str = "eval_loss") -> float | None:
    """Evaluates a split, and logs and prints its loss under a name; None if the split is empty. All ranks exit if the
    loss is not finite."""
    if (loss := evaluate(run, engine, dataset)) is not None:
        if not math.isfinite(loss):
            reason = f"last good checkpoint: {last_checkpoint(run.directory)}. {REMEDY}" if state.step else \
                "no step was taken yet: check the weights of --init, or try --dtype fp32"
            run.dist.fail(UserError(f"the evaluation loss is {loss}; {reason}"))
        log.write(**{"step": state.step, name: loss, "flops": state.flops})
        run.dist.print0(f"step {state.step}  {name.replace('_', ' ')} {loss:.4f}")
    return loss


if __name__ == "__main__":
    scripts.run((TrainConfig, main), __doc__)
