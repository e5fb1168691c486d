"""Memory, disk and time of a training run: does it fit, and how long does it take?

    python -m pipeline.memory_plan --size 7b --processes 8 --zero 3 --gpu_memory 80
    python -m pipeline.memory_plan --init DIR --processes 1 --zero 2 --offload

The rows are the most that train.py holds at the same time. bench/memory_use.py compares them with measured runs. The
time is that of pipeline/step_time.py.
"""
import common.interrupts

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from common.configs import CONFIGS, read_config
from common.files import UserError, read_json
from common.formatting import format_duration
from common.scripts import run
from common.settings import load, setting
from model.config import ModelConfig
from model.growth import new_layers
from model.hub import fetch_checkpoint
from model.lora import A, is_adapter
from model.loss import chunk_rows
from pipeline.jobs import optional_flags
from pipeline.pretraining import size_config
from pipeline.step_time import GPUS, Step
from training.run import expansion
from training.selection import ALL, NEW_LAYERS, Shapes, count_elements, describe_selection, selected_shapes
from training.train_config import TrainConfig, default_zero_stage

GIB = 1 << 30
RUNTIME = {"cpu": 0.4 * GIB, "cuda": 0.6 * GIB}  # of the process itself: Python and libraries, or the CUDA context
# Elements: DeepSpeed's reduce_bucket_size, and its stage3_max_live_parameters and sub_group_size, which are equal.
BUCKET, LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class MemoryPlanConfig:
    """Settings of a plan. Those that are not given come from the size's recipe, or are train.py's defaults."""
    size: str | None = setting(None, "size preset (a file in configs/size)", names="size")
    init: str | None = setting(None, "checkpoint, instead of a size: a directory or a Hub id")
    recipe: Literal["base", "stack", "llm", "finetune"] = setting("finetune", "table of the size's file to read")
    processes: int = setting(1, "processes, one per GPU", at_least=1, at_most=1 << 20)
    zero: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage")
    offload: bool = setting(False, "keep the optimizer, with ZeRO-3 also the weights, in host memory")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "weights")
    max_tokens_per_microbatch: int | None = setting(None, "most tokens in a micro-batch, padding included", at_least=1,
                                                    at_most=1 << 30)
    gradient_checkpointing: bool | None = setting(None, "recompute blocks in the backward pass")
    method: str | None = setting(None, "method against forgetting (a file in configs/method)", names="method")
    tokens: float | None = setting(None, "tokens to train on in all; none: the recipe's, if it gives them", at_least=1,
                                   at_most=1e18)
    sample_tokens: int = setting(128, "tokens of a fine-tuning sample, roughly", at_least=1, at_most=1 << 30)
    gpu: Literal["a100", "h100", "h200"] = setting("h100", "GPU, eight to a node")
    gpu_memory: float | None = setting(None, "memory of a GPU, in GiB; none: that of --gpu", above=0, at_most=1e6)
    network: float | None = setting(None, "GB/s that a node receives from the others; none: 400, with A100s 200",
                                    at_least=1e-3, at_most=1e6)
    utilisation: float | None = setting(None, "share of the GPU's rate in matrix products that computation reaches; "
                                        "none: the range of published runs", at_least=1e-3, at_most=1)
    device: Literal["cuda", "cpu"] = setting("cuda", "device of the run")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = []
        if (self.size is None) == (self.init is None):
            found.append("give either --size or --init")
        if self.dtype == "bf16" and self.zero == 0:
            found.append("ZeRO 0 keeps no fp32 master weights of a bf16 model: use --zero 1 or higher")
        return found


