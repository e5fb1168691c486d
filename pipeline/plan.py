"""Whether a training run fits, and how long it takes.

    python -m pipeline.plan --size 7b --processes 8 --zero 3 --gpu a100
    python -m pipeline.plan --init DIR --processes 1 --zero 2 --offload

The memory is that of pipeline/memory_plan.py, the time that of pipeline/step_time.py.
"""
import common.preamble

import math
from dataclasses import dataclass, replace
from typing import Literal

from common.configs import CONFIGS, read_config
from common.files import UserError
from common.formatting import format_duration
from common.scripts import run
from common.settings import load, setting
from model.config import ModelConfig, size_config
from model.growth import new_layers
from model.hub import source_config
from pipeline import chain
from pipeline.memory_plan import FILLED, GIB, PREFIX_TOKENS, MemoryPlan, alternatives
from pipeline.pretraining import base_depth, flops_before_last_growth
from pipeline.step_time import GPUS, plan_step
from training.checks import expansion
from training.deepspeed_config import resolve_choices
from training.selection import ALL, NEW_LAYERS, Shapes, describe_selection, selected_shapes
from training.train_config import TrainConfig


@dataclass(frozen=True)
class PlanConfig:
    """Settings of a plan. Those that are not given are those of the run: of its recipe, its size and its method."""
    size: str | None = setting(None, "size preset (a file in configs/size): the shape of the model, and the recipe",
                               names="size")
    init: str | None = setting(None, "checkpoint with the shape of the model: a directory or a Hub id")
    phase: Literal["base", "stack", "llm", "finetune"] = setting("finetune", "table of the size's file to read")
    processes: int = setting(1, "processes, one per GPU", at_least=1, at_most=1 << 20)
    zero: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage")
    offload: bool | None = setting(None, "keep the optimizer, with ZeRO-3 also the weights, in host memory")
    dtype: Literal["bf16", "fp32"] | None = setting(None, "weights; none: the recipe's, or bf16")
    max_tokens_per_microbatch: int | None = setting(None, "most tokens in a micro-batch, padding included", at_least=1,
                                                    at_most=1 << 30)
    gradient_checkpointing: bool | None = setting(None, "recompute blocks in the backward pass")
    method: str | None = setting(None, "method against forgetting (a file in configs/method); settings of train.py may "
                                       "follow: lora:lora_rank=8")
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
        found = [] if self.size or self.init else ["neither --size nor --init says which model to train"]
        if self.phase != "finetune" and not self.size:
            found.append(f"the phase {self.phase} is a table of a size's file: give --size")
        if self.phase != "finetune" and self.method:
            found.append(f"a method is for fine-tuning, and the phase is {self.phase}: leave one of them out")
        return found


# Settings of train.py that a plan can change, and those that take time without being in the plan.
PLANNED = "zero", "offload", "dtype", "max_tokens_per_microbatch", "gradient_checkpointing"
SLOWER = "rehearsal", "replay_share", "self_replay_kl", "input_kl", "ewc_strength"


def run_settings(cfg: PlanConfig) -> TrainConfig:
    """The settings with which train.py would make the run, in bf16 if none of them says otherwise. Raises UserError if
    they are not valid."""
    recipe = "finetune" if cfg.phase == "finetune" else "pretrain"
    flags = ["--config", CONFIGS / f"train/{recipe}.toml", "--data", "x", "--out", "x", "--replay_text", "x"]
    flags += ["--task", "simp", "--init", "m0"] if cfg.phase == "finetune" else []
    flags += ["--size", cfg.size, "--phase", cfg.phase] if cfg.size else []
    flags += chain.method_flags(cfg.method) if cfg.method else []
    flags += [word for name in PLANNED if (value := getattr(cfg, name)) is not None for word in (f"--{name}", value)]
    settings = load(TrainConfig, [str(word).lower() if isinstance(word, bool) else str(word) for word in flags])
    return resolve_choices(replace(settings, dtype="bf16") if settings.dtype == "auto" else settings, cfg.processes)


