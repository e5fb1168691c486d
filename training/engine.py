"""What a training run is built from: checked input, model, samples and engine. The loop over them is train.py."""
import contextlib
import os
import warnings

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from common.distributed import resolve_dtype
from common.files import UserError, read_json
from common.settings import CONFIGS, model_shape
from model.checkpoint import Weights, assemble
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, initial_weights
from training.methods import make_optimizer


def build_model(cfg, source, dist):
    """The tokenizer and the model, on the device and in the dtype of the run.

    Weights are read or made one tensor at a time. Under ZeRO-3 rank 0 alone does so, and each process keeps its share
    of each tensor before the next one comes, so that none ever holds the model.
    """
    tokenizer, dtype = Tokenizer(source), torch.bfloat16 if resolve_dtype(cfg.dtype) == "bf16" else torch.float32
    config = ModelConfig.read(source / "config.json") if cfg.init else new_config(cfg, tokenizer)
    weights = read_weights(source, config) if cfg.init else initial_weights(config, cfg.seed)
    if zero_stage(cfg, dist) == 3:
        model = assemble_sharded(config, weights, dtype, dist, deepspeed_config(cfg, dist))
    else:
        model = assemble(config, ((name, tensor.to(device=dist.device, dtype=dtype)) for name, tensor in weights))
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    return tokenizer, model.train()


def read_weights(source, config):
    """The weights of a checkpoint, as pairs (name, tensor) in the order of the model; one is held at a time."""
    weights = Weights(source)
    return ((name, weights[name]) for name in weights.check(config))


def assemble_sharded(config, weights, dtype, dist, config_of_deepspeed):
    """A Transformer whose parameters are spread over the processes as ZeRO-3 wants them, one module after another.

    DeepSpeed sends rank 0's tensor to the others, which have an empty one, and each keeps its slice.
    """
    deepspeed = import_deepspeed(dist)
    with torch.device("meta"):
        model = Transformer(config)
    tied = {model.lm_head} if config.tie_word_embeddings else set()
    for module in model.modules():
        if module in tied:
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            tensor = next(weights)[1].to(dtype) if dist.rank == 0 else torch.empty(parameter.shape, dtype=dtype)
            setattr(module, leaf, torch.nn.Parameter(tensor.to(dist.device)))
        if not list(module.children()):
            deepspeed.zero.Init(module=module, config_dict_or_path=config_of_deepspeed)
    model.tie_weights()
    return model


def zero_stage(cfg, dist):
    """The ZeRO stage of the run: as set, or of its DeepSpeed file, or the cheapest that dtype and processes allow."""
    if cfg.zero is not None:
        return cfg.zero
    if cfg.deepspeed and "zero_optimization" in (given := read_json(cfg.deepspeed)):
        return given["zero_optimization"].get("stage", 0)
    return 0 if dist.world_size == 1 and resolve_dtype(cfg.dtype) == "fp32" else 1


def build_engine(cfg, model, dist):
    """The DeepSpeed engine: the optimizer on two groups, since only matrices decay, under the ZeRO stage of the run.

    Master weights, moments and accumulated gradients are fp32. DeepSpeed's own schedule and loss scaling by
    accumulation steps are not used: the loop below sets the rate and the weight of each micro-batch.
    """
    deepspeed = import_deepspeed(dist)
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}  # as it was before ZeRO-3 spread it
    matrices = [parameter for parameter, shape in shapes.items() if len(shape) == 2]
    vectors = [parameter for parameter, shape in shapes.items() if len(shape) != 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = make_optimizer(cfg, groups)
    with contextlib.redirect_stdout(None):  # one of its optimizers prints a page about memory
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(cfg, dist))[0]
    if dist.world_size == 1 and not hasattr(engine.optimizer, "overlapping_partition_gradients_reduce_epilogue"):
        engine.enable_backward_allreduce = False  # alone, DeepSpeed would copy all gradients into one tensor and back
    _set_pg_timeout(dist.timeout, engine.seq_data_parallel_group)  # its own group has torch's half an hour
    return engine


def import_deepspeed(dist):
    """The package deepspeed, made quiet, and the process, ready to train on the device of the run."""
    os.environ.setdefault("DS_ACCELERATOR", dist.device.type)
    import deepspeed
    deepspeed.utils.logger.setLevel("ERROR")
    if dist.device.type == "cpu":
        # DeepSpeed would compile a C++ library for reductions in shared memory; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # oneDNN compiles kernels for a shape, and every micro-batch has some 20 of its own. By default it keeps those
        # of 1,024 shapes, and torch, above it, as many: gigabytes.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "64")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    return deepspeed


def deepspeed_config(cfg, dist):
    """What DeepSpeed is told: the file of the run's ZeRO stage, and what the run's own settings say.

    Raises UserError where a file of the user's contradicts those settings.
    """
    stage = zero_stage(cfg, dist)
    path = cfg.deepspeed or CONFIGS / "deepspeed" / f"zero{stage}{'_offload' if cfg.offload else ''}.json"
    given, mine = read_json(path), {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,  # the loop decides, see train_step()
        "gradient_clipping": cfg.max_grad_norm if stage else 0.0,  # without ZeRO the loop clips itself
        "bf16": {"enabled": resolve_dtype(cfg.dtype) == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,  # the optimizer is torch's
        "zero_optimization": {"stage": stage},
    }
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected an object with DeepSpeed's settings")
    problems = contradictions(given, mine | {"train_batch_size": cfg.global_batch_size})
    given.pop("train_batch_size", None)  # DeepSpeed would work out from it how many micro-steps to wait for
    problems += [f"{name} is set, but train.py has its own" for name in ("optimizer", "scheduler", "fp16", "amp")
                 if name in given and given[name] != {"enabled": False}]
    if problems:
        raise UserError(f"{path} contradicts the run's settings: {'; '.join(problems)}")
    return merged(given, mine)


def contradictions(given, mine, where=""):
    """Values of a DeepSpeed file that differ from the run's own, as sentences; "auto" stands for the run's own."""
    found = []
    for name, value in mine.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            found += contradictions(given[name], value, f"{where}{name}.")
        elif given.get(name, "auto") not in ("auto", value):
            found.append(f"{where}{name} is {given[name]!r} there and {value!r} by the run's settings")
    return found


def merged(given, mine):
    """The file's settings with the run's own over them; what is "auto" there is left to DeepSpeed."""
    result = dict(mine)
    for name, value in given.items():
        if isinstance(value, dict):
            result[name] = merged(value, mine.get(name, {}))
        elif value != "auto" and name not in mine:
            result[name] = value
    return result


def new_config(cfg, tokenizer):
    """The shape of new weights: the size's, with the number of layers that was asked for."""
    return ModelConfig(**model_shape(cfg.size, cfg.num_hidden_layers), bos_token_id=tokenizer.bos_id,
                       eos_token_id=tokenizer.eos_id)
