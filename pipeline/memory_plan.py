"""Whether a run fits, and how long it takes: memory, disk and time, before a node is booked.

    python -m pipeline.memory_plan --size 7b --processes 8 --zero 3 --gpu_memory 80
    python -m pipeline.memory_plan --init DIR --processes 1 --zero 2 --offload

The rows are what train.py holds at most at the same time; bench/memory_use.py compares them with what a run takes.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

from common.files import UserError
from common.formatting import format_duration
from common.settings import read_config, run, setting, unknown_name
from model.config import ModelConfig
from model.hub import locate
from model.loss import LOGITS_PER_CHUNK
from pipeline.jobs import shape
from training.train_config import TrainConfig

GIB = 1 << 30

RUNTIME = {"cpu": 0.4 * GIB, "cuda": 0.6 * GIB}  # of the process itself: Python and libraries, or CUDA's context

# Elements: DeepSpeed's reduce_bucket_size, and its stage3_max_live_parameters and sub_group_size, which are the same.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class MemoryPlanConfig:
    """Settings of a plan. What is not given is as in the size's recipe, or train.py's default."""
    size: str | None = setting(None, "size preset (a file in configs/size)")
    init: str | None = setting(None, "checkpoint, in place of a size: a directory or a Hub id")
    recipe: Literal["base", "stack", "llm", "finetune"] = setting("finetune", "which table of the size's file")
    processes: int = setting(1, "processes, one a GPU")
    zero: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage")
    offload: bool = setting(False, "optimizer, with ZeRO-3 also the weights, in the memory of the host")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "weights")
    max_tokens_per_microbatch: int | None = setting(None, "most padded tokens in a micro-batch")
    gradient_checkpointing: bool | None = setting(None, "recompute blocks in the backward pass")
    method: str | None = setting(None, "what is done against forgetting (a file in configs/method)")
    tokens: float | None = setting(None, "tokens to train on in all; none: the recipe's, where it says them")
    sample_tokens: int = setting(128, "tokens of a fine-tuning sample, about")
    gpu_memory: float = setting(80.0, "GiB of a GPU")
    gpu_tflops: float = setting(989.0, "TFLOP/s of a GPU in matrix products (H100 SXM in bf16, dense: 989; A100: 312)")
    utilisation: float = setting(0.4, "share of them that training reaches")
    device: Literal["cuda", "cpu"] = setting("cuda", "where the run takes place")

    def problems(self):
        found = unknown_name("size", self.size) if self.size else []
        found += unknown_name("method", self.method) if self.method else []
        if (self.size is None) == (self.init is None):
            found.append("give either --size or --init")
        found += [f"{name} is {getattr(self, name)}, expected a number above 0" for name in
                  ("processes", "max_tokens_per_microbatch", "tokens", "sample_tokens", "gpu_memory", "gpu_tflops",
                   "utilisation") if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf]
        if self.utilisation > 1:
            found.append(f"utilisation is {self.utilisation}, expected a share, at most 1")
        if self.dtype == "bf16" and self.zero == 0:
            found.append("ZeRO 0 keeps no fp32 master weights of a bf16 model: use --zero 1 or more")
        return found


@dataclass(frozen=True)
class MemoryPlan:
    """What a run is, as far as memory and time depend on it."""
    config: ModelConfig
    processes: int
    zero: int
    offload: bool
    dtype: str
    max_tokens_per_microbatch: int
    gradient_checkpointing: bool
    device: str = "cuda"
    method: str | None = None
    sample_tokens: int = 128

    @property
    def beside(self):
        """Bytes a weight that a method keeps in a later task: the weights before, with EWC their Fisher information; or
        mean and precision of the prior, and without ZeRO the mean while a draw is in its place."""
        if self.method == "vcl":
            return 12 if self.zero == 0 else 8
        return {"wise_ft": 4, "l2_sp": 4, "ewc": 8}.get(self.method, 0)

    @property
    def width(self):
        """Bytes of a weight."""
        return 2 if self.dtype == "bf16" else 4

    def memory(self):
        """Bytes of a process's device by what holds them; on a CPU, of the process."""
        parameters, shards = self.config.num_parameters, self.processes
        away = self.offload and self.device == "cuda"  # on a CPU the memory of the host is the device's
        rows = {"weights": self.width * parameters, "fp32 weights and moments": 12 * parameters / shards}
        if self.zero == 0:
            rows["fp32 weights and moments"] = 8 * parameters  # moments; the weights are fp32 themselves
        rows["fp32 weights and moments"] += self.beside * parameters / (shards if self.zero else 1)
        if self.zero == 3:
            rows["weights"] = self.width * parameters / shards if self.width == 2 else 0  # fp32 weights are there once
            rows["gathered weights"] = self.width * min(parameters, LIVE)
        rows |= {"gradients": self.gradients(), "activations": self.activations(), "logits": self.logits(),
                 "buffers": self.buffers(), "the process itself": RUNTIME[self.device]}
        if away:
            rows["fp32 weights and moments"] = 0
            if self.zero == 3:
                rows["weights"] = rows["gradients"] = 0
        return rows

    def total(self):
        """Bytes of a process's device at the worst moment. Logits are gone when the buffers are filled; on a CPU, where
        memory counts that was written to, so are the activations."""
        rows = self.memory()
        gone = rows["logits"] + (rows["activations"] if self.device == "cpu" else 0)
        return sum(rows.values()) - min(gone, rows["buffers"])

    def gradients(self):
        """Accumulated gradients; of ZeRO-1 also those of a backward pass, of ZeRO-3 those of a sub-group's step."""
        parameters, shards = self.config.num_parameters, self.processes
        if self.zero == 0:
            return 4 * parameters
        if self.zero == 1:
            return (4 + self.width) * parameters
        return 4 * parameters / shards + (4 * min(parameters / shards, LIVE) if self.zero == 3 else 0)

    def buffers(self):
        """Where ZeRO collects gradients to reduce them (ZeRO 2 and 3), in the weights' dtype and as fp32."""
        if self.zero == 0:
            return 0
        bucket = BUCKET if self.device == "cuda" else min(BUCKET, self.config.num_parameters)
        return bucket * (self.width + (4 if self.width == 2 else 0))

    def block_activations(self):
        """Bytes that one block keeps for the backward pass, a token: of each norm its input in fp32, the normalised
        input, its output and a root; query, key, value and output of the attention with the logarithm of its sums, or
        in bf16 on CPUs, where it is written out, its probabilities; gate, up, their activation and their product."""
        c, width = self.config, self.width
        norms = 2 * ((4 + 2 * width) * c.hidden_size + 4)
        attention = width * 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        written_out = self.device == "cpu" and width == 2
        attention += c.num_attention_heads * (width * self.sample_tokens if written_out else 4)
        return norms + attention + width * 4 * c.intermediate_size

    def activations(self):
        """With checkpointing the input of each block and what one block keeps; otherwise what all blocks keep."""
        layers, block = self.config.num_hidden_layers, self.block_activations()
        if self.gradient_checkpointing:
            return self.max_tokens_per_microbatch * (layers * self.width * self.config.hidden_size + 2 * block)
        return self.max_tokens_per_microbatch * (layers + 1) * block

    def logits(self):
        """One slice of the loss in fp32: the logits and their log-softmax, of which the gradient takes the place."""
        return 8 * min(LOGITS_PER_CHUNK[self.device], self.max_tokens_per_microbatch * self.config.vocab_size)

    def host(self):
        """Bytes of host memory, all processes of the run together."""
        largest = 4 * self.config.vocab_size * self.config.hidden_size  # one tensor at a time is read or written
        # offloaded: weights, moments and gradients in fp32, and the weights in their dtype; of ZeRO-3 a second copy of
        # the gradients
        more = self.width if self.zero == 2 else self.width + 4
        away = (16 + more + self.beside) * self.config.num_parameters if self.offload else 0
        return self.processes * (RUNTIME["cpu"] + largest) + away

    def disk(self, checkpoints):
        """Bytes of disk: final weights, epochs' checkpoints, and the saved state, for a while twice."""
        left = {"ewc": 4, "vcl": 8}.get(self.method, 0)  # for the next task: Fisher information, or posterior
        return ((1 + checkpoints) * self.width + left + 2 * 12) * self.config.num_parameters

    def flops(self, tokens):
        """FLOPs of training on so many tokens, the second forward pass of gradient checkpointing included."""
        return self.config.flops(tokens) * (4 / 3 if self.gradient_checkpointing else 1)