@dataclass(frozen=True)
class MemoryPlan:
    """The properties of a run that its memory and time depend on."""
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
    trained: Shapes | None = None  # the parameters that are trained, name -> shape; None: all

    @property
    def num_trained(self) -> int:
        """Number of parameters that are trained."""
        return self.config.num_parameters if self.trained is None else count_elements(self.trained)

    @property
    def num_frozen(self) -> int:
        """Number of parameters that are not trained; those of adapters come on top."""
        return self.config.num_parameters - (0 if self.has_adapters else self.num_trained)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained."""
        return self.trained is not None and any(map(is_adapter, self.trained))

    @property
    def num_stored(self) -> int:
        """Number of parameters, those of adapters included."""
        return self.num_frozen + self.num_trained

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def method_bytes(self) -> int:
        """Bytes per weight that a method keeps in a later task: the initial weights, with EWC also their Fisher
        information; with VCL mean and precision of the prior, and without ZeRO the mean while the weights are
        sampled."""
        if self.method == "vcl":
            return 12 if self.zero == 0 else 8
        return {"wise_ft": 4, "l2_sp": 4, "l2_sp_penalty": 4, "fapm": 4, "ewc": 8}.get(self.method or "", 0)

    def memory(self) -> dict[str, float]:
        """Bytes on a process's device by what holds them; on a CPU, bytes of the process."""
        shards = self.processes if self.zero else 1
        state_bytes = (12 if self.zero else 8) + self.method_bytes  # ZeRO 0: the weights themselves are fp32
        rows: dict[str, float] = {"weights": self.weight_bytes * self.num_stored,
                                  "fp32 weights and moments": state_bytes * self.num_trained / shards}
        if self.zero == 3:
            # fp32 weights that are trained exist once: they are their own master weights
            stored = self.num_stored if self.weight_bytes == 2 else self.num_frozen
            rows["weights"] = self.weight_bytes * stored / shards
            rows["gathered weights"] = self.weight_bytes * min(self.num_stored, LIVE)
        if self.method in ("self_replay", "input_kl"):
            rows["the start of the chain"] = self.weight_bytes * self.config.num_parameters
        rows |= {"gradients": self.gradients(), "activations": self.activations(), "logits": self.logits(),
                 "buffers": self.buffers(), "the process itself": RUNTIME[self.device]}
        if self.offload and self.device == "cuda":  # on a CPU, host memory is the device's memory
            rows["fp32 weights and moments"] = 0
            if self.zero == 3:
                rows["weights"] = rows["gradients"] = 0
        return rows

    def total(self) -> float:
        """Peak bytes on a process's device. The logits are freed before the buffers are filled; on a CPU, whose memory
        counts from the first write, so are the activations."""
        rows = self.memory()
        freed = rows["logits"] + (rows["activations"] if self.device == "cpu" else 0)
        return sum(rows.values()) - min(freed, rows["buffers"])

    def gradients(self) -> float:
        """Accumulated gradients; with ZeRO-1 also those of a backward pass, with ZeRO-3 those of a sub-group's step."""
        trained, shards = self.num_trained, self.processes
        if self.zero == 0:
            return 4 * trained
        if self.zero == 1:
            return (4 + self.weight_bytes) * trained
        return 4 * trained / shards + (4 * min(trained / shards, LIVE) if self.zero == 3 else 0)

    def buffers(self) -> float:
        """Where ZeRO collects the gradients to reduce, in the dtype of the weights and as fp32."""
        if self.zero == 0:
            return 0
        bucket = BUCKET if self.device == "cuda" else min(BUCKET, self.num_trained)
        # one is filled while the other is reduced; on a CPU, memory that was never written does not count
        in_turn = 2 if self.overlaps and self.device == "cuda" else 1
        return bucket * (in_turn * self.weight_bytes + (4 if self.weight_bytes == 2 else 0))

    @property
    def overlaps(self) -> bool:
        """Whether the reduction of gradients overlaps with the backward pass."""
        path = CONFIGS / f"deepspeed/zero{self.zero}{'_offload' if self.offload else ''}.json"
        return bool(read_json(path)["zero_optimization"].get("overlap_comm"))

    def block_activations(self, trained: bool = True) -> float:
        """Bytes per token that one block keeps for the backward pass.

        Each norm keeps its input in fp32, the normalized input and a root. Its output is kept by the projections after
        it; where the norm follows attention or MLP, these keep their own input of the same size. The attention keeps
        query, key, value, output and the log-sum-exp; in bf16 on a CPU, where it is materialized, its probabilities.
        The feed-forward keeps gate, up, the activation and the product. What only the gradient of a weight needs is
        not kept if the weight is frozen: the normalized input, the norm's output and the product. Adapters need the
        latter two, and keep their own hidden values.
        """
        c, width = self.config, self.weight_bytes
        adapters = self.has_adapters and self.trained or {}
        inputs = trained + (trained and not adapters)  # tensors of the hidden size that a norm keeps for weights
        norms = 2 * ((4 + inputs * width) * c.hidden_size + 4)
        adapted = width * sum(shape[0] for name, shape in adapters.items() if name.startswith("model.layers.0.")
                              and name.endswith(A))
        attention = width * 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        if c.family.qk_norm:
            heads = c.num_attention_heads + c.num_key_value_heads
            norms += (4 + trained * (not adapters) * width) * heads * c.head_dim
            norms += 4 * (heads if c.family.qk_norm == "head" else 2)
        materialized = self.device == "cpu" and width == 2
        attention += c.num_attention_heads * (width * self.sample_tokens if materialized else 4)
        return norms + attention + width * (3 + trained) * c.intermediate_size + adapted

    def activations(self) -> float:
        """With checkpointing the input of each block and what one block keeps; otherwise what all blocks keep. Blocks
        below the first one that is trained keep nothing."""
        layers = range(self.config.num_hidden_layers)
        with_trained = [self.trained is None or any(name.startswith(f"model.layers.{layer}.") for name in self.trained)
                        for layer in layers]
        above = [layer for layer in layers if any(with_trained[:layer + 1])
                 or self.trained and "model.embed_tokens.weight" in self.trained]
        if self.gradient_checkpointing:
            inputs = len(above) * self.weight_bytes * self.config.hidden_size
            return self.max_tokens_per_microbatch * (inputs + 2 * self.block_activations())
        blocks = sum(self.block_activations(with_trained[layer]) for layer in above)
        return self.max_tokens_per_microbatch * (blocks + self.block_activations())

    def logits(self) -> float:
        """One chunk of the loss in fp32: the logits, and their log-softmax, which the gradient overwrites. With several
        chunks in bf16 also the head's gradient, as the fp32 sum and as the product that is added to it."""
        V, rows = self.config.vocab_size, chunk_rows(self.config.vocab_size, self.device)
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        head_is_trained = self.trained is None or head in self.trained
        summed = head_is_trained and self.weight_bytes == 2 and self.max_tokens_per_microbatch > rows
        return 8 * V * min(rows, self.max_tokens_per_microbatch) + 6 * summed * V * self.config.hidden_size

    def host(self) -> float:
        """Bytes of host memory of all processes together."""
        largest = 4 * self.config.vocab_size * self.config.hidden_size  # one tensor at a time is read or written
        # Offloaded: weights, moments and gradients in fp32, the weights in their dtype, and with ZeRO-3 a second copy
        # of the gradients.
        extra = self.weight_bytes if self.zero == 2 else self.weight_bytes + 4
        offloaded = (16 + extra + self.method_bytes) * self.num_trained if self.offload else 0
        if self.offload and self.zero == 3:
            offloaded += self.weight_bytes * self.num_frozen
        return self.processes * (RUNTIME["cpu"] + largest) + offloaded

    def disk(self, checkpoints: int) -> float:
        """Bytes on disk: final weights, epoch checkpoints, and the saved state, of which two may exist at a time."""
        left = {"ewc": 4, "vcl": 8}.get(self.method or "", 0)  # for the next task: Fisher information, or posterior
        return ((1 + checkpoints) * self.weight_bytes + left) * self.config.num_parameters + 2 * 12 * self.num_trained

    def step(self, tokens: int) -> Step:
        """A step of `tokens` tokens, in as few micro-steps as their most tokens allow."""
        per_process = math.ceil(tokens / self.processes)
        micro_steps = math.ceil(per_process / self.max_tokens_per_microbatch)
        return Step(self.config, self.processes, self.zero, math.ceil(per_process / micro_steps), micro_steps,
                    self.sample_tokens, self.num_trained, self.gradient_checkpointing, self.weight_bytes)


