"""The checks of a training run: everything that it depends on is resolved once, before anything is loaded."""
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.distributed import Distributed
from common.dtypes import TORCH_DTYPES
from common.files import UserError, digest, json_digest
from common.formatting import format_names
from common.metrics_log import check_services
from common.provenance import DIGESTS, data_digest, describe, last_template, read_lineage, read_record
from common.settings import json_values
from common.stop_request import StopRequest
from corpus.prompts import open_template
from corpus.shards import check_shards
from corpus.tasks import read_task
from model.checkpoint import check_vocabulary, checkpoint_digest, open_checkpoint
from model.config import ModelConfig, size_config
from model.growth import expand, new_layers
from model.hub import fetch_checkpoint
from model.parameter_files import open_side_files
from model.tokenizer import Tokenizer, same_tokenizer, tokenizer_digest
from training.deepspeed_config import check_deepspeed_config, deepspeed_config, resolve_choices
from training.distillation import start_digest
from training.methods import find_side_files, side_file_name
from training.rehearsal import check_earlier_tasks, earlier_tasks
from training.run import Run, first_sample, num_samples, partial_directory
from training.run_directory import check_shared, drop_state, is_finished, saved_states
from training.selection import Shapes, selected_shapes, training_flops
from training.train_config import TrainConfig

# The digests of what the ranks read from the initial checkpoint and from m0, by their names in run.json.
SOURCE_DIGESTS = "parent_digest", "tokenizer_digest", "start_digest", "side_digest"


@dataclass(frozen=True)
class CheckedRun:
    """The results of the checks of rank 0: attributes of Run, under the same names."""
    cfg: TrainConfig
    lineage: dict[str, Any]
    record: dict[str, Any]
    first_sample: int
    trained: Shapes
    layer_map: tuple[int, ...]
    earlier_tasks: tuple[dict[str, Any], ...]


def open_run(cfg: TrainConfig, dist: Distributed, request: StopRequest) -> Run | None:
    """Checks settings, checkpoint, data and run directory, and resolves what depends on them.

    Returns None if the run is finished already. Raises UserError, before anything is written, if it cannot start.
    """
    checked = dist.on_rank0(lambda: check_run(cfg, dist))
    if checked is None:
        dist.print0(f"{cfg.out} is finished already, nothing to do")
        dist.on_rank0(lambda: drop_state(cfg.out))
        return None
    check_shared(partial_directory(cfg.out), dist)
    if cfg.compile:
        dist.on_all_ranks(check_compiler)
    source = dist.local_rank0_first(lambda: find_source(cfg))
    dist.check_same_on_all_nodes(lambda: input_digests(checked, source, dist.rank))
    is_resumed = dist.on_rank0(lambda: bool(saved_states(partial_directory(cfg.out))))
    if not cfg.task and not is_resumed:  # reading terabytes again at each restart would take hours
        dist.on_all_ranks(lambda: check_shards(cfg.data, dist.local_rank, dist.local_world_size))
    config = dist.on_all_ranks(lambda: read_model_config(cfg, source))
    if checked.layer_map:
        config = config.with_layers(checked.layer_map)
    return Run(dist=dist, request=request, source=source, model_config=config, **vars(checked))


def check_run(cfg: TrainConfig, dist: Distributed) -> CheckedRun | None:
    """The checks of rank 0; returns None if the run is finished. Raises UserError for the first check that fails."""
    check_services(cfg.tensorboard, cfg.wandb)
    check_kind_of_data(cfg)
    training_digest = data_digest(cfg.data)
    cfg = resolve_choices(with_recorded_dtype(cfg), dist.world_size)
    if is_finished_without_source(cfg, training_digest):
        return None
    if cfg.task:
        report_dropped(cfg.data)
    check_deepspeed_config(deepspeed_config(cfg), dist.device)
    source = find_source(cfg)
    config = check_source(cfg, source)
    lineage = read_lineage(source) if cfg.init else {}
    check_template(cfg, source, lineage)
    if layer_map := expansion(cfg, config, lineage):
        config = config.with_layers(layer_map)
        lineage |= {"new_layers": new_layers(layer_map), "inserted": cfg.new_layers}
    trained = selected_shapes(cfg.train, config, cfg.lora, lineage, cfg.init)
    check_flops_and_text(cfg, config, training_digest, lineage, trained)
    earlier = earlier_tasks(cfg, training_digest, lineage)
    record = describe_run(cfg, dist, source, lineage, earlier, training_digest)
    if is_finished(cfg.out, record):
        return None
    if cfg.held_out_text is not None:
        record["held_out_digest"] = text_digest(cfg, "held_out_text", source)
    check_earlier_tasks(earlier)
    if cfg.rehearsal and not earlier:
        print(f"rehearsal changes nothing in this run: {cfg.init} was fine-tuned on no other task")
    open_side_files(source, side_file_name(cfg), config)
    record["id"] = json_digest(record)
    return CheckedRun(cfg=cfg, lineage=lineage, record=record, trained=trained, layer_map=layer_map,
                      first_sample=first_sample(cfg, training_digest, lineage), earlier_tasks=tuple(earlier))


