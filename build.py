"""What a training run is built from: checked input, model, samples and engine. The loop over them is train.py."""
import contextlib
import dataclasses
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from batches import TaskData, TokenShards, data_digest, read_task
from distributed import weights_dtype
from methods import check_method, make_optimizer, taken
from model.checkpoint import Weights, assemble, check_vocabulary, checkpoint_digest, locate
from model.config import ModelConfig
from model.files import UserError, read_json
from model.tokenizer import Tokenizer, same_tokenizer
from model.transformer import Transformer, initial_weights
from runs import describe, history, is_finished, optional
from settings import CONFIGS, model_shape


def prepare(s, world):
    """Rank 0's work before anything is loaded: checks data and weights.

    Returns what run.json will say of the run, and whether it was finished before.
    """
    data = Path(s.data)
    if s.tensorboard:
        optional("tensorboard")
    if s.wandb:
        optional("wandb")
    if s.task and not data.is_file():
        raise UserError(f"{s.data} does not exist or is not a preprocessed task file: make it with data_prep.py, or "
                        "`make data`")
    digest = data_digest(s.data)
    defaults = dataclasses.asdict(type(s)())
    resolved = dataclasses.asdict(s) | {"dtype": weights_dtype(s), "zero": zero_stage(s, world)}
    facts = {"processes": world.size, "device": world.device.type}
    if Path(s.out).exists() and s.init and not Path(s.init).is_dir():  # a finished stage outlives what it came from
        recorded = read_json(Path(s.out) / "run.json")
        run = describe(resolved, recorded.get("parent_digest"), digest, rehearsed=recorded.get("rehearsed"))
        return None, is_finished(s.out, run, defaults)
    if s.task and (dropped := read_task(s.data)[1]):
        more = f" and {len(dropped) - 20} more" if len(dropped) > 20 else ""
        print(f"{s.data}: {len(dropped)} samples have no target and are left out: {', '.join(dropped[:20])}{more}")
    deepspeed_config(s, world)
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
    if s.rehearsal:
        facts["rehearsed"] = [task["data_digest"] for task in earlier_tasks(s, past)]
    run = describe(resolved, checkpoint_digest(source, taken(s)) if s.init else None, digest, **facts)
    finished = is_finished(s.out, run, defaults)
    if not finished:
        check_earlier_tasks(s, past)
        check_method(s, source, config, past)
    return run, finished


def check_same_data(s, past, world):
    """Fails where a process sees other data than rank 0, such as an old copy on its own disk."""
    earlier = earlier_tasks(s, past) if s.rehearsal else []
    for path in (s.data, *(task["data"] for task in earlier)):
        digests = world.gather(world.on_all(lambda path=path: data_digest(path)))
        world.on_main(lambda path=path, digests=digests: compare_digests(path, digests))


def earlier_tasks(s, past):
    """The tasks that rehearsal takes samples of, as the checkpoint's history has them: all but the run's own, each as
    it was learned last. Raises UserError where there is none."""
    if not past.get("tasks"):
        raise UserError(f"rehearsal is set, but {s.init} was fine-tuned on no task before: leave it out for the first "
                        "task (--rehearsal 0)")
    found = {task["data_digest"]: task for task in past["tasks"]}
    return [task for key, task in found.items() if key != data_digest(s.data)]


def check_earlier_tasks(s, past):
    """Raises UserError where the data of a task that is to be rehearsed is gone, or has changed."""
    for task in earlier_tasks(s, past) if s.rehearsal else ():
        path = task["data"]
        if not Path(path).is_file() or data_digest(path) != task["data_digest"]:
            what = "has changed since" if Path(path).is_file() else "does not exist any more"
            raise UserError(f"rehearsal needs {path}, which {task['task']} was learned from, but it {what}: make it as "
                            "it was")


def rehearsed(s, past):
    """The training items of the earlier tasks that are trained on again: of each the share that was asked for."""
    items = []
    for number, task in enumerate(earlier_tasks(s, past) if s.rehearsal else ()):
        there = read_task(task["data"])[0]["train"][:task["max_train_samples"]]
        count = max(1, round(s.rehearsal * len(there)))
        items += [there[index] for index in np.random.default_rng([s.seed, number]).permutation(len(there))[:count]]
    return items


def compare_digests(path, digests):
    """Raises UserError where the digests that the processes found for the data differ."""
    other = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if other:
        raise UserError(f"{path} is not the same on all nodes: digest {digests[0]:.12} on rank 0, "
                        f"{digests[other[0]]:.12} on rank {other[0]}: copy it there again, or use a shared folder")


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


