"""Grows a model in depth, and plans when to.

    python stack.py grow --init runs/tiny/stack/base --out runs/tiny/stack/grown-8 --factor 4
    python stack.py grow --init DIR --out DIR --operator solar --target_layers 48
    python stack.py grow --init DIR --out DIR --layers 0,1,2,0,1,2
    python stack.py plan --params 7e9 --tokens 300e9

An operator (model/growth.py) is a pure function from the depth of the base to a layer map: for each layer of the grown
model, the layer of the base that it copies. G_stack, the default, repeats all layers in order, 0 … L-1, 0 … L-1, … (Du
et al., Stacking Your Transformers, arXiv 2405.15319, section 3). One piece of code moves the weights, whatever the map;
the embedding, the last norm and the head are copied. The optimizer and its schedule start anew after growth, which is
train.py's business. Growth in width is out of scope: every layer keeps its shape.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

from tqdm import tqdm

from common.files import UserError, new_directory, write_json
from common.provenance import git_commit, lineage
from common.settings import model_shape, run, setting, unknown_name
from model.checkpoint import Weights, check_vocabulary, checkpoint_digest, write_checkpoint
from model.config import ModelConfig
from model.growth import OPERATORS, check_map, grown_tensors
from model.hub import locate
from model.transformer import parameter_shapes

FORMULA = "log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, C = 6 N D"

# Du et al., arXiv 2405.15319: models and tokens that the guideline is applied to, with d as printed there, in billions.
PUBLISHED = {"Llama3-8B": (8e9, 15e12, 6.58), "Llama2-7B": (7e9, 2e12, 11.11), "Llama2-13B": (13e9, 2e12, 15.84),
             "Llama2-70B": (70e9, 2e12, 42.48)}

SPEED_UP = 0.546  # of the published 7B: the loss of 300B tokens with 194B; C_scratch / C_grown - 1 (ibid., abstract)

FITTED = 410e6, 3e9  # parameters of the models that the formula was fitted on (ibid., guideline on growth timing)



@dataclass(frozen=True)
class GrowConfig:
    """Settings of one growth."""
    init: str | None = setting(None, "checkpoint of the base: a directory or a Hub id")
    out: str | None = setting(None, "directory to make for the grown checkpoint")
    operator: Literal["stack", "interleave", "middle", "partial", "solar"] = setting("stack", "which layers to repeat")
    factor: float | None = setting(None, "how many times as deep; 4 where nothing else says how deep")
    target_layers: int | None = setting(None, "number of layers of the grown model, in place of the factor")
    block: tuple[int, ...] | None = setting(None, "first and last layer of the block that partial repeats")
    layers: tuple[int, ...] | None = setting(None, "the layer map itself, in place of an operator: 0,1,2,0,1,2")
    zero_init: bool = setting(False, "new layers add nothing at first: output projections 0, the function preserved")
    noise: float = setting(0.0, "Gaussian noise on the new layers' matrices, as a share of each one's own spread")
    seed: int = setting(42, "seed of the noise")

    def problems(self):
        found = [f"--{name} is missing" for name in ("init", "out") if not getattr(self, name)]
        given = [name for name in ("factor", "target_layers", "layers") if getattr(self, name) is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(given)} each say how deep: give one, and none for the other")
        if self.layers is not None and self.operator != "stack":
            found.append(f"layers and operator {self.operator} both say which layers to repeat: give one")
        if self.factor is not None and not 2 <= self.factor < math.inf:
            found.append(f"factor is {self.factor:g}, expected 2 or more; smaller growth is set by target_layers")
        if (self.block is None) == (self.operator == "partial"):
            found.append("block (two numbers, first and last layer) goes with the operator partial, and only with it")
        if self.block is not None and len(self.block) != 2:
            found.append(f"block has {len(self.block)} numbers, expected two: the first and the last layer")
        if not 0 <= self.noise < math.inf:
            found.append(f"noise is {self.noise}, expected 0 or more")
        return found + ([f"seed is {self.seed}, expected 0 or more"] if self.seed < 0 else [])


def layer_map_of(cfg, depth):
    """The layer map that the settings ask for, on a base of `depth` layers. Raises UserError where there is none."""
    if cfg.layers is not None:
        if outside := [layer for layer in cfg.layers if not 0 <= layer < depth]:
            raise UserError(f"layers names {', '.join(map(str, outside))}, but the base has the layers "
                            f"0 to {depth - 1}")
        return list(cfg.layers)
    target = cfg.target_layers if cfg.target_layers is not None else depth * (cfg.factor or 4)
    if target != int(target):
        raise UserError(f"{cfg.factor:g} times {depth} layers are no whole number of layers: set target_layers")
    if target <= depth:
        raise UserError(f"target_layers is {target}, expected more than the {depth} of the base")
    return OPERATORS[cfg.operator](depth, int(target), *(cfg.block or ()))


def grow(cfg):
    """Grows a checkpoint by the settings, from directory to directory, tensor by tensor.

    `growth.json` in the new one says how it was made, and what was spent on the base.
    """
    source = locate(cfg.init)
    base, weights = ModelConfig.read(source / "config.json"), Weights(source)
    weights.check(base)
    check_vocabulary(source, base)
    layer_map = layer_map_of(cfg, base.num_hidden_layers)
    check_map(layer_map, base.num_hidden_layers, cfg.zero_init)
    config = replace(base, num_hidden_layers=len(layer_map))
    with new_directory(cfg.out) as folder:
        tensors = grown_tensors(weights, config, layer_map, cfg.zero_init, cfg.noise, cfg.seed)
        with tqdm(tensors, "growing", len(parameter_shapes(config)), leave=False, unit="tensor") as tensors:
            write_checkpoint(folder, config, tensors, source)
        write_json(folder / "growth.json", {
            "operator": "layers" if cfg.layers else cfg.operator, "layer_map": layer_map, "zero_init": cfg.zero_init,
            "noise": cfg.noise, "seed": cfg.seed, "base": str(cfg.init), "base_digest": checkpoint_digest(source),
            "lineage": lineage(source), "commit": git_commit()})
    print(f"{cfg.out}: {base.num_hidden_layers} layers grown to {config.num_hidden_layers}, "
          f"{base.num_parameters:,} parameters to {config.num_parameters:,}")


@dataclass(frozen=True)
class GrowthPlanConfig:
    """Settings of the growth planner."""
    params: float | None = setting(None, "parameters of the grown model, such as 7e9; none: the published examples")
    tokens: float | None = setting(None, "tokens that a model from scratch would be trained on, such as 300e9")
    size: str | None = setting(None, "size preset whose shape says parameters and depth")
    num_hidden_layers: int | None = setting(None, "depth of the grown model; none: the size's, or Llama's for so many "
                                                  "parameters")
    factor: int = setting(4, "growth factor g")

    def problems(self):
        found = unknown_name("size", self.size) if self.size else []
        if self.size and self.params is not None:
            found.append("params and size both say how large: give one")
        if (self.size is None and self.params is None) != (self.tokens is None):
            found.append("a plan needs the size of the model (--params or --size) and --tokens")
        found += [f"{name} is {value}, expected a number above 0" for name in ("params", "tokens")
                  if (value := getattr(self, name)) is not None and not 0 < value < math.inf]
        found += [f"{name} is {value}, expected {least} or more" for name, least in
                  (("factor", 2), ("num_hidden_layers", 2))
                  if (value := getattr(self, name)) is not None and value < least]
        return found


def growth_timing(params, tokens):
    """d, the tokens after which to grow a base into a model of `params` parameters that would otherwise be trained on
    `tokens` tokens from scratch (Du et al., arXiv 2405.15319, guideline on growth timing; the formula is FORMULA)."""
    return 10 ** (0.88 * math.log10(params) + 163.27 / math.log10(6 * params * tokens) - 5.74)


def usual_depth(params, factor):
    """The depth of a Llama of so many parameters, as a multiple of `factor`: 12 L C² parameters with C = 128 L, the
    proportions of Llama 7B (32 layers of 4,096) and 13B (40 of 5,120)."""
    return max(1, round((params / (12 * 128 ** 2)) ** (1 / 3) / factor)) * factor


def plan(cfg):
    """Prints when and from how deep a base to grow, and what that costs and saves."""
    print(f"growth timing: {FORMULA}\n"
          "(Du et al., arXiv 2405.15319; N parameters, D tokens from scratch, d tokens of the base before growth)")
    if cfg.tokens is None:
        print(f"{'model':<12}{'N':>8}{'D':>8}{'d':>10}{'d published':>13}")
        for name, (params, tokens, published) in PUBLISHED.items():
            print(f"{name:<12}{params / 1e9:>7.0f}B{tokens / 1e12:>7.0f}T{growth_timing(params, tokens) / 1e9:>9.2f}B"
                  f"{published:>12.2f}B")
        return
    grown = ModelConfig(**model_shape(cfg.size, cfg.num_hidden_layers)) if cfg.size else None
    depth = grown.num_hidden_layers if grown else cfg.num_hidden_layers or usual_depth(cfg.params, cfg.factor)
    if depth % cfg.factor:
        raise UserError(f"{depth} layers are no multiple of the factor {cfg.factor}: choose another of the two")
    base = replace(grown, num_hidden_layers=depth // cfg.factor) if grown else None
    params = grown.num_parameters if grown else cfg.params
    base_params = base.num_parameters if base else params / cfg.factor
    d, scratch = growth_timing(params, cfg.tokens), 6 * params * cfg.tokens
    before = 6 * base_params * d
    where = "" if grown or cfg.num_hidden_layers else " (Llama's proportions; --num_hidden_layers sets them)"
    rows = [("model N", f"{params:.4g} parameters, {depth} layers{where}"),
            ("growth factor g", f"{cfg.factor} (2 to 4 are near the optimum)"),
            ("base", f"{base_params:.4g} parameters, {depth // cfg.factor} layers" + ("" if grown else " (N / g)")),
            ("growth timing d", f"{d:.4g} tokens ({d / 1e9:.2f}B)"),
            ("from scratch", f"{scratch:.4g} FLOPs: {cfg.tokens:.4g} tokens")]
    if before < scratch:
        rows += [("grown, same FLOPs", f"{scratch:.4g} FLOPs: {before:.4g} for the base ({before / scratch:.2%}), then "
                                       f"{(scratch - before) / (6 * params):.4g} tokens")]
    if before < scratch / (1 + SPEED_UP):
        rows += [("grown, same loss", f"{scratch / (1 + SPEED_UP):.4g} FLOPs, base included, if it gains what the "
                                      f"published 7B gained (C_scratch / C_grown - 1 = {SPEED_UP:.1%} at 300B tokens)"),
                 ("expected saving", f"{scratch - scratch / (1 + SPEED_UP):.4g} FLOPs, {1 - 1 / (1 + SPEED_UP):.1%}")]
    for name, text in rows:
        print(f"{name:<18} {text}")
    fitted = f"the formula was fitted at {FITTED[0] / 1e9:.2f}B to {FITTED[1] / 1e9:.0f}B parameters"
    if before >= scratch / (1 + SPEED_UP):
        print(f"warning: the base alone would cost {before:.4g} FLOPs, so that growing saves nothing; {fitted} and "
              "does not reach down here: spend a quarter of the FLOPs on the base and see, as "
              "configs/size/small.toml does")
    elif not FITTED[0] <= params <= FITTED[1]:
        print(f"note: {fitted}; this N lies outside")


COMMANDS = {"grow": (GrowConfig, grow), "plan": (GrowthPlanConfig, plan)}

if __name__ == "__main__":
    run(COMMANDS, __doc__)
