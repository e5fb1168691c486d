"""Checkpoints: Hugging Face directories, read and written.

A directory holds `config.json`, the tokenizer files, and the weights: one `model.safetensors`, or shards with an index.
Older ones with `pytorch_model.bin` are read without a conversion. Weights move one tensor at a time: reading needs
memory for the model, writing needs memory for one tensor.
"""
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.files import UserError, digest, first_line, read_json
from common.writing import explain_os_errors, sync, write_json
from model.bin_files import read_bin
from model.config import ModelConfig
from model.tokenizer import Tokenizer, copy_tokenizer
from model.transformer import Transformer, parameter_shapes

NamedTensors = Iterable[tuple[str, torch.Tensor]]
TensorSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LEGACY_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|attn\.bias$")  # saved by old checkpoints


class SafetensorsFile:
    """A file of weights: its tensors' names, their dtypes and shapes, and their values. BinFile offers the same."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open_safetensors(path)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self.file.keys())

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype, by its name in safetensors, and the shape of a tensor, without reading it."""
        view = self.file.get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor."""
        # A new mapping for each tensor: one long-lived mapping would keep the pages of all tensors in memory.
        with open_safetensors(self.path) as file:
            return file.get_tensor(name)


class BinFile:
    """A .bin file with the interface of SafetensorsFile."""

    def __init__(self, path: Path):
        self.path, self.tensors = path, read_bin(path)

    def names(self) -> list[str]:
        return list(self.tensors)

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        dtype = self.tensors[name].dtype
        return DTYPE_NAMES.get(dtype, str(dtype)), self.tensors[name].shape

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].read(self.path)


class CheckpointReader:
    """Reads the tensors of a checkpoint directory one at a time: `reader[name]`. The names are in `reader.files`.

    Weights are in safetensors, or, in directories without them, in .bin files. Raises UserError for an index that names
    a missing file or one outside the directory, for a truncated file, for a .bin file that holds more than tensors, and
    for a tensor with values that are not finite.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.shards: dict[str, SafetensorsFile | BinFile]
        for weights, index, kind in ((WEIGHTS, INDEX, SafetensorsFile), (BIN, BIN_INDEX, BinFile)):
            if (self.directory / weights).exists():  # even if an index of earlier shards is left, as transformers does
                self.shards = {weights: kind(self.directory / weights)}
                self.files = dict.fromkeys(self.shards[weights].names(), weights)
                break
            if (self.directory / index).exists():
                self.files = read_index(self.directory / index)
                for file in sorted(set(self.files.values())):
                    if not (self.directory / file).is_file():
                        raise UserError(f"{self.directory / index} names the shard {file}, which is missing: download "
                                        "or copy it again")
                self.shards = {file: kind(self.directory / file) for file in sorted(set(self.files.values()))}
                break
        else:
            raise UserError(f"{directory} holds no weights: expected {WEIGHTS}, {INDEX}, {BIN} or {BIN_INDEX}")
        stored = {file: set(shard.names()) for file, shard in self.shards.items()}
        if missing := [f"{name} is not in {file}" for name, file in self.files.items() if name not in stored[file]]:
            raise UserError(f"{self.directory / index}: " + "; ".join(missing[:20]))

    def __getitem__(self, name: str) -> torch.Tensor:
        return require_finite(self.shards[self.files[name]].read(name), f"{self.directory}: {name}")

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Returns the dtype, by its name in safetensors, and the shape of a tensor, without reading it."""
        return self.shards[self.files[name]].stored(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor, without reading it."""
        return DTYPES[self.stored(name)[0]]

    def check(self, config: ModelConfig) -> None:
        """Raises UserError with the differences between the tensors and the parameters of a configuration, as
        `check_tensors` does, or if a head differs from the embedding that it is tied to."""
        check_tensors({name: self.stored(name) for name in self.files}, config, self.directory)
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if config.tie_word_embeddings and head in self.files and not torch.equal(self[head], self[embedding]):
            raise UserError(f"{self.directory}: {head} differs from {embedding}, although config.json ties them: set "
                            f"tie_word_embeddings to false there, or remove {head}")

    def named_tensors(self, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Checks the tensors against a configuration, then returns an iterator over (name, tensor) in model order."""
        self.check(config)
        return ((name, self[name]) for name in parameter_shapes(config))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose parts fit together."""
    directory: Path
    config: ModelConfig
    weights: CheckpointReader
    tokenizer: Tokenizer


def open_checkpoint(directory: str | Path, require_eos: bool = False) -> Checkpoint:
    """Opens a checkpoint directory and checks it. Reads no weights, except a head that lies next to a tied embedding.

    Raises UserError if a file is missing or damaged, if the weights or the tokenizer do not fit `config.json`, or if
    the directory names no end-of-text token and `require_eos` is set.
    """
    directory = Path(directory)
    config, weights = ModelConfig.read(directory / "config.json"), CheckpointReader(directory)
    weights.check(config)
    tokenizer = Tokenizer(directory)
    check_vocabulary(tokenizer, config)
    if require_eos and tokenizer.eos_id is None:
        raise UserError(f"{directory} names no end-of-text token: add eos_token_id to its config.json")
    return Checkpoint(directory, config, weights, tokenizer)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises UserError if the tokenizer or its special tokens have ids that the embedding lacks."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{tokenizer.directory}: the tokenizer and its special tokens need {tokenizer.vocab_size:,} "
                        f"ids, but the model's vocabulary has only {config.vocab_size:,}")


