"""Checkpoints from the Hub: download, and a copy with weights as safetensors.

    python -m model.hub --source llm-stacking/StackLLM_7B_300BToken --out runs/7b/stack/m0
"""
if __name__ == "__main__":
    import common.preamble  # which changes how the whole process ends

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.configs import known, read_config
from common.dtypes import TORCH_DTYPES, resolve_dtype
from common.files import UserError, first_line, read_json
from common.provenance import GROWTH, RUN
from common.settings import setting
from common.writing import ExistsError, new_directory, write_json
from model.checkpoint import (
    BIN,
    BIN_INDEX,
    INDEX,
    WEIGHTS,
    Checkpoint,
    CheckpointReader,
    materialize_model,
    open_checkpoint,
    read_index,
    write_checkpoint,
)
from model.config import ModelConfig
from model.lora import ADAPTER_CONFIG
from model.tokenizer import TOKENIZER_FILES
from model.transformer import Transformer, parameter_shapes

SOURCE = "source.json"  # next to a copied checkpoint: where it is from, with the commit on the Hub


def fetch_checkpoint(source: str | Path) -> Path:
    """Returns the local directory of a checkpoint.

    A Hub id such as "owner/name", or "owner/name@revision" with a branch, tag or commit, is downloaded to the Hub's
    cache. Raises UserError if the source is neither a directory nor a Hub id, or if the download fails.
    """
    directory = Path(source)
    if not directory.is_dir():
        return download(source)
    if not (directory / "config.json").exists():
        if (directory / ADAPTER_CONFIG).exists():
            raise UserError(f"{source} holds an adapter of PEFT and no checkpoint: give the directory of the merged "
                            "weights, or merge it with PEFT's merge_and_unload")
        raise UserError(f"{source} is not a checkpoint: it holds no config.json")
    return directory


def split_hub_id(source: str | Path) -> tuple[str, str | None]:
    """The repository of a Hub id, and the revision if it names one. Raises UserError if it is not a Hub id."""
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(source))
    if not found or Path(source).exists():
        raise UserError(f"{source} is neither a checkpoint directory nor a Hub id (owner/name or owner/name@revision)")
    return found[1], found[2]


def download(source: str | Path) -> Path:
    """Downloads a model from the Hub and returns its directory. Fetches .bin weights only if there are no others."""
    from huggingface_hub import snapshot_download
    repo_id, revision = split_hub_id(source)

    def fetch(*names: str) -> Path:
        with explain_hub_errors(str(source)):
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(names)))

    directory = fetch("config.json", *TOKENIZER_FILES, INDEX, BIN_INDEX)
    for weights, index in ((WEIGHTS, INDEX), (BIN, BIN_INDEX)):
        shards = set(read_index(directory / index).values()) if (directory / index).exists() else set()
        fetch(weights, *shards)
        if shards or (directory / weights).exists():
            return directory
    raise UserError(f"no weights of {source} are in {directory}: either it has none, or the Hub, whose cache this is, "
                    "cannot be reached")


def source_config(source: str | Path) -> ModelConfig:
    """Returns the configuration of a directory or a Hub id, without downloading the weights."""
    if Path(source).exists():
        return ModelConfig.read(fetch_checkpoint(source) / "config.json")
    from huggingface_hub import hf_hub_download
    repo_id, revision = split_hub_id(source)
    with explain_hub_errors(str(source)):
        path = hf_hub_download(repo_id, "config.json", revision=revision)
    return ModelConfig.read(path)


@contextlib.contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turns errors of a download into a UserError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    try:
        yield
    except GatedRepoError:
        raise UserError(f"{repo_id} is gated: accept its terms on its page of the Hub, then log in with "
                        "`hf auth login`") from None
    except RepositoryNotFoundError:
        known_ids = [hub for size in known("size") for hub in read_config("size", size).get("hub", {}).values()]
        raise UserError(f"{repo_id} is neither a directory here nor a repository on the Hub that this account may read."
                        f" The size presets name {', '.join(known_ids)}; if one of them has moved, give the new id as "
                        "INIT or --init, or log in with `hf auth login`") from None
    except Exception as error:  # of huggingface_hub, its HTTP library or the system
        raise UserError(f"{repo_id} is not a directory here and cannot be downloaded from the Hub: "
                        f"{first_line(error)}. After a lost connection the same command resumes the download") from None


