"""The settings of train.py: names, defaults, and what contradicts what."""
import math
from dataclasses import dataclass
from typing import Literal

import settings
from distributed import weights_dtype
from settings import setting


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
    micro_batch_tokens: int = setting(4096, "most token places in a micro-batch, with padding; changes speed and "
                                           "memory, no number")
    micro_step_slots: int = setting(256, "the padding that one more micro-batch has to save; changes no number")
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
    learning_rate: float = setting(2e-5, "peak learning rate; with IVON the most that a weight moves in a step")
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
    # against forgetting
    method: str | None = setting(None, "a file in configs/method: what is set there, over the size's recipe",
                                 table="method")
    mode: Literal["deterministic", "probabilistic"] = setting("deterministic", "AdamW, or IVON: a distribution over "
                                                                               "the weights")
    rehearsal: float = setting(0.0, "share of the samples of each task learned before --init that is trained on again")
    average_rate: float = setting(0.0, "share of the way back to the weights of --init that every step ends with")
    average_after: float = setting(1.0, "share of the trained weights in the result, the rest are those of --init")
    ewc_strength: float = setting(0.0, "weight of the penalty on leaving --init by the Fisher information of the tasks "
                                       "before (EWC); with it the run measures its own task's")
    fisher_samples: int = setting(128, "training samples that the Fisher information is measured on")
    prior: Literal["auto", "weights", "posterior"] = setting("auto", "prior of probabilistic mode: around the weights "
                                                             "of --init, or its posterior; auto: that if it has one")
    prior_precision: float = setting(1e6, "precision of the prior around the weights, 1 / variance")
    tau: float = setting(1.0, "how much an earlier posterior counts as the prior: its precision times this")
    effective_samples: float = setting(1e7, "samples that the mean loss stands for: more make the noise smaller and "
                                            "the prior weaker")
    curvature: float = setting(1e-3, "curvature that IVON starts at")
    curvature_beta: float = setting(0.999, "decay rate of the curvature")
    clip_radius: float = setting(1e-3, "gradient over curvature at which a weight moves by the whole learning rate")
    weight_noise: bool = setting(True, "draw the weights of each step; false: gradients at the mean, to compare with")
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
                   ("micro_step_slots", 0), ("num_hidden_layers", 1), ("save_minutes", 0), ("ewc_strength", 0),
                   ("fisher_samples", 1))
                  if getattr(self, name) is not None and not getattr(self, name) >= least]
        found += [f"{name} is {getattr(self, name)}, expected a number above 0"
                  for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "max_flops", "timeout_minutes",
                               "skip_loss_above", "prior_precision", "effective_samples", "curvature", "clip_radius")
                  if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf]
        found += [f"{name} is {getattr(self, name)}, expected a number from 0 to 1"
                  for name in ("min_lr_ratio", "decay_ratio", "rehearsal", "average_rate", "average_after")
                  if not 0 <= getattr(self, name) <= 1]
        found += [f"{name} is {getattr(self, name)}, expected a number from 0 to below 1"
                  for name in ("adam_beta1", "adam_beta2", "curvature_beta") if not 0 <= getattr(self, name) < 1]
        found += self.method_problems()
        if self.offload and self.deepspeed:
            found.append("--offload is about the files in configs/deepspeed: say it in the file of --deepspeed instead")
        elif self.offload and not (self.zero or 0) >= 2:
            found.append("--offload needs --zero 2 or 3")
        if self.zero == 0 and self.dtype in ("bf16", "auto") and weights_dtype(self) == "bf16":
            found.append("ZeRO 0 keeps no fp32 master weights of a bf16 model: use --zero 1 or more")
        return found

    def method_problems(self):
        """What contradicts what among the settings against forgetting."""
        found = settings.unknown_name("method", self.method) if self.method is not None else []
        if not 0 < self.tau <= 1:
            found.append(f"tau is {self.tau}, expected a number above 0 and at most 1")
        pulls = [name for name, off in (("average_rate", 0), ("average_after", 1), ("ewc_strength", 0))
                 if getattr(self, name) != off]
        used = pulls + ["rehearsal"] * (self.rehearsal > 0) + ["mode"] * (self.mode == "probabilistic")
        if used and self.task is None:
            found.append(f"{' and '.join(used)} {'are' if len(used) > 1 else 'is'} for fine-tuning: give --task")
        if self.mode == "probabilistic":
            if pulls:
                found.append(f"{' and '.join(pulls)} pull towards the weights of --init, as the prior of probabilistic "
                             "mode does: leave them out there")
            if self.weight_decay:
                found.append(f"weight_decay is {self.weight_decay}, but in probabilistic mode the prior takes its "
                             "place: set it to 0, or give --method probabilistic")
        return found
