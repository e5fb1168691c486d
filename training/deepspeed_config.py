"""The DeepSpeed configuration of a run, and the import of deepspeed."""
import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from common.configs import CONFIGS
from common.dtypes import resolve_dtype
from common.files import JSON_NAMES, UserError, is_number, read_json
from training.train_config import TrainConfig, default_zero_stage

# Switches of DeepSpeed that keep in bf16 what is kept in fp32 here.
BF16_STATES = "bf16_master_weights_and_grads", "bf16_optimizer_states"

# Values that a DeepSpeed file cannot change: others change the arithmetic, or the places of weights and moments that
# zero_shards.py computes, or are not supported.
FIXED = {
    "torch_autocast": {"enabled": False}, "prescale_gradients": False, "gradient_predivide_factor": 1.0,
    "zero_optimization": {
        "round_robin_gradients": False, "parameter_alignment": False, "legacy_stage1": False, "compute_grad_norm": True,
        "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False, "offload_optimizer": {"ratio": 1.0, "super_offload": False}}}
OWN_PARTS = "optimizer", "scheduler", "fp16", "amp"
NOT_SUPPORTED = ("tensor_parallel", "pipeline", "elasticity", "compression_training", "data_efficiency",
                 "curriculum_learning", "progressive_layer_drop", "quantize_training", "hybrid_engine")


def import_deepspeed(device: torch.device) -> ModuleType:
    """Imports deepspeed, silences it, and prepares the process for training on a device."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    # When ZeRO starts, DeepSpeed imports an optimizer that is not used here, three functions of which it compiles. That
    # alone would import PyTorch's compiler, which takes two seconds.
    compile_function, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    import deepspeed.runtime.zero.muon.original_muon
    torch.compile = compile_function
    deepspeed.utils.logger.setLevel("ERROR")
    if device.type == "cpu":
        # DeepSpeed would compile a C++ library for reductions in shared memory; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    return deepspeed


def resolve_zero_stage(cfg: TrainConfig, world_size: int) -> int:
    """The ZeRO stage of a run: the setting, else that of its DeepSpeed file, else the default."""
    if cfg.zero is not None:
        return cfg.zero
    given = read_json(cfg.deepspeed, dict) if cfg.deepspeed else {}
    if "zero_optimization" in given:
        stage = given["zero_optimization"].get("stage", 0) if isinstance(given["zero_optimization"], dict) else None
        if type(stage) is not int or stage not in range(4):
            raise UserError(f"{cfg.deepspeed}: zero_optimization is {given['zero_optimization']!r:.80}, expected an "
                            "object with a stage from 0 to 3")
        return stage
    return default_zero_stage(world_size, resolve_dtype(cfg.dtype))


def resolve_choices(cfg: TrainConfig, world_size: int) -> TrainConfig:
    """The settings with `dtype` and `zero` resolved. Raises UserError if these contradict the others."""
    choices: dict[str, Any] = {"dtype": resolve_dtype(cfg.dtype), "zero": resolve_zero_stage(cfg, world_size)}
    resolved = replace(cfg, **choices)
    if problems := resolved.problems():
        raise UserError((f"{cfg.deepspeed}: " if cfg.deepspeed else "") + "; ".join(problems))
    return resolved


def deepspeed_config(cfg: TrainConfig) -> dict[str, Any]:
    """The configuration passed to DeepSpeed: the file of the run's ZeRO stage, and the run's own settings.

    cfg: settings with `dtype` and `zero` resolved. Raises UserError if the file contradicts the settings.
    """
    path = cfg.deepspeed or CONFIGS / "deepspeed" / f"zero{cfg.zero}{'_offload' if cfg.offload else ''}.json"
    given = read_json(path, dict)
    own = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,  # train_step decides both
        "gradient_clipping": cfg.max_grad_norm if cfg.zero else 0.0,  # without ZeRO optimizer_step clips
        "bf16": {"enabled": cfg.dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,  # the optimizer is PyTorch's
        "zero_optimization": {"stage": cfg.zero},
        "timers": {"throughput": {"enabled": False}},  # which waits for the GPU before and after every micro-step
    }
    problems = contradictions(given, own | {"train_batch_size": cfg.global_batch_size,
                                            "gradient_clipping": cfg.max_grad_norm}) + contradictions(given, FIXED)
    given.pop("train_batch_size", None)  # DeepSpeed would derive from it how many micro-steps to wait for
    given.pop("steps_per_print", None)  # import_deepspeed silences these lines
    problems += [f"{name} is set, but train.py has its own" for name in OWN_PARTS if is_on(given, name)]
    problems += [f"{name} is set, which train.py does not support" for name in NOT_SUPPORTED if is_on(given, name)]
    problems += [f"bf16.{name} is set, but master weights and moments are kept in fp32" for name in BF16_STATES
                 if section(given, "bf16").get(name)]
    problems += [f"zero_optimization.{name}.device is nvme, expected cpu: weights and moments are saved from memory"
                 for name in ("offload_optimizer", "offload_param")
                 if section(section(given, "zero_optimization"), name).get("device") == "nvme"]
    if problems:
        raise UserError(f"{path} contradicts the run's settings: {'; '.join(problems)}")
    return merge(given, own)


def is_on(given: Mapping[str, Any], name: str) -> bool:
    """Whether a DeepSpeed file has a part that is not switched off; "auto", as in templates, leaves it off."""
    return name in given and section(given, name).get("enabled", True) not in (False, "auto")


def section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a DeepSpeed file; empty if it is missing, or not an object, which DeepSpeed itself reports."""
    return given[name] if isinstance(given.get(name), dict) else {}


def check_deepspeed_config(config: dict[str, Any], device: torch.device) -> None:
    """Raises UserError if DeepSpeed does not accept a configuration."""
    import_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig
    defaults = vars(DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}))
    try:
        DeepSpeedConfig(copy.deepcopy(config))
        for name, value in config.items():  # DeepSpeed itself checks the types in its sections only
            if isinstance(default := defaults.get(name), bool) and not isinstance(value, bool) or \
                    is_number(default) and not is_number(value):
                raise TypeError(f"{name} is {value!r}, expected {JSON_NAMES[type(default)]}")
    except Exception as error:  # of pydantic, and assertions, for wrong types and unknown names
        reason = " ".join(str(error).split())
        raise UserError(f"DeepSpeed does not accept its configuration: {reason:.300}") from None


def contradictions(given: Mapping[str, Any], own: Mapping[str, Any], where: str = "") -> list[str]:
    """Values of a DeepSpeed file that differ from the run's own, as sentences; "auto" never differs."""
    found = []
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            found += contradictions(given[name], value, f"{where}{name}.")
        elif given.get(name, "auto") not in ("auto", value):
            found.append(f"{where}{name} is {given[name]!r} there and {value!r} by the run's settings")
    return found


def merge(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings overridden by the run's own; those that are "auto" are left to DeepSpeed."""
    result = dict(own)
    for name, value in given.items():
        if isinstance(value, dict):
            result[name] = merge(value, own.get(name, {}))
        elif value != "auto" and name not in own:
            result[name] = value
    return result
