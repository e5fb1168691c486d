"""The settings of train.py: names, defaults, ranges, and contradictions between them."""
from dataclasses import dataclass
from typing import Literal

from common.dtypes import resolve_dtype
from common.provenance import DEFAULT_TEMPLATE, TemplateName
from common.settings import non_defaults, setting
from model.config import MAX_LAYERS
from model.lora import TARGETS, LoRA

ANCHORED = "l2_sp_rate", "l2_sp_strength", "wise_ft_alpha", "fapm_sparsity", "ewc_strength"  # refer to --init's weights

# Settings that have an effect in one phase only; the settings of a method have none without the method.
PRETRAINING_ONLY = "seq_length", "max_tokens", "max_flops", "stop_at_eval_loss", "carry_moments"
FINETUNING_ONLY = ("max_source_length", "max_target_length", "train_on_source", "template", "new_layers", *ANCHORED,
                   "rehearsal", "replay_share", "self_replay_kl", "input_kl", "held_out_text", "examples")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. The defaults that change the result are those of the published fine-tuning, apart
    from the batch size."""
    task: str | None = setting(None, "task to fine-tune on (a file in configs/task); none: pretraining", names="task")
    size: str | None = setting(None, "size preset (a file in configs/size): the shape of new weights, and with --phase "
                                     "the recipe", names="size", overlay=True)
    phase: Literal["base", "stack", "llm", "finetune"] | None = setting(None, "table of the size's file to read")
    init: str | None = setting(None, "initial checkpoint: a directory or a Hub id; none: new weights")
    num_hidden_layers: int | None = setting(None, "layers of new weights, instead of the size's: a base to grow later",
                                            at_least=1)
    data: str = setting(None, "preprocessed task file, or directory of token shards", required=True)
    out: str = setting(None, "directory of the run", required=True)
    seed: int = setting(42, "seed of everything random: new weights and adapters, the sample order, rehearsed, "
                            "replayed and generated samples, IVON's noise", at_least=0)
    # the batch
    global_batch_size: int = setting(32, "samples in a step, over all ranks", at_least=1, at_most=1 << 20)
    max_tokens_per_microbatch: int = setting(4096, "maximum tokens in a micro-batch, with padding; affects speed and "
                                                   "memory only", at_least=1)
    microbatch_overhead_tokens: int = setting(256, "fixed cost of a micro-batch, in tokens of padding; affects speed "
                                                   "only", at_least=0)
    seq_length: int = setting(1024, "tokens in a pretraining sample", at_least=2)
    max_source_length: int = setting(1024, "maximum tokens in a prompt, including <bos>", at_least=16)
    max_target_length: int = setting(256, "maximum tokens in a target, including <eos>", at_least=2)
    train_on_source: bool = setting(False, "also compute the loss on the prompt")
    template: TemplateName = setting(DEFAULT_TEMPLATE, "prompt around a source: alpaca; chat, the tokenizer's chat "
                                                       "template; or plain, the source alone")
    # how long
    num_train_epochs: float = setting(3.0, "passes over the data", above=0, at_most=10_000,
                                      replaced_by=("max_steps", "max_tokens", "max_flops"))
    max_steps: int | None = setting(None, "steps, instead of epochs", at_least=1)
    max_tokens: int | None = setting(None, "tokens to pretrain on, instead of epochs", at_least=1)
    max_flops: float | None = setting(None, "FLOPs to pretrain for, including those spent on --init", above=0)
    stop_at_eval_loss: float | None = setting(None, "pretraining: end after the first evaluation whose loss is at most "
                                                    "this; the schedule is that of the whole length", above=0)
    max_train_samples: int | None = setting(None, "use only the first N training samples", at_least=1)
    max_eval_samples: int | None = setting(None, "use only the first N evaluation samples", at_least=1)
    skip_samples: int | None = setting(None, "samples of the stream to skip; none: in pretraining those that --init "
                                             "was trained on, otherwise 0", at_least=0)
    # the optimizer
    optimizer: Literal["adamw", "ivon"] = setting("adamw", "adamw; or ivon, which learns a Gaussian over the weights")
    learning_rate: float = setting(2e-5, "peak learning rate; with IVON the largest change of a weight", above=0)
    lr_scheduler_type: Literal["constant", "cosine", "linear", "wsd"] = setting("constant", "schedule after warm-up")
    warmup_steps: int = setting(0, "steps of linear warm-up", at_least=0)
    min_lr_ratio: float = setting(0.0, "rate that the decay approaches, as a share of the peak", at_least=0, at_most=1)
    decay_ratio: float = setting(0.2, "share of the steps in which wsd decays", at_least=0, at_most=1)
    schedule_start: int = setting(0, "steps of the schedule before this run, which continues it", at_least=0)
    schedule_steps: int | None = setting(None, "steps of the whole schedule; none: those of this run", at_least=1)
    carry_moments: bool = setting(False, "pretraining: start from the optimizer moments of --init, if it has them, and "
                                         "write those of the result next to it")
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices; norms and biases have none", at_least=0)
    adam_beta1: float = setting(0.9, "decay rate of the first moment", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "decay rate of the second moment", at_least=0, below=1)
    adam_epsilon: float = setting(1e-8, "term added to the root of the second moment", above=0)
    max_grad_norm: float = setting(0.3, "gradient clipping norm; 0: no clipping", at_least=0)
    skip_loss_above: float | None = setting(None, "skip a batch whose loss exceeds this multiple of the mean over the "
                                                  "last 50 steps that were not skipped (none before 10 steps)",
                                            above=0)
    # which weights are trained
    train: tuple[str, ...] = setting(("all",), "what is trained, the rest is frozen: all; new_layers, those that the "
                                               "last growth added; lora; or patterns of names such as model.layers.3.*",
                                     required=True)
    new_layers: int = setting(0, "block expansion: layers to insert before the first task, which add nothing at first",
                              at_least=0, at_most=MAX_LAYERS)
    per_task: bool = setting(False, "block expansion: insert layers before every task")
    lora_rank: int = setting(16, "LoRA: rank of the adapters", at_least=1, at_most=1 << 20)
    lora_alpha: float = setting(32.0, "LoRA: the adapters are scaled by lora_alpha / lora_rank", above=0)
    lora_targets: tuple[str, ...] = setting(TARGETS, "LoRA: linear layers that get an adapter", required=True,
                                            names=TARGETS)
    # methods against forgetting
    method: str | None = setting(None, "file in configs/method whose settings override the size's recipe",
                                 names="method", overlay=True)
    rehearsal: float = setting(0.0, "share of each earlier task's samples that is trained on again", at_least=0,
                               at_most=1)
    replay_text: str | None = setting(None, "directory of token shards, of which windows are added to the batches")
    replay_share: float = setting(0.0, "windows of replay_text, as a share of the batch", at_least=0, at_most=100)
    self_replay_kl: float = setting(0.0, "weight of KL(m0 || model) on texts that m0, the start of the chain of tasks, "
                                         "generated from <bos>, or the end-of-text token", at_least=0)
    self_replay_share: float = setting(0.25, "self-replay: generated texts in a step, as a share of the batch",
                                       above=0, at_most=100)
    self_replay_texts: int = setting(256, "self-replay: number of texts generated before the first task", at_least=1)
    input_kl: float = setting(0.0, "weight of KL(m0 || model) on the samples of each step, rehearsed ones included",
                              at_least=0)
    l2_sp_strength: float = setting(0.0, "L2-SP: strength of the penalty, ½ |w − w₀|²", at_least=0)
    l2_sp_rate: float = setting(0.0, "decoupled L2-SP: share of the way back to the initial weights after a step at "
                                     "the full learning rate", at_least=0, below=1)
    wise_ft_alpha: float = setting(1.0, "WiSE-FT: share of the trained weights in the result; the rest are the initial "
                                        "weights, those of --init", above=0, at_most=1)
    fapm_sparsity: float = setting(0.0, "FAPM: share of each matrix whose change is undone after training", at_least=0,
                                   below=1)
    ewc_strength: float = setting(0.0, "EWC: weight of the penalty; the run also measures its own task's Fisher "
                                       "information", at_least=0)
    fisher_samples: int = setting(128, "training samples used to measure the Fisher information", at_least=1)
    # IVON
    prior: Literal["auto", "weights", "posterior"] = setting("auto", "IVON's prior: around the weights of --init, or "
                                                             "its posterior; auto: the posterior if there is one")
    prior_precision: float = setting(1e6, "precision (1 / variance) of a prior around the weights", above=0)
    tau: float = setting(1.0, "tempering: factor on the precision of an earlier posterior", above=0, at_most=1)
    ess: float = setting(1e7, "IVON's λ, the effective sample size in target tokens: larger means less "
                                "noise and a weaker prior", above=0)
    hess_init: float = setting(1e-3, "initial value of the Hessian estimate", above=0)
    ivon_beta2: float = setting(0.999, "decay rate of the Hessian estimate", at_least=0, below=1)
    clip_radius: float = setting(1e-3, "clip preconditioned gradients to this absolute value", above=0)
    sample_params: bool = setting(True, "sample the weights of each step; false: gradients at the mean")
    # how it is computed
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weight dtype; auto: bf16 if the hardware supports it")
    zero: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage; none: 0 for one process in fp32, otherwise 1")
    offload: bool = setting(False, "keep the optimizer, with ZeRO-3 also the weights, in host memory")
    deepspeed: str | None = setting(None, "DeepSpeed file to use instead of the stage's file in configs/deepspeed")
    compile: bool = setting(False, "compile the blocks with torch.compile: faster pretraining; needs a C++ compiler, "
                                   "and ZeRO 0 to 2")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, 1/3 more work")
    local_rank: int | None = setting(None, "set by the deepspeed launcher")
    # what is written
    eval_steps: int = setting(300, "evaluate every N steps, and always before the first and after the last", at_least=1)
    held_out_text: str | None = setting(None, "directory of token shards: fine-tuning evaluates on its held-out part "
                                              "before the first and after the last step")
    examples: int = setting(0, "test examples to decode after fine-tuning, and to print", at_least=0)
    logging_steps: int = setting(10, "print every N steps; metrics.jsonl has every step", at_least=1)
    save_total_limit: int = setting(1, "epoch checkpoints to keep, apart from the final weights", at_least=0)
    save_minutes: float = setting(15.0, "minutes between saves of the state to resume from; 0: every step", at_least=0)
    timeout_minutes: float = setting(30.0, "minutes that a rank waits for the others before it gives up", above=0,
                                     at_most=525_600)
    tensorboard: bool = setting(False, "also log to TensorBoard (needs the package tensorboard)")
    wandb: str | None = setting(None, "Weights & Biases project to also log to (needs the package wandb)")

    @property
    def lora(self) -> LoRA | None:
        """The adapters to train, or None."""
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets) if "lora" in self.train else None

    @property
    def anchored(self) -> list[str]:
        """The settings in use that refer to the weights of --init."""
        return non_defaults(self, *ANCHORED)

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = []
        if self.init is None and self.size is None:
            found.append("neither --init nor --size says which model to train")
        if self.task is not None and self.init is None:
            found.append("fine-tuning needs an initial checkpoint: give --init")
        lengths = [name for name in ("max_steps", "max_tokens", "max_flops") if getattr(self, name) is not None]
        if len(lengths) > 1:
            found.append(f"{' and '.join(lengths)} each set the length of training: give one, and none for the other")
        if self.max_tokens is not None and self.max_tokens < self.seq_length:
            found.append(f"max_tokens is {self.max_tokens}, less than one sample of seq_length {self.seq_length}")
        if self.carry_moments and (self.optimizer != "adamw" or self.train != ("all",)):
            found.append("carry_moments is for pretraining all weights with adamw")
        if self.schedule_start and self.schedule_steps is None:
            found.append("schedule_start needs the length of the whole schedule: give schedule_steps")
        if self.lr_scheduler_type != "wsd" and non_defaults(self, "decay_ratio"):
            found.append(f"decay_ratio would change nothing with lr_scheduler_type {self.lr_scheduler_type}: give wsd")
        if self.init is not None and self.num_hidden_layers is not None:
            found.append("num_hidden_layers is for new weights, but --init gives weights: stack.py makes them deeper")
        if self.offload and self.deepspeed:
            found.append("--offload selects a file in configs/deepspeed: set it in the file of --deepspeed instead")
        elif self.offload and not (self.zero or 0) >= 2:
            found.append("--offload needs --zero 2 or 3")
        if self.zero == 0 and resolve_dtype(self.dtype) == "bf16":
            found.append("ZeRO 0 keeps no fp32 master weights of a bf16 model: use --zero 1 or higher")
        if self.compile and self.zero == 3:
            found.append("--compile needs --zero 0, 1 or 2: under ZeRO-3 the weights are gathered within the blocks")
        return found + self.phase_problems() + self.method_problems()

    def phase_problems(self) -> list[str]:
        """A sentence on the given settings that have no effect in this phase: with a task fine-tuning, otherwise
        pretraining."""
        if self.task is not None:
            phase, remedy, given = "pretraining", "", non_defaults(self, *PRETRAINING_ONLY)
        else:
            phase, remedy, given = "fine-tuning", "give --task, or ", non_defaults(self, *FINETUNING_ONLY)
            given += ["optimizer ivon"] if self.optimizer == "ivon" else []
            given += ["train lora"] if self.lora else []
        verb, pronoun = ("are", "them") if len(given) > 1 else ("is", "it")
        return [f"{' and '.join(given)} {verb} for {phase}: {remedy}leave {pronoun} out"] if given else []

    def method_problems(self) -> list[str]:
        """Contradictions between the settings of methods against forgetting."""
        found, anchored, ivon = [], self.anchored, self.optimizer == "ivon"
        if self.lora and self.new_layers:
            found.append("train lora adapts the layers of --init: set new_layers to 0")
        if len(self.train) > 1 and {"all", "lora"} & set(self.train):
            found.append(f"train is {', '.join(self.train)}: give all or lora alone, or what else is to be trained")
        needs_all_weights = non_defaults(self, "ewc_strength") + (["optimizer ivon"] if ivon else [])
        if needs_all_weights and self.new_layers:
            found.append(f"{' and '.join(needs_all_weights)} is about the weights of --init: set new_layers to 0")
        if needs_all_weights and self.train != ("all",):
            found.append(f"{' and '.join(needs_all_weights)} knows the importance of all weights, but train is "
                         f"{', '.join(self.train)}: set it to all")
        if self.lora and anchored:
            found.append(f"{' and '.join(anchored)} would pull the adapters to their random start: train all instead")
        if self.per_task and not self.new_layers:
            found.append("per_task is about the layers that new_layers inserts: give their number")
        if self.replay_share and self.replay_text is None:
            found.append("replay_share needs a text: give --replay_text, a directory of token shards")
        for is_used, method, names in (
                (self.lora, "train lora", ("lora_rank", "lora_alpha", "lora_targets")),
                (self.ewc_strength, "ewc_strength", ("fisher_samples",)),
                (self.self_replay_kl, "self_replay_kl", ("self_replay_share", "self_replay_texts")),
                (ivon, "optimizer ivon", ("prior", "prior_precision", "tau", "ess", "hess_init", "ivon_beta2",
                                          "clip_radius", "sample_params"))):
            if not is_used and (given := non_defaults(self, *names)):
                found.append(f"{' and '.join(given)} would change nothing without {method}: give it as well")
        for prior, names in (("weights", ("tau",)), ("posterior", ("prior_precision",))):
            if self.prior == prior and (given := non_defaults(self, *names)):
                found.append(f"{' and '.join(given)} would change nothing with prior {prior}: leave it out")
        if ivon and anchored:
            found.append(f"{' and '.join(anchored)} pull towards the weights of --init, as IVON's prior does: use one")
        if ivon and self.weight_decay:
            found.append(f"weight_decay is {self.weight_decay}, but IVON's prior takes its place: set it to 0, or give "
                         "--method vcl")
        return found


def default_zero_stage(world_size: int, dtype: str) -> int:
    """The ZeRO stage with the least overhead: 0 for one process in fp32, otherwise 1.

    ZeRO 0 keeps no fp32 master weights, so a bf16 model needs ZeRO 1.
    """
    return 0 if world_size == 1 and dtype == "fp32" else 1
