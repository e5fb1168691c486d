"""Checkpoints: Hugging Face directories in and out.

A directory holds `config.json`, the tokenizer's files and the weights: one `model.safetensors`, or shards with an
index. Weights move one tensor at a time, so reading needs
the model's own size and writing one tensor's.
"""
import itertools
import json
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.files import UserError, digest, explain_os_errors, read_json, sync, write_json
from model.tokenizer import Tokenizer, copy_tokenizer
from model.transformer import Transformer, parameter_shapes

MAX_SHARD_BYTES = 5_000_000_000

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|attn\.bias$")  # buffers that old checkpoints saved


class Weights:
    """The tensors of a checkpoint directory, read one at a time: `weights[name]`, with names in `weights.files`.

    Raises UserError for an index that names a missing shard or leaves the
    directory, and for a truncated file.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        if not (self.directory / WEIGHTS).exists() and not (self.directory / INDEX).exists():
            raise UserError(f"{directory} holds no weights: expected {WEIGHTS} or {INDEX}")
        if (self.directory / INDEX).exists():
            names = shard_names(self.directory / INDEX)
            self.shards = {file: open_shard(self.directory / file) for file in set(names.values())}
        else:
            self.shards = {WEIGHTS: open_shard(self.directory / WEIGHTS)}
            names = dict.fromkeys(self.shards[WEIGHTS].keys(), WEIGHTS)
        held = {file: set(shard.keys()) for file, shard in self.shards.items()}
        if absent := [f"{name} is not in {file}" for name, file in names.items() if name not in held[file]]:
            raise UserError(f"{self.directory / INDEX}: " + "; ".join(absent[:20]))
        self.files = names

    def __getitem__(self, name):
        # opened for each tensor, so that its mapping goes with it: pages of tensors read before would stay in memory
        with open_shard(self.directory / self.files[name]) as shard:
            return shard.get_tensor(name)

    def spec(self, name):
        """(dtype, shape) of a tensor, without reading it."""
        view = self.shards[self.files[name]].get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{self.directory}: {name} has the dtype {view.get_dtype()}, expected {', '.join(DTYPES)}")
        return DTYPES[view.get_dtype()], tuple(view.get_shape())

    def check(self, config):
        """Compares the tensors with what a configuration asks for; one UserError lists every difference.

        Returns the specs of the expected tensors by name. A head that is saved beside a tied embedding is ignored.
        """
        expected = parameter_shapes(config)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        problems = [f"{name} is missing" for name in expected if name not in self.files]
        problems += [f"{name} is not expected" for name in self.files
                     if name not in expected and name not in tied and not IGNORED.search(name)]
        specs = {name: self.spec(name) for name in expected if name in self.files}
        problems += [f"{name} has the shape {list(shape)}, expected {list(expected[name])}"
                     for name, (_, shape) in specs.items() if shape != expected[name]]
        if problems:
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(f"{self.directory} does not fit its config.json: " + "; ".join(problems[:20]) + more)
        return specs


def shard_names(index):
    """The `weight_map` of an index file, each file checked: in this directory, and there."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: expected an object 'weight_map' from tensors to files")
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names the file {file!r}, which would leave the directory")
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names the shard {file}, which is missing: download or copy it again")
    return names


def open_shard(path):
    """Opens a safetensors file; a UserError says that it is truncated or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): download or copy it again") from None


def write_weights(directory, specs, tensors, max_shard_bytes=MAX_SHARD_BYTES):
    """Writes weights as `model.safetensors`, or as shards of at most `max_shard_bytes` with an index.

    specs: name -> (dtype, shape) of every tensor; tensors: pairs (name, tensor) in the same order, which may be a
    generator, since only one is held at a time.
    """
    shards, sizes = [[]], [0]
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
        write_tensors(Path(directory) / file, {name: specs[name] for name in shard}, tensors)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(Path(directory) / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def write_tensors(path, specs, tensors):
    """Writes one safetensors file: specs as above; of `tensors`, an iterator, those that the specs name are taken.

    The format is described at huggingface.co/docs/safetensors: the header's length (8 bytes, little-endian), a JSON
    header with the offsets, the data.
    """
    header, size, tensors = {"__metadata__": {"format": "pt"}}, 0, iter(tensors)
    for name, (dtype, shape) in specs.items():
        end = size + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with explain_os_errors(path), open(path, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name in specs:
            given, tensor = next(tensors)
            assert given == name, (given, name)
            assert (tensor.dtype, tuple(tensor.shape)) == specs[name], (name, tensor.shape, specs[name])
            out.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    sync(path)


def check_vocabulary(directory, config):
    """Raises UserError where the tokenizer can give ids that the embedding does not have."""
    tokenizer = Tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model's vocabulary "
                        f"only {config.vocab_size:,}")


def assemble(config, tensors):
    """A Transformer in evaluation mode whose parameters are the given (name, tensor), which are not copied."""
    with torch.device("meta"):
        model = Transformer(config)
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    model.tie_weights()
    return model.eval()


def write_checkpoint(directory, config, tensors, tokenizer_source):
    """Writes a checkpoint that any Hugging Face tool can load into an existing directory.

    tensors: pairs (name, tensor) in the order of the model's parameters, all of one dtype; it may be a generator,
    since one tensor is held at a time.
    """
    tensors = iter(tensors)
    first = next(tensors)
    specs = {name: (first[1].dtype, shape) for name, shape in parameter_shapes(config).items()}
    config.write(directory, str(first[1].dtype).removeprefix("torch."))
    copy_tokenizer(tokenizer_source, directory)
    write_weights(directory, specs, itertools.chain([first], tensors))


def checkpoint_digest(directory, beside=()):
    """SHA-256 over a checkpoint's config.json and weights, and over what fine-tuning has left `beside` them: POSTERIOR,
    FISHER."""
    directory = Path(directory)
    more = [path for name in beside for path in directory.glob(f"{name}-*.safetensors")]
    return digest([directory / "config.json", *(directory / file for file in Weights(directory).shards), *more])