def read_plan(cfg: PlanConfig) -> tuple[MemoryPlan, TrainConfig]:
    """(the plan, the settings of the run)."""
    settings = run_settings(cfg)
    assert settings.zero is not None
    config = source_config(cfg.init) if cfg.init else planned_config(cfg)
    config, trained = trained_parameters(config, settings)
    tunes = cfg.phase == "finetune"
    longest = settings.max_source_length + settings.max_target_length if tunes else settings.seq_length
    tokens_per_process = math.ceil(settings.global_batch_size / cfg.processes) * longest
    return MemoryPlan(config, cfg.processes, settings.zero, settings.offload, settings.dtype,
                      max_tokens_per_microbatch=min(settings.max_tokens_per_microbatch, tokens_per_process),
                      gradient_checkpointing=settings.gradient_checkpointing, device=cfg.device, settings=settings,
                      sample_tokens=cfg.sample_tokens if tunes else settings.seq_length,
                      prefix_tokens=min(PREFIX_TOKENS, cfg.sample_tokens // 2) if tunes else 0,
                      trained=trained), settings


def planned_config(cfg: PlanConfig) -> ModelConfig:
    """The configuration of the size's model, in the phase base that of the base; of a size without a table
    [model] that of its published models."""
    table = read_config("size", str(cfg.size))
    if "model" not in table:
        try:
            return source_config(next(iter(table["hub"].values())))
        except UserError as error:
            raise UserError(f"{error}. Or give a directory with the shape of the model as --init, or INIT") from None
    return size_config(str(cfg.size), base_depth(str(cfg.size)) if cfg.phase == "base" else None)


def trained_parameters(config: ModelConfig, cfg: TrainConfig) -> tuple[ModelConfig, Shapes | None]:
    """(the configuration of the model that is trained, the parameters that are; None: all), at the first task. Raises
    UserError if the settings name parameters that the model does not have."""
    layer_map = expansion(cfg, config, {}) or tuple(range(config.num_hidden_layers))
    config = config.with_layers(layer_map)
    return config, None if cfg.train == (ALL,) else \
        selected_shapes(cfg.train, config, cfg.lora, {NEW_LAYERS: new_layers(layer_map)}, cfg.init)


def print_row(name: str, value: str, unit: str, note: str = "") -> None:
    """Prints a line of the table."""
    print(f"  {name:<29} {value:>18} {unit:<4}{note}".rstrip())


def print_time(plan: MemoryPlan, settings: TrainConfig, cfg: PlanConfig) -> None:
    """Prints the time of a step by its parts, the speed, and the time of the run, for a range of `utilisation`."""
    gpu = GPUS[cfg.gpu]
    if cfg.network:
        gpu = replace(gpu, network=cfg.network * 1e9)
    slow, fast = (cfg.utilisation, cfg.utilisation) if cfg.utilisation else gpu.utilisation
    step = plan_step(plan, settings.global_batch_size)
    tokens = settings.global_batch_size * plan.sample_tokens

    def print_values(name: str, unit: str, digits: int, *values: float) -> None:
        """Prints the values that differ."""
        print_row(name, " to ".join(dict.fromkeys(f"{value:,.{digits}f}" for value in values)), unit)

    shares = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (slow, fast)))
    print(f"time of a step of {tokens:,} tokens, with {shares} of {gpu.flops / 1e12:,.0f} TFLOP/s"
          f"{', without the transfers of offloading' if plan.offload else ''}"
          f"{', without what the method adds' if any(getattr(settings, name) for name in SLOWER) else ''}")
    print_values(f"computation, {step.micro_steps} × {step.tokens:,} tokens", "s", 2,
                 *(step.micro_steps * step.computation(gpu, share) for share in (fast, slow)))
    communication = step.micro_steps * step.micro_communication(gpu) + step.final_communication(gpu)
    print_values("communication, in part hidden", "s", 2, communication)
    print_values("step", "s", 2, step.seconds(gpu, fast), step.seconds(gpu, slow))
    speeds = [tokens / step.seconds(gpu, share) for share in (slow, fast)]
    print_values("speed", "tokens/s", 0, *speeds)
    print_values("each GPU", "tokens/s", 0, *(speed / cfg.processes for speed in speeds))
    samples = (settings.max_train_samples or 0) * settings.num_train_epochs
    spent = flops_before_last_growth(str(cfg.size)) if cfg.phase == "stack" else 0.0
    tokens_of_budget = (settings.max_flops - spent) / plan.config.flops(1) if settings.max_flops else 0
    if total := cfg.tokens or settings.max_tokens or tokens_of_budget or samples * cfg.sample_tokens:
        times = dict.fromkeys(format_duration(total / speed) for speed in reversed(speeds))
        print_row(f"{int(total):,} tokens", " to ".join(times), "")


