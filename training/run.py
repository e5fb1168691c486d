"""What is checked and resolved once, before a training run starts."""
import dataclasses
from pathlib import Path

from common.distributed import resolve_dtype
from common.files import UserError, read_json
from common.metrics_log import optional
from common.provenance import data_digest, describe, lineage
from corpus.tasks import read_task
from model.checkpoint import Weights, check_vocabulary, checkpoint_digest
from model.config import ModelConfig
from model.hub import locate
from model.tokenizer import Tokenizer, same_tokenizer
from training.data import first_sample, samples_to_train
from training.engine import deepspeed_config, new_config, zero_stage
from training.methods import check_method, side_files
from training.rehearsal import check_earlier_tasks, earlier_tasks
from training.run_directory import is_finished


def prepare(cfg, dist):
    """Rank 0's work before anything is loaded: checks data and weights.

    Returns what run.json will say of the run, and whether it was finished before.
    """
    data = Path(cfg.data)
    if cfg.tensorboard:
        optional("tensorboard")
    if cfg.wandb:
        optional("wandb")
    if cfg.task and not data.is_file():
        raise UserError(f"{cfg.data} does not exist or is not a preprocessed task file: make it with data_prep.py, or "
                        "`make data`")
    digest = data_digest(cfg.data)
    defaults = dataclasses.asdict(type(cfg)())
    resolved = dataclasses.asdict(cfg) | {"dtype": resolve_dtype(cfg.dtype), "zero": zero_stage(cfg, dist)}
    facts = {"processes": dist.world_size, "device": dist.device.type}
    if Path(cfg.out).exists() and cfg.init and not Path(cfg.init).is_dir():  # a finished stage outlives what it came from
        recorded = read_json(Path(cfg.out) / "run.json")
        run = describe(resolved, recorded.get("parent_digest"), digest, rehearsed=recorded.get("rehearsed"))
        return None, is_finished(cfg.out, run, defaults)
    if cfg.task and (dropped := read_task(cfg.data)[1]):
        more = f" and {len(dropped) - 20} more" if len(dropped) > 20 else ""
        print(f"{cfg.data}: {len(dropped)} samples have no target and are left out: {', '.join(dropped[:20])}{more}")
    deepspeed_config(cfg, dist)
    source = find_weights(cfg)
    config = ModelConfig.read(source / "config.json") if cfg.init else new_config(cfg, Tokenizer(source))
    check_vocabulary(source, config)
    if cfg.init:
        Weights(source).check(config)
    if cfg.task and Tokenizer(source).eos_id is None:
        raise UserError(f"{source} names no end-of-text token: add eos_token_id to its config.json")
    if not cfg.task and not same_tokenizer(source, data):
        raise UserError(f"{cfg.data} was made with another tokenizer than that of {cfg.init}: make it anew with "
                        f"data_prep.py text --tokenizer {cfg.init}")
    longest = cfg.max_source_length + cfg.max_target_length if cfg.task else cfg.seq_length
    if longest > config.max_position_embeddings:
        names = "max_source_length + max_target_length" if cfg.task else "seq_length"
        raise UserError(f"{names} is {longest}, more than the model's max_position_embeddings "
                        f"{config.max_position_embeddings}: lower it")
    past = lineage(source) if cfg.init else {}
    if cfg.max_flops and not samples_to_train(cfg, config, 0, past):
        raise UserError(f"max_flops is {cfg.max_flops:.4g}, but one step costs "
                        f"{config.flops(cfg.global_batch_size * cfg.seq_length):.4g} and what was spent on --init before "
                        f"{past.get('flops', 0):.4g}: raise it")
    if not cfg.task and cfg.skip_samples is None and "text" in past and not first_sample(cfg, past):
        print(f"{cfg.init} was trained on another text, or on this one in other samples (seed, seq_length): starting at "
              "the first sample")
    if cfg.rehearsal:
        facts["rehearsed"] = [task["data_digest"] for task in earlier_tasks(cfg, past)]
    run = describe(resolved, checkpoint_digest(source, side_files(cfg)) if cfg.init else None, digest, **facts)
    finished = is_finished(cfg.out, run, defaults)
    if not finished:
        check_earlier_tasks(cfg, past)
        check_method(cfg, source, config, past)
    return run, finished


def find_weights(cfg):
    """The directory that weights and tokenizer come from, downloaded and converted to safetensors where needed."""
    if not cfg.init:
        return Path(cfg.data)  # new weights: only the tokenizer, which lies beside the text
    source = locate(cfg.init)
    Weights(source)
    return source