def check_tensors(stored: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig, directory: Path) -> None:
    """Raises UserError with the first 20 differences between tensors {name: (dtype, shape)} and the parameters of a
    configuration, and the number of the others."""
    expected = parameter_shapes(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()  # it may lie next to the embedding
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not expected" for name in stored
                 if name not in expected and name not in tied and not LEGACY_BUFFERS.search(name)]
    for name in [name for name in expected if name in stored]:
        dtype, shape = stored[name]
        if dtype not in DTYPES:
            problems.append(f"{name} has the dtype {dtype}, expected {', '.join(DTYPES)}")
        elif shape != expected[name]:
            problems.append(f"{name} has the shape {list(shape)}, expected {list(expected[name])}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{directory} does not fit its config.json: " + "; ".join(problems[:20]) + more)


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether all values of a tensor are finite. Allocates no temporary of the tensor's size."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def require_finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns a tensor. Raises UserError, which begins with its name, if a value is not finite."""
    if not is_finite(tensor):
        raise UserError(f"{name} holds values that are not finite (NaN or infinity)")
    return tensor


def read_index(path: Path) -> dict[str, str]:
    """Returns the `weight_map` of an index file, tensor name -> file in the same directory."""
    weight_map = read_json(path, dict).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()) \
            or not weight_map:
        raise UserError(f"{path}: expected an object 'weight_map' from tensors to files, found {weight_map!r:.80}: "
                        "copy the index again")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise UserError(f"{path} names the file {file!r}, which would leave the directory")
    return weight_map


def open_safetensors(path: Path) -> Any:
    """Opens a safetensors file for reading. Raises UserError if it is truncated or damaged, and OSError if it cannot be
    read."""
    with open(path, "rb"):  # safe_open says of a file without permission that it does not exist
        pass
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({first_line(error):.200}): download or copy it again") \
            from None


def write_weights(directory: str | Path, specs: Mapping[str, TensorSpec], tensors: NamedTensors,
                  max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` with an index.

    `tensors` yields (name, tensor) in the order of `specs`. Only one of them is held at a time.
    """
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, (dtype, shape) in specs.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    files = [WEIGHTS] if len(shards) == 1 else \
        [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    tensors = iter(tensors)
    for file, shard in zip(files, shards):
        write_safetensors(Path(directory) / file, {name: specs[name] for name in shard}, tensors)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(Path(directory) / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], tensors: NamedTensors) -> None:
    """Writes one safetensors file. It takes as many items from `tensors`, an iterator, as `specs` has names.

    The format is described at huggingface.co/docs/safetensors: the header's length (8 bytes, little-endian), a JSON
    header with the offsets, and the data. Raises UserError for values that are not finite.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    size, tensors = 0, iter(tensors)
    for name, (dtype, shape) in specs.items():
        end = size + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with explain_os_errors(path), open(path, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name in specs:
            actual, tensor = next(tensors)
            assert actual == name, (actual, name)
            assert (tensor.dtype, tuple(tensor.shape)) == specs[name], (name, tensor.shape, specs[name])
            tensor = require_finite(tensor.detach(), name)
            out.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
    sync(path)


def materialize_model(config: ModelConfig, tensors: NamedTensors) -> Transformer:
    """Returns a Transformer in evaluation mode whose parameters are the given (name, tensor), without copies."""
    model = empty_model(config)
    set_weights(model, tensors)
    return model.eval()


def empty_model(config: ModelConfig) -> Transformer:
    """Returns a Transformer on the meta device, which has no weights."""
    with torch.device("meta"):
        return Transformer(config)


def set_weights(model: Transformer, tensors: NamedTensors) -> None:
    """Makes the given (name, tensor) the parameters of a model, without copies."""
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    model.tie_weights()


def write_checkpoint(directory: str | Path, config: ModelConfig, tensors: NamedTensors,
                     tokenizer_source: str | Path,
                     dtypes: torch.dtype | Mapping[str, torch.dtype] = torch.float32) -> None:
    """Writes a checkpoint that any Hugging Face tool can load into an existing directory.

    `tensors` yields (name, tensor) in model order. Only one of them is held at a time. `dtypes` gives their dtype, or
    the dtype of each. The tokenizer files are copied from the directory `tokenizer_source`.
    """
    shapes = parameter_shapes(config)
    dtypes = dtypes if isinstance(dtypes, Mapping) else dict.fromkeys(shapes, dtypes)
    sizes = Counter[torch.dtype]()
    for name, shape in shapes.items():
        sizes[dtypes[name]] += math.prod(shape)
    config.write(directory, str(sizes.most_common(1)[0][0]).removeprefix("torch."))
    copy_tokenizer(tokenizer_source, directory)
    write_weights(directory, {name: (dtypes[name], shape) for name, shape in shapes.items()}, tensors)


def checkpoint_digest(directory: str | Path) -> str:
    """Returns the SHA-256 of a checkpoint's config.json and weights."""
    directory = Path(directory)
    return digest([directory / "config.json", *(directory / file for file in CheckpointReader(directory).shards)])
