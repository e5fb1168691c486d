"""Values of parameters stored next to a checkpoint, such as a posterior. Writer and reader."""
import math
import re
from pathlib import Path

import torch

from common.files import UserError
from model.checkpoint import open_shard, write_tensors
from model.transformer import parameter_shapes

POSTERIOR, FISHER = "posterior", "fisher"  # what fine-tuning may leave beside the weights, see partitions.find_parameter_files


def write_parameter_file(path, mine, kinds):
    """Writes what the parameters of some fragments have of each kind. kinds: name -> function(fragment), which gives a
    tensor [count] in fp32; one is held at a time.

    A fragment is stored under `<kind>/<parameter>@<first element>`, so that any number of processes under any ZeRO
    stage can read what any other has written.
    """
    values = [(f"{kind}/{fragment.name}@{fragment.start}", fragment, value)
              for fragment in mine for kind, value in kinds.items()]
    write_tensors(path, {key: (torch.float32, (fragment.count,)) for key, fragment, _ in values},
                  ((key, value(fragment)) for key, fragment, value in values))


class ParameterFiles:
    """The values in files that write_parameter_file wrote, those of all processes. what: what they are called in messages."""

    def __init__(self, paths, what):
        self.files, self.places, self.what = [open_shard(path) for path in paths], {}, what
        for path, file in zip(paths, self.files):
            for key in file.keys():  # noqa: SIM118, the file is no mapping
                if (match := re.fullmatch(r"(\w+)/(.+)@(\d+)", key)) is None:
                    raise UserError(f"{path} is no file of this program: it holds {key!r}")
                self.places.setdefault((match[1], match[2]), []).append((int(match[3]), file, key))
        self.kinds = {kind for kind, _ in self.places}

    def check(self, kinds, sizes):
        """Raises UserError where there are other parameters than those of a model, or not all values of one.

        sizes: name -> number of elements.
        """
        found = {key: sum(file.get_slice(name).get_shape()[0] for _, file, name in places)
                 for key, places in self.places.items()}
        wanted = {(kind, name): size for kind in kinds for name, size in sizes.items()}
        if wrong := sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)):
            (kind, name), more = wrong[0], f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"{self.what} is that of another model: {found.get(wrong[0], 0):,} values of {kind} of "
                            f"{name}, expected {wanted.get(wrong[0], 0):,}{more}")

    def read(self, kind, name, start, into):
        """Fills a tensor [count] with elements [start, start + count) of what a flattened parameter has of a kind."""
        filled, stop = 0, start + len(into)
        for first, file, key in self.places.get((kind, name), []):
            part = file.get_slice(key)
            low, high = max(start, first), min(stop, first + part.get_shape()[0])
            if low < high:
                into[low - start:high - start].copy_(part[low - first:high - first])
                filled += high - low
        if filled != len(into):
            raise UserError(f"{self.what} has {filled:,} of the {len(into):,} values of {kind} of {name} that are "
                            "needed: it is that of another model")


def find_parameter_files(directory, name):
    """The files `<name>-<rank>-of-<processes>.safetensors` in a directory, in order; a UserError where some of them are
    missing."""
    found = sorted(Path(directory).glob(f"{name}-*-of-*.safetensors"))
    if found and len(found) != int(found[0].stem.rpartition("-")[2]):
        raise UserError(f"{directory} holds {len(found)} of the {int(found[0].stem.rpartition('-')[2])} files "
                        f"{name}-*.safetensors: copy it again")
    return found


def parameter_file_name(name, rank, processes):
    """The name of a process's file; those that differ only in the rank belong together."""
    return f"{name}-{rank + 1:05}-of-{processes:05}.safetensors"


def open_prior(files, source, config):
    """A posterior, as ParameterFiles; None where there are no files."""
    return open_parameter_files(files, f"the posterior in {source}", ("mean", "precision"), config)


def open_fisher(files, source, config):
    """Fisher information, as ParameterFiles; None where there are no files."""
    return open_parameter_files(files, f"the Fisher information in {source}", ("fisher",), config)


def open_parameter_files(files, what, kinds, config):
    """Files of parts, compared with the shape of the model; None where there are none."""
    if not files:
        return None
    parts = ParameterFiles(files, what)
    parts.check(kinds, {name: math.prod(shape) for name, shape in parameter_shapes(config).items()})
    return parts
