"""Checkpoints from the Hub: download, and conversion of pytorch_model.bin files to safetensors.

    python -m model.hub llm-stacking/StackLLM_7B_300BToken runs/7b/stack/m0
"""
import re
import sys
import zipfile
from pathlib import Path

import torch

from common.files import UserError, first_line, new_directory
from model.checkpoint import (
    DTYPE_NAMES,
    DTYPES,
    IGNORED,
    INDEX,
    WEIGHTS,
    Weights,
    assemble,
    check_vocabulary,
    shard_names,
    write_checkpoint,
    write_weights,
)
from model.config import ModelConfig
from model.tokenizer import TOKENIZER_FILES

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def locate(source):
    """The local directory of a checkpoint: `source` itself, or the download of a Hub id such as "owner/name"."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{source} is no checkpoint: it holds no config.json")
        return with_safetensors(path)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise UserError(f"{source} is neither a checkpoint directory nor a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    try:
        patterns = ["config.json", *TOKENIZER_FILES, "*.safetensors", INDEX]
        path = Path(snapshot_download(str(source), allow_patterns=patterns))
        if not list(path.glob("*.safetensors")):
            path = Path(snapshot_download(str(source), allow_patterns=[*patterns, "pytorch_model*.bin", BIN_INDEX]))
    except Exception as error:  # of huggingface_hub, of its HTTP library, of the system
        reason = first_line(error)
        raise UserError(f"{source} is no directory here and cannot be downloaded from the Hub: {reason}") from None
    return with_safetensors(path)


def with_safetensors(directory):
    """The same directory, its .bin weights converted where it holds no safetensors."""
    if not (directory / WEIGHTS).exists() and not (directory / INDEX).exists():
        convert_bin(directory)
    return directory


def convert_bin(directory):
    """Writes the safetensors twin of a pytorch_model.bin checkpoint beside it. Nothing in the pickle is executed."""
    if (directory / BIN_INDEX).exists():
        files = sorted(set(shard_names(directory / BIN_INDEX).values()))
    elif (directory / BIN).exists():
        files = [BIN]
    else:
        raise UserError(f"{directory} holds no weights: expected {WEIGHTS}, {INDEX} or {BIN}")
    print(f"converting {directory}/{BIN} to safetensors, once", file=sys.stderr)
    tensors = {}
    for file in files:
        try:
            # only the zip format of torch 1.6 and later can be mapped into memory; older files are read whole
            state = torch.load(directory / file, map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(directory / file))
        except Exception as error:  # UnpicklingError, RuntimeError or EOFError, by what is wrong with the file
            raise UserError(f"{directory / file} is damaged or holds more than tensors ({first_line(error)})") from None
        tensors |= {name: tensor for name, tensor in state.items() if not IGNORED.search(name)}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"{directory}: {name} is {found}, expected a tensor of {', '.join(DTYPES)}")
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_directory(directory / "converted") as folder:
        write_weights(folder, specs, tensors.items())
        for file in sorted(folder.iterdir(), key=lambda file: file.name == INDEX):  # the index last
            file.rename(directory / file.name)
    (directory / "converted").rmdir()


def load_model(directory, dtype=torch.float32, device="cpu"):
    """Loads a checkpoint onto a device: a Transformer with weights of `dtype`, in evaluation mode.

    The model is built without memory (on the meta device) and its tensors are read one at a time, so that loading
    needs the model's size once. Raises UserError for anything about the directory that does not fit.
    """
    directory = locate(directory)
    config, weights = ModelConfig.read(directory / "config.json"), Weights(directory)
    specs = weights.check(config)
    return assemble(config, ((name, weights[name].to(device=device, dtype=dtype)) for name in specs))


def main(source, out):
    """Fetches a checkpoint and writes it as a checked safetensors directory, one tensor at a time."""
    if (Path(out) / "config.json").exists():
        Weights(out).check(ModelConfig.read(Path(out) / "config.json"))
        return print(f"{out} is there already")
    source = locate(source)
    config, weights = ModelConfig.read(source / "config.json"), Weights(source)
    specs = weights.check(config)
    check_vocabulary(source, config)
    with new_directory(out) as folder:
        write_checkpoint(folder, config, ((name, weights[name]) for name in specs), source)
    print(f"{out}: {config.num_parameters:,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