def read_plan(cfg: MemoryPlanConfig) -> tuple[MemoryPlan, dict[str, Any]]:
    """(the plan, its settings: those given in `cfg`, then those of the size's recipe, then train.py's defaults)."""
    recipe = read_config("size", cfg.size).get(cfg.recipe, {}) if cfg.size else {}
    method = read_config("method", cfg.method) if cfg.method else {}
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    settings = asdict(TrainConfig()) | recipe | method | given
    config = ModelConfig.read(fetch_checkpoint(cfg.init) / "config.json") if cfg.init else size_config(cfg.size or "")
    zero = default_zero_stage(cfg.processes, cfg.dtype) if settings["zero"] is None else settings["zero"]
    if cfg.offload and zero < 2:
        raise UserError(f"--offload needs --zero 2 or 3, not {zero}")
    config, trained = trained_parameters(config, cfg.method)
    plan = MemoryPlan(config, cfg.processes, zero, cfg.offload, cfg.dtype, settings["max_tokens_per_microbatch"],
                      settings["gradient_checkpointing"], cfg.device, cfg.method,
                      recipe.get("seq_length", cfg.sample_tokens), trained)
    return plan, settings


def trained_parameters(config: ModelConfig, method: str | None) -> tuple[ModelConfig, Shapes | None]:
    """(the configuration that a method trains, the parameters that it trains; None: all), at the first task."""
    cfg = load(TrainConfig, ["--task", "simp", "--init", "x", "--data", "x", "--out", "x", "--replay_text", "x",
                             *optional_flags(method=method)])
    layer_map = expansion(cfg, config, {}) or tuple(range(config.num_hidden_layers))
    config = config.with_layers(layer_map)
    return config, None if cfg.train == (ALL,) else \
        selected_shapes(cfg.train, config, cfg.lora, {NEW_LAYERS: new_layers(layer_map)}, cfg.init)


def alternatives(plan: MemoryPlan) -> Iterator[MemoryPlan]:
    """Plans that need less memory, ordered by how much time they cost."""
    for offload in (False, True):
        for tokens in (plan.max_tokens_per_microbatch, 4096, 2048):
            for zero in range(max(plan.zero, 2 * offload), 4):
                yield replace(plan, zero=zero, offload=offload, gradient_checkpointing=True,
                              max_tokens_per_microbatch=min(tokens, plan.max_tokens_per_microbatch))