def with_recorded_dtype(cfg: TrainConfig) -> TrainConfig:
    """The settings, with `dtype` instead of "auto" as a finished run in the same place has it: this machine, such as a
    cluster's login node, may have another default."""
    finished = cfg.dtype == "auto" and Path(cfg.out).exists()
    dtype = read_record(cfg.out).get("settings", {}).get("dtype") if finished else None
    return replace(cfg, dtype=dtype) if dtype in TORCH_DTYPES else cfg


def check_kind_of_data(cfg: TrainConfig) -> None:
    """Raises UserError if the data of a task are not a file, or those of pretraining are one. Prints a note if
    replay_text is not used."""
    if cfg.task and not Path(cfg.data).is_file():
        raise UserError(f"{cfg.data} does not exist or is not a preprocessed task file: make it with data_prep.py, or "
                        "`make data`")
    if cfg.task is None and Path(cfg.data).is_file():
        raise UserError(f"data {cfg.data} is a file, expected a directory of token shards: for a task file give --task")
    if cfg.replay_text and not cfg.replay_share:  # which train_args may give to all methods of an experiment
        print(f"nothing of replay_text {cfg.replay_text} is replayed: replay_share is 0")


def is_finished_without_source(cfg: TrainConfig, training_digest: str) -> bool:
    """Whether the run is finished and its initial checkpoint, a Hub id or a directory that was removed, is not here: it
    is then not fetched again. Raises UserError if the finished run has other settings or data."""
    recorded = read_record(cfg.out) if Path(cfg.out).exists() else {}
    if not cfg.init or Path(cfg.init).is_dir() or recorded.get("settings", {}).get("init") != cfg.init:
        return False
    others = DIGESTS.keys() - {"parent_digest", "data_digest"}
    return is_finished(cfg.out, describe(json_values(cfg), recorded.get("parent_digest"), training_digest, **{
        name: recorded[name] for name in others if name in recorded}))


def describe_run(cfg: TrainConfig, dist: Distributed, source: Path, lineage: Mapping[str, Any],
                 earlier: Sequence[Mapping[str, Any]], training_digest: str) -> dict[str, Any]:
    """The entries of run.json that tell whether an earlier run is the same one, and facts on this one. earlier: the
    tasks to rehearse."""
    facts: dict[str, Any] = {"processes": dist.world_size, "device": dist.device.type}
    if cfg.rehearsal:
        facts["rehearsed"] = [task["data_digest"] for task in earlier]
    if cfg.replay_share:
        facts["replay_digest"] = text_digest(cfg, "replay_text", source)
    return describe(json_values(cfg), training_digest=training_digest, **facts, **source_digests(cfg, source, lineage))


def source_digests(cfg: TrainConfig, source: Path, lineage: Mapping[str, Any]) -> dict[str, str | None]:
    """The entries SOURCE_DIGESTS of run.json; start_digest and side_digest only if the run reads such files."""
    parent = checkpoint_digest(source) if cfg.init else None
    side_files = find_side_files(cfg, source, lineage)
    return {"parent_digest": parent, "tokenizer_digest": tokenizer_digest(source), **start_digest(cfg, lineage, parent),
            **({"side_digest": digest(side_files)} if side_files else {})}


def input_digests(checked: CheckedRun, source: Path, rank: int) -> dict[str, str | None]:
    """The digests of all that a node reads, by description. Raises UserError if data do not exist there."""
    cfg, found = checked.cfg, dict[str, str | None]()
    earlier_data = [task["data"] for task in checked.earlier_tasks]
    for path in filter(None, (cfg.data, cfg.held_out_text, cfg.replay_text, *earlier_data)):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist here: copy it to all nodes, or use a shared folder")
        found[path] = data_digest(path)
    # those of rank 0 are in the record: weights are read only once
    own = checked.record if rank == 0 else source_digests(cfg, source, checked.lineage)
    return found | {f"{DIGESTS[name]} of {cfg.init or cfg.data}": own.get(name) for name in SOURCE_DIGESTS}