def main(cfg: PlanConfig) -> None:
    """Prints the memory, disk and time of the run, and whether it fits."""
    plan, settings = read_plan(cfg)
    gpu_memory, has_limit = cfg.gpu_memory or GPUS[cfg.gpu].memory, cfg.device == "cuda" or bool(cfg.gpu_memory)
    on_or_off = {True: "on", False: "off"}
    print(f"{plan.config.num_parameters:,} parameters in {plan.dtype} on {plan.processes} × {plan.device}, ZeRO "
          f"{plan.zero}{', offloaded' if plan.offload else ''}, micro-batches of at most "
          f"{plan.max_tokens_per_microbatch:,} tokens, gradient checkpointing "
          f"{on_or_off[plan.gradient_checkpointing]}, reduction of gradients "
          f"{'' if plan.overlaps else 'not '}overlapped, blocks not compiled")
    if plan.trained is not None:
        print(f"{plan.num_trained:,} parameters are trained: {describe_selection(plan.trained, plan.config)}")
    title = "fine-tuning" if cfg.phase == "finetune" else f"pretraining of {cfg.phase}"
    print(f"\n{title}, samples of {plan.sample_tokens:,} tokens\nmemory of each process")
    other = replace(plan, gradient_checkpointing=not plan.gradient_checkpointing)
    note = f"   {other.activations() / GIB:.2f} with gradient checkpointing {on_or_off[other.gradient_checkpointing]}"
    for name, size in plan.memory().items():
        print_row(name, f"{size / GIB:.2f}", "GiB", note if name == "activations" else "")
    print_row("peak", f"{plan.total() / GIB:.2f}", "GiB", f"of {gpu_memory:.0f}" if has_limit else "")
    print("elsewhere")
    print_row("host memory, all processes", f"{plan.host() / GIB:.2f}", "GiB")
    print_row("disk", f"{plan.disk(settings.save_total_limit) / GIB:.2f}", "GiB")
    if cfg.device == "cuda":
        print_time(plan, settings, cfg)
    if not has_limit:
        print(f"all processes together: {cfg.processes * plan.total() / GIB:.1f} GiB of this machine's memory")
        return
    if plan.fits(gpu_memory):
        print(f"it fits, with {gpu_memory - plan.total() / GIB:.1f} GiB to spare")
        return
    limit = f"it does not fit in {FILLED:.0%} of the memory"
    for fitting in alternatives(plan):
        if fitting.fits(gpu_memory):
            flags = " ".join(f"--{name} {str(getattr(fitting, name)).lower()}" for name in
                             ("zero", "offload", "gradient_checkpointing", "max_tokens_per_microbatch")
                             if getattr(fitting, name) != getattr(plan, name))
            print(f"{limit}: with {flags} it does, in {fitting.total() / GIB:.1f} GiB")
            return
    print(f"{limit}: take more processes, or GPUs with more memory")


if __name__ == "__main__":
    run((PlanConfig, main), __doc__)