def load_model(source: str | Path, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu") -> Transformer:
    """Loads a checkpoint, a directory or a Hub id: returns a Transformer in evaluation mode with weights of `dtype`.

    The model is created on the meta device and its tensors are read one at a time, so loading needs memory for one
    copy of the weights. Raises UserError if the directory does not hold a complete checkpoint.
    """
    directory = fetch_checkpoint(source)
    config = ModelConfig.read(directory / "config.json")
    tensors = CheckpointReader(directory).named_tensors(config)
    return materialize_model(config, ((name, tensor.to(device=device, dtype=dtype)) for name, tensor in tensors))


@dataclass(frozen=True)
class HubConfig:
    """Settings of `python -m model.hub`."""
    source: str = setting(None, "Hub id such as owner/name or owner/name@revision, or a checkpoint directory",
                          required=True)
    out: str = setting(None, "new checkpoint directory", required=True)
    dtype: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "dtype of the weights; auto: bf16 if the hardware multiplies bf16 matrices, otherwise the source's")


def main(cfg: HubConfig) -> None:
    """Fetches a checkpoint and writes it to `out` as safetensors, one tensor at a time, unless `out` is complete."""
    if not (Path(cfg.out) / "config.json").exists():
        checkpoint = open_checkpoint(fetch_checkpoint(cfg.source))
        try:
            with new_directory(cfg.out) as folder:
                copy_checkpoint(folder, checkpoint, cfg.dtype)
                downloaded = {} if Path(cfg.source).is_dir() else {"commit": checkpoint.directory.name}
                write_json(folder / SOURCE, {"source": cfg.source} | downloaded)
            print(f"{cfg.out}: {checkpoint.config.num_parameters:,} parameters")
            return print_cache(cfg.source, checkpoint.directory)
        except ExistsError:
            if not (Path(cfg.out) / "config.json").exists():  # not a checkpoint that another process has made
                raise
    record = Path(cfg.out) / SOURCE
    if made_here := [name for name in (RUN, GROWTH) if (Path(cfg.out) / name).exists()]:
        raise UserError(f"{cfg.out} is there already and was trained or grown ({made_here[0]}), not made from "
                        f"{cfg.source}: remove it, or choose another --out")
    recorded = str(read_json(record, dict).get("source")) if record.exists() else cfg.source
    is_same_folder = all(map(os.path.isdir, (recorded, cfg.source))) and os.path.samefile(recorded, cfg.source)
    if recorded != cfg.source and not is_same_folder:
        raise UserError(f"{cfg.out} is there already and was made from {recorded}, not from {cfg.source}: remove it, "
                        "or choose another --out")
    made = open_checkpoint(cfg.out)
    found = {made.weights.dtype(name) for name in parameter_shapes(made.config)}
    if cfg.dtype != "auto" and found != {TORCH_DTYPES[cfg.dtype]}:
        raise UserError(f"{cfg.out} is there already, with weights of another dtype than {cfg.dtype}: remove it, or "
                        "leave out --dtype")
    print(f"{cfg.out} is there already")


def copy_checkpoint(folder: Path, checkpoint: Checkpoint, dtype: str) -> None:
    """Writes a checkpoint to an empty folder with weights of a dtype, see HubConfig."""
    config, weights = checkpoint.config, checkpoint.weights
    dtypes = {name: weights.dtype(name) for name in parameter_shapes(config)}
    if dtype != "auto" or resolve_dtype(dtype) == "bf16":
        dtypes = dict.fromkeys(dtypes, TORCH_DTYPES[resolve_dtype(dtype)])
    size = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in parameter_shapes(config).items())
    with tqdm(total=size, desc="weights", unit="B", unit_scale=True, disable=None) as bar:
        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights.named_tensors(config):
                yield name, tensor.to(dtypes[name])
                bar.update(tensor.numel() * dtypes[name].itemsize)
        write_checkpoint(folder, config, tensors(), checkpoint.directory, dtypes)


def print_cache(source: str, directory: Path) -> None:
    """Prints the path and the size of the download of a checkpoint, which is not needed any more."""
    if not Path(source).is_dir():
        cache = next(parent for parent in directory.parents if parent.name.startswith("models--"))
        size = sum(path.stat().st_size for path in (cache / "blobs").glob("*"))
        print(f"the download is not needed any more: {cache} ({size / 1e9:.1f} GB)")


if __name__ == "__main__":
    from common.scripts import run
    run((HubConfig, main), __doc__)