def check_compiler() -> None:
    """Raises UserError if torch.compile has no compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cc", "gcc", "clang"))):
        raise UserError("--compile needs a C and C++ compiler, such as gcc and g++")


def check_template(cfg: TrainConfig, source: Path, lineage: Mapping[str, Any]) -> None:
    """Raises UserError if the earlier tasks of a chain had other prompts, or if the template cannot be used."""
    if not cfg.task:
        return
    if (earlier := last_template(lineage)) not in (None, cfg.template):
        raise UserError(f"template is {cfg.template}, but the last task of {cfg.init} was trained with {earlier}: give "
                        f"--template {earlier}")
    open_template(cfg.template, Tokenizer(source)).check_length(cfg.max_source_length)


def expansion(cfg: TrainConfig, config: ModelConfig, lineage: Mapping[str, Any]) -> tuple[int, ...]:
    """The layer map of the block expansion that a run begins with: before its first task, or with `per_task` before
    every task. Empty without one. Raises UserError if the chain of tasks did not begin with this expansion."""
    depth, inserted = config.num_hidden_layers, lineage.get("inserted", 0)
    if cfg.new_layers and (cfg.per_task or not lineage.get("tasks")):
        return tuple(expand(depth, depth + cfg.new_layers))
    if cfg.new_layers and cfg.new_layers != inserted:
        raise UserError(f"new_layers is {cfg.new_layers}, but the chain of tasks of {cfg.init} began with {inserted} "
                        "new layers: give the same number at all tasks, or --per_task to insert layers now")
    return ()


def report_dropped(path: str) -> None:
    """Prints which samples of a task file have no target."""
    if dropped := read_task(path)[1]:
        print(f"{path}: {len(dropped)} samples have no target and are left out: {format_names(dropped)}")


def check_source(cfg: TrainConfig, source: Path) -> ModelConfig:
    """Checks the initial checkpoint, or the tokenizer for new weights, against settings and data."""
    if cfg.init:
        config = open_checkpoint(source, require_eos=cfg.task is not None).config
    else:
        config = read_model_config(cfg, source)
        check_vocabulary(Tokenizer(source), config)
    if not cfg.task and not same_tokenizer(source, Path(cfg.data)):
        raise UserError(f"{cfg.data} was made with a tokenizer other than that of {cfg.init}: make it again with "
                        f"data_prep.py text --tokenizer {cfg.init}")
    longest = cfg.max_source_length + cfg.max_target_length if cfg.task else cfg.seq_length
    if longest > config.max_position_embeddings:
        names = "max_source_length + max_target_length" if cfg.task else "seq_length"
        raise UserError(f"{names} is {longest}, more than the model's max_position_embeddings "
                        f"{config.max_position_embeddings}: lower it")
    return config


def text_digest(cfg: TrainConfig, name: str, source: Path) -> str:
    """The digest of the directory of token shards that a setting names. Raises UserError if it is not one, or if its
    tokenizer is not the model's."""
    path = str(getattr(cfg, name))
    if Path(path).is_file():
        raise UserError(f"{name} {path} is a file, expected a directory of token shards: make it with data_prep.py "
                        "text")
    shards_digest = data_digest(path)
    if not same_tokenizer(source, Path(path)):
        raise UserError(f"{name} {path} was made with a tokenizer other than that of {cfg.init}: leave it out, or make "
                        f"it with data_prep.py text --tokenizer {cfg.init}")
    return shards_digest


def check_flops_and_text(cfg: TrainConfig, config: ModelConfig, training_digest: str, lineage: dict[str, Any],
                         trained: Shapes) -> None:
    """Raises UserError if max_flops leaves no step, and prints a note if a pretraining run does not continue in the
    text of its initial checkpoint."""
    if cfg.max_flops and not num_samples(cfg, config, 0, lineage, trained):
        step = training_flops(cfg.global_batch_size * cfg.seq_length, config, trained)
        raise UserError(f"max_flops is {cfg.max_flops:.4g}, but one step costs {step:.4g} and --init has already used "
                        f"{lineage.get('flops', 0):.4g}: raise it")
    if not cfg.task and cfg.skip_samples is None and "text" in lineage and \
            not first_sample(cfg, training_digest, lineage):
        print(f"{cfg.init} was trained on another text, or on this text with another seed, seq_length or "
              "max_train_samples: starting at the first sample")


def find_source(cfg: TrainConfig) -> Path:
    """The directory of initial weights and tokenizer, downloaded if needed."""
    return fetch_checkpoint(cfg.init) if cfg.init else Path(cfg.data)  # a shard directory includes its tokenizer


def read_model_config(cfg: TrainConfig, source: Path) -> ModelConfig:
    """The model's shape: that of the initial checkpoint, or the size's for new weights."""
    if cfg.init:
        return ModelConfig.read(source / "config.json")
    tokenizer = Tokenizer(source)
    return size_config(str(cfg.size), cfg.num_hidden_layers, bos_token_id=tokenizer.bos_id,
                       eos_token_id=tokenizer.eos_id)
