"""Grows a model in depth, and plans when to.

    python stack.py grow --init runs/tiny/stack/base --out runs/tiny/stack/grown-8 --factor 4
    python stack.py grow --init DIR --out DIR --operator solar --target_layers 48
    python stack.py grow --init DIR --out DIR --layers 0,1,2,0,1,2
    python stack.py grow --init DIR --out DIR --operator expand --new_layers 8      the function is preserved
    python stack.py plan --params 7e9 --tokens 300e9

A growth operator (model/growth.py) is a pure function from the depth of the base to a layer map: for each layer of the
grown model, the layer of the base that it copies. G_stack, the default, repeats all layers in order: 0 … L-1, 0 … L-1
(Du et al., Stacking Your Transformers, arXiv 2405.15319, section 3). The embedding, the final norm and the head are
copied. After growth the optimizer starts again, unless --moments carries its state over. Growth in width is out of
scope: every layer keeps its shape.
"""
import common.preamble

from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from common.files import UserError
from common.provenance import GROWTH, git_commit, read_lineage, write_record
from common.scripts import Commands, run
from common.settings import setting
from common.writing import new_directory
from model.checkpoint import checkpoint_digest, open_checkpoint, write_checkpoint
from model.config import MAX_LAYERS
from model.growth import (
    BLOCK_OPERATORS,
    OPERATORS,
    ZERO_OPERATORS,
    base_names,
    check_layer_map,
    grown_tensors,
    new_layers,
    open_moments,
    write_moments,
)
from model.hub import fetch_checkpoint
from pipeline.growth_timing import GrowthPlanConfig, print_growth_plan


@dataclass(frozen=True)
class GrowConfig:
    """Settings of one growth."""
    init: str = setting(None, "checkpoint of the base: a directory or a Hub id", required=True)
    out: str = setting(None, "directory of the grown checkpoint", required=True)
    operator: str = setting("stack", f"growth operator: {', '.join(OPERATORS)}", names=OPERATORS)
    factor: float | None = setting(None, "growth factor, 4 if no other setting gives the depth; for less than 2 give "
                                         "target_layers", at_least=2, at_most=MAX_LAYERS)
    target_layers: int | None = setting(None, "number of layers of the grown model, instead of the factor",
                                        at_most=MAX_LAYERS)
    new_layers: int | None = setting(None, "number of layers to add, instead of the factor", at_least=1,
                                     at_most=MAX_LAYERS)
    block: tuple[int, ...] | None = setting(None, "first and last layer of the block that partial repeats")
    layers: tuple[int, ...] | None = setting(None, "the layer map itself, instead of an operator: 0,1,2,0,1,2")
    zero_init: bool = setting(False, "new layers add nothing at first: their output projections are 0, so that the "
                                     "function is preserved")
    noise: float = setting(0.0, "Gaussian noise on the new layers' matrices, as a share of the standard deviation of "
                                "each", at_least=0, at_most=100)
    seed: int = setting(42, "seed of the noise", at_least=0)
    moments: Literal["reset", "copied", "zero"] = setting(
        "reset", "the base's optimizer moments (train.py --carry_moments): reset: not written; copied: those of the "
                 "copied layers; zero: zero in the new layers")

    @property
    def adds_nothing(self) -> bool:
        """Whether the output projections of the new layers are 0."""
        return self.zero_init or self.operator in ZERO_OPERATORS

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = []
        depths = [name for name in ("factor", "target_layers", "new_layers", "layers")
                  if getattr(self, name) is not None]
        if len(depths) > 1:
            found.append(f"{' and '.join(depths)} each give the depth: give one, and none for the other")
        if self.layers is not None and self.operator != "stack":
            found.append(f"layers and operator {self.operator} both say which layers to repeat: give one")
        if (self.block is None) == (self.operator in BLOCK_OPERATORS):
            found.append(f"block (two numbers, first and last layer) is for the operator {', '.join(BLOCK_OPERATORS)}, "
                         "which needs it")
        if self.seed != GrowConfig.seed and not self.noise:
            found.append("seed would change nothing without noise: give it as well")
        if self.block is not None and len(self.block) != 2:
            found.append(f"block has {len(self.block)} numbers, expected two: the first and the last layer")
        return found


def layer_map_of(cfg: GrowConfig, depth: int) -> list[int]:
    """The layer map that the settings describe, on a base of `depth` layers. Raises UserError if there is none."""
    if cfg.layers is not None:
        check_layer_map(cfg.layers, depth, cfg.zero_init)
        if len(cfg.layers) <= depth:
            raise UserError(f"layers has {len(cfg.layers)} entries, expected more than the {depth} layers of the base")
        return list(cfg.layers)
    factor = cfg.factor or 4
    target = depth + cfg.new_layers if cfg.new_layers else \
        depth * factor if cfg.target_layers is None else cfg.target_layers
    if target > MAX_LAYERS:
        raise UserError(f"{depth} layers would grow to {target:,.0f}, more than {MAX_LAYERS:,}: choose fewer")
    if target != int(target):
        raise UserError(f"{factor:g} times {depth} layers are not a whole number of layers: set target_layers")
    if target <= depth:
        raise UserError(f"target_layers is {target}, expected more than the {depth} of the base")
    layer_map = OPERATORS[cfg.operator](depth, int(target), *(cfg.block or ()))
    check_layer_map(layer_map, depth, cfg.adds_nothing)
    return layer_map


def grow(cfg: GrowConfig) -> None:
    """Grows a checkpoint, tensor by tensor. `growth.json` in the new directory records the growth and the lineage."""
    checkpoint = open_checkpoint(fetch_checkpoint(cfg.init))
    source, base = checkpoint.directory, checkpoint.config
    layer_map = layer_map_of(cfg, base.num_hidden_layers)
    lineage = read_lineage(source) | {"new_layers": new_layers(layer_map)}
    lineage.pop("inserted", None)  # the new layers are no longer those of a block expansion in the chain
    if cfg.moments == "reset":
        lineage.pop("updates", None)
    config = base.with_layers(layer_map)
    moments = None if cfg.moments == "reset" else open_moments(source, base)
    dtypes = {name: checkpoint.weights.dtype(copied) for name, copied in base_names(config, layer_map).items()}
    with new_directory(cfg.out) as folder:
        tensors = grown_tensors(checkpoint.weights, config, layer_map, cfg.adds_nothing, cfg.noise, cfg.seed)
        with tqdm(tensors, "growing", len(dtypes), leave=False, unit="tensor", disable=None) as progress:
            write_checkpoint(folder, config, progress, source, dtypes)
        if moments:
            write_moments(folder, moments, base, layer_map, cfg.moments == "zero")
        write_record(folder, {
            "operator": "layers" if cfg.layers else cfg.operator, "layer_map": layer_map, "zero_init": cfg.adds_nothing,
            "noise": cfg.noise, "seed": cfg.seed, "moments": cfg.moments, "base": str(cfg.init),
            "base_digest": checkpoint_digest(source), "lineage": lineage, "commit": git_commit()}, GROWTH)
    print(f"{cfg.out}: {base.num_hidden_layers} layers grown to {config.num_hidden_layers}, "
          f"{base.num_parameters:,} parameters to {config.num_parameters:,}")


COMMANDS: Commands = {"grow": (GrowConfig, grow), "plan": (GrowthPlanConfig, print_growth_plan)}

if __name__ == "__main__":
    run(COMMANDS, __doc__)