def print_row(name: str, value: str, unit: str, note: str = "") -> None:
    """Prints a line of the table."""
    print(f"  {name:<29} {value:>18} {unit:<4}{note}".rstrip())


def print_time(plan: MemoryPlan, settings: dict[str, Any], cfg: MemoryPlanConfig) -> None:
    """Prints the time of a step by its parts, the speed, and the time of the run, for a range of `utilisation`."""
    gpu = GPUS[cfg.gpu]
    if cfg.network:
        gpu = replace(gpu, network=cfg.network * 1e9)
    slow, fast = (cfg.utilisation, cfg.utilisation) if cfg.utilisation else gpu.utilisation
    step = plan.step(settings["global_batch_size"] * plan.sample_tokens)
    tokens = step.processes * step.micro_steps * step.tokens

    def print_values(name: str, unit: str, digits: int, *values: float) -> None:
        """Prints the values that differ."""
        print_row(name, " to ".join(dict.fromkeys(f"{value:,.{digits}f}" for value in values)), unit)

    print(f"time of a step of {tokens:,} tokens, with {slow:.0%} to {fast:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s"
          f"{', without the transfers of offloading' if plan.offload else ''}")
    print_values(f"computation, {step.micro_steps} × {step.tokens:,} tokens", "s", 2,
                 *(step.micro_steps * step.computation(gpu, share) for share in (fast, slow)))
    communication = step.micro_steps * step.micro_communication(gpu) + step.final_communication(gpu)
    print_values("communication, in part hidden", "s", 2, communication)
    print_values("step", "s", 2, step.seconds(gpu, fast), step.seconds(gpu, slow))
    speeds = [step.tokens_per_second(gpu, share) for share in (slow, fast)]
    print_values("speed", "tokens/s", 0, *speeds)
    print_values("each GPU", "tokens/s", 0, *(speed / cfg.processes for speed in speeds))
    samples = (settings["max_train_samples"] or 0) * settings["num_train_epochs"]
    if total := cfg.tokens or settings["max_tokens"] or samples * cfg.sample_tokens:
        times = dict.fromkeys(format_duration(total / speed) for speed in reversed(speeds))
        print_row(f"{int(total):,} tokens", " to ".join(times), "")


def main(cfg: MemoryPlanConfig) -> None:
    """Prints the memory, disk and time of the run, and whether it fits."""
    plan, settings = read_plan(cfg)
    gpu_memory = cfg.gpu_memory or GPUS[cfg.gpu].memory
    on_or_off = {True: "on", False: "off"}
    print(f"{plan.config.num_parameters:,} parameters in {plan.dtype} on {plan.processes} × {plan.device}, ZeRO "
          f"{plan.zero}{', offloaded' if plan.offload else ''}, micro-batches of "
          f"{plan.max_tokens_per_microbatch:,} tokens, gradient checkpointing "
          f"{on_or_off[plan.gradient_checkpointing]}, reduction of gradients "
          f"{'' if plan.overlaps else 'not '}overlapped, blocks not compiled")
    if plan.trained is not None:
        print(f"{plan.num_trained:,} parameters are trained: {describe_selection(plan.trained, plan.config)}")
    print("\nmemory of each process")
    other = replace(plan, gradient_checkpointing=not plan.gradient_checkpointing)
    note = f"   {other.activations() / GIB:.2f} with gradient checkpointing {on_or_off[other.gradient_checkpointing]}"
    for name, size in plan.memory().items():
        print_row(name, f"{size / GIB:.2f}", "GiB", note if name == "activations" else "")
    print_row("peak", f"{plan.total() / GIB:.2f}", "GiB", f"of {gpu_memory:.0f}")
    print("elsewhere")
    print_row("host memory, all processes", f"{plan.host() / GIB:.2f}", "GiB")
    print_row("disk", f"{plan.disk(settings['save_total_limit']) / GIB:.2f}", "GiB")
    if cfg.device == "cuda":
        print_time(plan, settings, cfg)
    available = gpu_memory * GIB
    if plan.total() <= available:
        return print(f"it fits, with {(available - plan.total()) / GIB:.1f} GiB to spare")
    for fitting in alternatives(plan):
        if fitting.total() <= available:
            flags = " ".join(f"--{name} {str(getattr(fitting, name)).lower()}" for name in
                             ("zero", "offload", "gradient_checkpointing", "max_tokens_per_microbatch")
                             if getattr(fitting, name) != getattr(plan, name))
            return print(f"it does not fit: with {flags} it does, in {fitting.total() / GIB:.1f} GiB")
    print("it does not fit: take more processes, or GPUs with more memory")


if __name__ == "__main__":
    run((MemoryPlanConfig, main), __doc__)