def task_of(s):
    """What the next tasks have to know of a run's own, to train on its samples again."""
    return {"task": s.task, "data": str(s.data), "data_digest": data_digest(s.data),
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
    return ModelConfig(**model_shape(s.size, s.num_hidden_layers), bos_token_id=tokenizer.bos_id,
                       eos_token_id=tokenizer.eos_id)


def build_model(s, source, world):
    """The tokenizer and the model, on the device and in the dtype of the run.

    Weights are read or made one tensor at a time. Under ZeRO-3 rank 0 alone does so, and each process keeps its share
    of each tensor before the next one comes, so that none ever holds the model.
    """
    tokenizer, dtype = Tokenizer(source), torch.bfloat16 if weights_dtype(s) == "bf16" else torch.float32
    config = ModelConfig.read(source / "config.json") if s.init else new_config(s, tokenizer)
    weights = read_weights(source, config) if s.init else initial_weights(config, s.seed)
    if zero_stage(s, world) == 3:
        model = assemble_sharded(config, weights, dtype, world, deepspeed_config(s, world))
    else:
        model = assemble(config, ((name, tensor.to(device=world.device, dtype=dtype)) for name, tensor in weights))
    model.model.gradient_checkpointing = s.gradient_checkpointing
    return tokenizer, model.train()


def read_weights(source, config):
    """The weights of a checkpoint, as pairs (name, tensor) in the order of the model; one is held at a time."""
    weights = Weights(source)
    return ((name, weights[name]) for name in weights.check(config))


def assemble_sharded(config, weights, dtype, world, config_of_deepspeed):
    """A Transformer whose parameters are spread over the processes as ZeRO-3 wants them, one module after another.

    DeepSpeed sends rank 0's tensor to the others, which have an empty one, and each keeps its slice.
    """
    deepspeed = import_deepspeed(world)
    with torch.device("meta"):
        model = Transformer(config)
    tied = {model.lm_head} if config.tie_word_embeddings else set()
    for module in model.modules():
        if module in tied:
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            tensor = next(weights)[1].to(dtype) if world.rank == 0 else torch.empty(parameter.shape, dtype=dtype)
            setattr(module, leaf, torch.nn.Parameter(tensor.to(world.device)))
        if not list(module.children()):
            deepspeed.zero.Init(module=module, config_dict_or_path=config_of_deepspeed)
    model.tie_weights()
    return model


def zero_stage(s, world):
    """The ZeRO stage of the run: as set, or of its DeepSpeed file, or the cheapest that dtype and processes allow."""
    if s.zero is not None:
        return s.zero
    if s.deepspeed and "zero_optimization" in (given := read_json(s.deepspeed)):
        return given["zero_optimization"].get("stage", 0)
    return 0 if world.size == 1 and weights_dtype(s) == "fp32" else 1


def load_data(s, past, tokenizer, config, world):
    """The samples: {"train", "eval"} to index, and for a task {"test"}, its raw items."""
    if s.task:
        splits, _ = read_task(s.data)
        lengths = s.max_source_length, s.max_target_length
        again = rehearsed(s, past)
        data = {"train": TaskData(splits["train"][:s.max_train_samples] + again, tokenizer, *lengths,
                                  s.train_on_source),
                "eval": TaskData(splits["eval"][:s.max_eval_samples], tokenizer, *lengths),
                "test": splits["test"]}
    else:
        data = {"train": TokenShards(s.data, "train", s.seq_length, s.max_train_samples),
                "eval": TokenShards(s.data, "val", s.seq_length, s.max_eval_samples), "test": []}
    world.say(f"model: {config.num_parameters:,} parameters, {config.num_hidden_layers} layers, "
              f"{weights_dtype(s)} on {world.size} × {world.device.type}; "
              f"{len(data['train']):,} training samples"
              + (f", {len(again):,} of them of earlier tasks" if s.task and again else "")
              + f", {len(data['eval']):,} to evaluate on")
    return data


def build_engine(s, model, world):
    """The DeepSpeed engine: the optimizer on two groups, since only matrices decay, under the ZeRO stage of the run.

    Master weights, moments and accumulated gradients are fp32. DeepSpeed's own schedule and loss scaling by
    accumulation steps are not used: the loop below sets the rate and the weight of each micro-batch.
    """
    deepspeed = import_deepspeed(world)
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}  # as it was before ZeRO-3 spread it
    matrices = [parameter for parameter, shape in shapes.items() if len(shape) == 2]
    vectors = [parameter for parameter, shape in shapes.items() if len(shape) != 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = make_optimizer(s, groups)
    with contextlib.redirect_stdout(None):  # one of its optimizers prints a page about memory
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(s, world))[0]
    if world.size == 1 and not hasattr(engine.optimizer, "overlapping_partition_gradients_reduce_epilogue"):
        engine.enable_backward_allreduce = False  # alone, DeepSpeed would copy all gradients into one tensor and back
    _set_pg_timeout(world.timeout, engine.seq_data_parallel_group)  # its own group has torch's half an hour
    return engine


def import_deepspeed(world):
    """The package deepspeed, made quiet, and the process, ready to train on the device of the run."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed
    deepspeed.utils.logger.setLevel("ERROR")
    if world.device.type == "cpu":
        # DeepSpeed would compile a C++ library for reductions in shared memory; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # oneDNN compiles kernels for a shape, and every micro-batch has some 20 of its own. By default it keeps those
        # of 1,024 shapes, and torch, above it, as many: gigabytes.
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "64")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    return deepspeed


def deepspeed_config(s, world):
    """What DeepSpeed is told: the file of the run's ZeRO stage, and what the run's own settings say.

    Raises UserError where a file of the user's contradicts those settings.
    """
    stage = zero_stage(s, world)
    path = s.deepspeed or CONFIGS / "deepspeed" / f"zero{stage}{'_offload' if s.offload else ''}.json"
    given, mine = read_json(path), {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,  # the loop decides, see take_step()
        "gradient_clipping": s.max_grad_norm if stage else 0.0,  # without ZeRO the loop clips itself
        "bf16": {"enabled": weights_dtype(s) == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,  # the optimizer is torch's
        "zero_optimization": {"stage": stage},
    }
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected an object with DeepSpeed's settings")
    problems = contradictions(given, mine | {"train_batch_size": s.global_batch_size})
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
