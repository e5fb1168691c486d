"""Checkpoints from the Hub: download, with the weights as safetensors.

    python -m model.hub llm-stacking/StackLLM_7B_300BToken runs/7b/stack/m0
"""
import common.interrupts

import re
import sys
from pathlib import Path

import torch

from common.files import ExistsError, UserError, first_line, new_directory
from common.settings import describe_error
from model.checkpoint import CheckpointReader, convert_bin, materialize_model, open_checkpoint, write_checkpoint
from model.config import ModelConfig
from model.tokenizer import TOKENIZER_FILES
from model.transformer import Transformer, parameter_shapes


def fetch_checkpoint(source: str | Path) -> Path:
    """Returns the local directory of a checkpoint, with its weights as safetensors.

    A Hub id such as "owner/name" is downloaded to the Hub's cache. Raises UserError if the source is neither a
    directory nor a Hub id, or if the download or the conversion of .bin weights fails.
    """
    directory = Path(source)
    if not directory.is_dir():
        if directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
            raise UserError(f"{source} is neither a checkpoint directory nor a Hub id (owner/name)")
        directory = download(str(source))
    elif not (directory / "config.json").exists():
        raise UserError(f"{source} is not a checkpoint: it holds no config.json")
    convert_bin(directory)
    return directory


def download(repo_id: str) -> Path:
    """Downloads a model from the Hub and returns its directory. Fetches .bin weights only if there are no others."""
    from huggingface_hub import snapshot_download
    patterns = ["config.json", *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        directory = Path(snapshot_download(repo_id, allow_patterns=patterns))
        if not list(directory.glob("*.safetensors")):
            patterns += ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]
            directory = Path(snapshot_download(repo_id, allow_patterns=patterns))
    except Exception as error:  # of huggingface_hub, its HTTP library or the system
        raise UserError(f"{repo_id} is not a directory here and cannot be downloaded from the Hub: "
                        f"{first_line(error)}") from None
    return directory


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


def main(source: str, out: str) -> None:
    """Fetches a checkpoint and writes it to `out` as safetensors, one tensor at a time, unless `out` is complete."""
    if not (Path(out) / "config.json").exists():
        checkpoint = open_checkpoint(fetch_checkpoint(source))
        config, weights = checkpoint.config, checkpoint.weights
        try:
            with new_directory(out) as folder:
                write_checkpoint(folder, config, weights.named_tensors(config), checkpoint.directory,
                                 {name: weights.dtype(name) for name in parameter_shapes(config)})
            return print(f"{out}: {config.num_parameters:,} parameters")
        except ExistsError:
            if not (Path(out) / "config.json").exists():  # not a checkpoint that another process has made
                raise
    open_checkpoint(out)
    print(f"{out} is there already")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (UserError, OSError, MemoryError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)