def read_plan(cfg):
    """(the plan that the settings describe, the recipe it comes from)."""
    recipe = read_config("size", cfg.size).get(cfg.recipe, {}) if cfg.size else {}
    defaults = TrainConfig()

    def value(name):
        given = getattr(cfg, name)
        return recipe.get(name, getattr(defaults, name)) if given is None else given

    config = ModelConfig.read(locate(cfg.init) / "config.json") if cfg.init else shape(cfg.size)
    zero = value("zero")
    if zero is None:
        zero = 0 if cfg.processes == 1 and cfg.dtype == "fp32" else 1
    if cfg.offload and zero < 2:
        raise UserError(f"--offload needs --zero 2 or 3, not {zero}")
    return MemoryPlan(config, cfg.processes, zero, cfg.offload, cfg.dtype, value("max_tokens_per_microbatch"),
                value("gradient_checkpointing"), cfg.device, cfg.method, recipe.get("seq_length", cfg.sample_tokens)), recipe


def total_tokens(cfg, recipe):
    """Tokens that the run is trained on, None where nothing says them."""
    if cfg.tokens or "max_tokens" in recipe:
        return cfg.tokens or recipe["max_tokens"]
    if "max_train_samples" in recipe:
        return recipe["max_train_samples"] * cfg.sample_tokens * recipe.get("num_train_epochs",
                                                                         TrainConfig().num_train_epochs)
    return None


