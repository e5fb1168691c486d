"""Grows a model in depth: G_stack (Du et al., Stacking Your Transformers, arXiv 2405.15319, section 3).

    python stack.py --init runs/tiny/stack/base --out runs/tiny/stack/grown --factor 4

The layers of the base are repeated, in order, `factor` times: 0 … L-1, 0 … L-1, …; the embedding, the last norm and
the head are copied. The optimizer and the schedule start anew, which is train.py's business.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from model.checkpoint import Weights, check_vocabulary, checkpoint_digest, locate, write_checkpoint
from model.config import ModelConfig
from model.files import new_directory, write_json
from model.transformer import parameter_shapes
from runs import git_commit
from settings import run, setting, unknown_name


@dataclass(frozen=True)
class GrowthSettings:
    """Settings of one growth."""
    init: str | None = setting(None, "checkpoint of the base: a directory or a Hub id")
    out: str | None = setting(None, "directory to make for the grown checkpoint")
    factor: int = setting(4, "how many times the layers are repeated")
    size: str | None = setting(None, "size preset that says the factor")
    phase: ClassVar = "growth"  # the table of the size's file that holds these settings

    def problems(self):
        found = [f"--{name} is missing" for name in ("init", "out") if not getattr(self, name)]
        found += unknown_name("size", self.size) if self.size else []
        return found + ([f"factor is {self.factor}, expected 2 or more"] if self.factor < 2 else [])


def g_stack(depth, factor):
    """The layer map of G_stack: for each new layer, the layer of the base that it copies."""
    return list(range(depth)) * factor


def grow(source, out, layer_map):
    """Writes the checkpoint whose layer i is layer `layer_map[i]` of the checkpoint `source`, tensor by tensor.

    `growth.json` in it says what was done: the operator's layer map, the base and its digest, the commit.
    """
    source = Path(source)
    base, weights = ModelConfig.read(source / "config.json"), Weights(source)
    weights.check(base)
    check_vocabulary(source, base)
    config = replace(base, num_hidden_layers=len(layer_map))
    with new_directory(out) as folder:
        write_checkpoint(folder, config, grown_tensors(weights, config, layer_map), source)
        write_json(folder / "growth.json", {"operator": "stack", "layer_map": layer_map, "base": str(source),
                                            "base_digest": checkpoint_digest(source), "commit": git_commit()})
    print(f"{out}: {base.num_hidden_layers} layers grown to {config.num_hidden_layers}, "
          f"{base.num_parameters:,} parameters to {config.num_parameters:,}")


def grown_tensors(weights, config, layer_map):
    """Yields the grown model's (name, tensor) in its own order of names."""
    for name in parameter_shapes(config):
        prefix, _, rest = name.partition("layers.")
        if rest:
            index, _, leaf = rest.partition(".")
            yield name, weights[f"{prefix}layers.{layer_map[int(index)]}.{leaf}"]
        else:
            yield name, weights[name]


def main(s):
    """Grows a checkpoint by the settings."""
    source = locate(s.init)
    grow(source, s.out, g_stack(ModelConfig.read(source / "config.json").num_hidden_layers, s.factor))


if __name__ == "__main__":
    run((GrowthSettings, main), __doc__)
