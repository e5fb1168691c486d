"""What a training run is built from: checked input, model, samples and engine. The loop over them is train.py."""
import contextlib
import dataclasses
import os
import warnings
from pathlib import Path

import torch

from batches import TaskData, TokenShards, data_digest, read_task
from distributed import weights_dtype
from model.checkpoint import Weights, check_vocabulary, checkpoint_digest, load_model, locate
from model.config import ModelConfig
from model.files import UserError, read_json
from model.tokenizer import Tokenizer, same_tokenizer
from model.transformer import Transformer
from runs import describe, history, is_finished
from settings import CONFIGS, model_shape


def prepare(s, world):
    """Rank 0's work before anything is loaded: checks data and weights.

    Returns what run.json will say of the run, and whether it was finished before.
    """
    data = Path(s.data)
    if s.task and not data.is_file():
        raise UserError(f"{s.data} does not exist or is not a preprocessed task file: make it with data_prep.py, or "
                        "`make data`")
    digest = data_digest(s.data)
    defaults = dataclasses.asdict(type(s)())
    resolved = dataclasses.asdict(s) | {"dtype": weights_dtype(s), "zero": zero_stage(s, world)}
    facts = {"processes": world.size, "device": world.device.type}
    if Path(s.out).exists() and s.init and not Path(s.init).is_dir():  # a finished stage outlives what it came from
        parent = read_json(Path(s.out) / "run.json").get("parent_digest")
        return None, is_finished(s.out, describe(resolved, parent, digest), defaults)
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
    run = describe(resolved, checkpoint_digest(source) if s.init else None, digest, **facts)
    return run, is_finished(s.out, run, defaults)


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
    return ModelConfig(**model_shape(s.size, s.num_hidden_layers), bos_token_id=tokenizer.bos_id,
                       eos_token_id=tokenizer.eos_id)


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