def alternatives(plan):
    """Plans that need less, in the order in which they cost more time."""
    for offload in (False, True):
        for tokens in (plan.max_tokens_per_microbatch, 4096, 2048):
            for zero in range(max(plan.zero, 2 * offload), 4):
                yield replace(plan, zero=zero, offload=offload, gradient_checkpointing=True,
                              max_tokens_per_microbatch=min(tokens, plan.max_tokens_per_microbatch))


def flags(plan, old):
    """The flags by which a plan differs from another."""
    return " ".join(f"--{name} {str(getattr(plan, name)).lower()}" for name in
                    ("zero", "offload", "gradient_checkpointing", "max_tokens_per_microbatch")
                    if getattr(plan, name) != getattr(old, name))


def row(name, value, unit, note=""):
    """A line of the table."""
    print(f"  {name:<28} {value:>12} {unit:<4}{note}")


def main(cfg):
    """Prints the plan: a row each, and whether it fits."""
    plan, recipe = read_plan(cfg)
    defaults = TrainConfig()
    print(f"{plan.config.num_parameters:,} parameters in {plan.dtype} on {plan.processes} × {plan.device}, ZeRO "
          f"{plan.zero}{', offloaded' if plan.offload else ''}, micro-batches of {plan.max_tokens_per_microbatch:,} tokens, "
          f"gradient checkpointing {on(plan)}\n\nmemory of each process")
    rows, have = plan.memory(), cfg.gpu_memory * GIB
    other = replace(plan, gradient_checkpointing=not plan.gradient_checkpointing)
    beside = f"   {other.activations() / GIB:.2f} with gradient checkpointing {on(other)}"
    for name, size in rows.items():
        row(name, f"{size / GIB:.2f}", "GiB", beside if name == "activations" else "")
    total = plan.total()
    row("at the worst moment", f"{total / GIB:.2f}", "GiB", f"of {cfg.gpu_memory:.0f}")
    print("beside it")
    row("host memory, all processes", f"{plan.host() / GIB:.2f}", "GiB")
    row("disk", f"{plan.disk(recipe.get('save_total_limit', defaults.save_total_limit)) / GIB:.2f}", "GiB")
    batch = recipe.get("global_batch_size", defaults.global_batch_size) * plan.sample_tokens
    rate = cfg.processes * cfg.gpu_tflops * 1e12 * cfg.utilisation / plan.flops(1)
    print(f"time, at {cfg.utilisation:.0%} of {cfg.processes} × {cfg.gpu_tflops:,.0f} TFLOP/s")
    row("speed", f"{rate:,.0f}", "tokens/s")
    row(f"a step of {batch:,} tokens", f"{batch / rate:.2f}", "s")
    if tokens := total_tokens(cfg, recipe):
        row(f"{int(tokens):,} tokens", format_duration(tokens / rate), "")
    if total <= have:
        print(f"it fits, with {(have - total) / GIB:.1f} GiB to spare")
        return
    found = next((one for one in alternatives(plan) if one.total() <= have), None)
    print("it does not fit: " + (f"with {flags(found, plan)} it does, in {found.total() / GIB:.1f} GiB"
                                 if found else "take more processes, or GPUs with more memory"))


def on(plan):
    """Whether a plan has gradient checkpointing, in words."""
    return "on" if plan.gradient_checkpointing else "off"


if __name__ == "__main__":
    run((MemoryPlanConfig, main), __doc__)
