"""Per-parameter values stored next to a checkpoint, such as a posterior or Fisher information. Writer and reader.

Values are stored in fragments, elements [start, start + count) of a flattened parameter, under the keys
`<kind>/<parameter>@<start>`. Any number of processes under any ZeRO stage can read what any other number has written.
"""
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from common.files import UserError
from model.checkpoint import open_safetensors, require_finite, write_safetensors
from model.config import ModelConfig
from model.transformer import parameter_shapes

POSTERIOR, FISHER, MOMENTS = "posterior", "fisher", "moments"
SIDE_FILES = {POSTERIOR: ("mean", "precision"), FISHER: ("fisher",),  # names of side files -> kinds of values in them
              MOMENTS: ("exp_avg", "exp_avg_sq")}  # AdamW's, by PyTorch's names


def write_parameter_file(path: Path, fragments: Iterable[Any],
                         kinds: Mapping[str, Callable[[Any], torch.Tensor]]) -> None:
    """Writes the values of parameter fragments, objects with `name`, `start` and `count`, one at a time.

    `kinds` maps the name of a kind to a function of a fragment that returns its values [count] in fp32.
    """
    entries = [(f"{kind}/{fragment.name}@{fragment.start}", fragment, values_of)
               for fragment in fragments for kind, values_of in kinds.items()]
    write_safetensors(path, {key: (torch.float32, (fragment.count,)) for key, fragment, _ in entries},
                      ((key, values_of(fragment)) for key, fragment, values_of in entries))


class ParameterFiles:
    """Reads the files that all processes of a run wrote. `description` names them in messages: "the saved state"."""

    def __init__(self, paths: Iterable[Path], description: str):
        self.description = description
        self.entries: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}  # (kind, parameter) -> (start, file, key)
        for path in paths:
            file = open_safetensors(path)
            for key in file.keys():  # noqa: SIM118, the file is not a mapping
                if (match := re.fullmatch(r"(\w+)/(.+)@(\d+)", key)) is None:
                    raise UserError(f"{path} was not written by this program: it holds {key!r}")
                stored = file.get_slice(key)
                if stored.get_dtype() != "F32" or len(stored.get_shape()) != 1:
                    raise UserError(f"{path}: {key} is damaged: expected a list of fp32 values")
                self.entries.setdefault((match[1], match[2]), []).append((int(match[3]), file, key))
        self.kinds = {kind for kind, _ in self.entries}

    def check(self, kinds: Iterable[str], sizes: Mapping[str, int]) -> None:
        """Raises UserError unless the files hold all values of each kind for exactly the parameters {name: size}."""
        actual = {key: sum(file.get_slice(name).get_shape()[0] for _, file, name in entries)
                  for key, entries in self.entries.items()}
        expected = {(kind, name): size for kind in kinds for name, size in sizes.items()}
        if wrong := sorted(key for key in actual.keys() | expected.keys() if actual.get(key) != expected.get(key)):
            (kind, name), more = wrong[0], f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"{self.description} is that of another model: {actual.get(wrong[0], 0):,} values of "
                            f"{kind} of {name}, expected {expected.get(wrong[0], 0):,}{more}")

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fills a tensor [count] with the values of elements [start, start + count) of a flattened parameter.

        Raises UserError if some are missing or not finite.
        """
        filled, stop = 0, start + len(into)
        for first, file, key in self.entries.get((kind, name), []):
            stored = file.get_slice(key)
            low, high = max(start, first), min(stop, first + stored.get_shape()[0])
            if low < high:
                into[low - start:high - start].copy_(stored[low - first:high - first])
                filled += high - low
        if filled != len(into):
            raise UserError(f"{self.description} has {filled:,} of the {len(into):,} values of {kind} of {name} that "
                            "are needed: it is that of another model")
        require_finite(into, f"{self.description}: {kind} of {name}")


def find_parameter_files(directory: str | Path, name: str) -> list[Path]:
    """Returns a directory's files `<name>-<rank>-of-<world size>.safetensors`. Raises UserError if some are missing."""
    paths = sorted(Path(directory).glob(f"{name}-*-of-*.safetensors"))
    if paths and len(paths) != (world_size := int(paths[0].stem.rpartition("-")[2])):
        raise UserError(f"{directory} holds {len(paths)} of the {world_size} files {name}-*.safetensors: copy it again")
    return paths


def parameter_file_name(name: str, rank: int, world_size: int) -> str:
    """Returns the name of a process's file. Names that differ only in the rank belong together."""
    return f"{name}-{rank + 1:05}-of-{world_size:05}.safetensors"


def open_side_files(source: str | Path, name: str | None, config: ModelConfig) -> ParameterFiles | None:
    """Opens the side files of a checkpoint that have one of the names in SIDE_FILES, and checks their sizes. Returns
    None if there are none, or without a name.

    Raises UserError if some are missing, or if they are those of another model.
    """
    if not (name and (paths := find_parameter_files(source, name))):
        return None
    values = ParameterFiles(paths, f"the {'Fisher information' if name == FISHER else name} in {source}")
    values.check(SIDE_FILES[name], {name: math.prod(shape) for name, shape in parameter_shapes(config).items()})
    return values
