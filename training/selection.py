"""Selection of the parameters that a run trains.

The others are frozen: they have no gradient, master copy or optimizer state.
"""
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from common.files import UserError
from common.formatting import format_names
from model.config import ModelConfig
from model.lora import LoRA, adapter_shapes
from model.transformer import parameter_shapes

ALL, NEW_LAYERS, LORA = "all", "new_layers", "lora"  # what `train` may name apart from patterns

Shapes = Mapping[str, tuple[int, ...]]


def selected_shapes(train: Sequence[str], config: ModelConfig, lora: LoRA | None, lineage: Mapping[str, Any],
                    init: str | None) -> Shapes:
    """The parameters to train, in model order: name -> shape.

    Args:
        train: the words of the setting: `all`, `new_layers`, `lora` or patterns of names as in the shell.
        config: the shape of the model.
        lora: the adapters, if `lora` is one of the words.
        lineage: the model's, whose `new_layers` are the layers that the last growth added.
        init: the initial checkpoint, for messages.

    Raises UserError for patterns that match no parameter or all of them, and for new layers that are not known.
    """
    if lora:
        return adapter_shapes(config, lora)
    shapes = parameter_shapes(config)
    patterns = [word for word in train if word not in (ALL, NEW_LAYERS)]
    if unmatched := [word for word in patterns if not any(fnmatchcase(name, word) for name in shapes)]:
        raise UserError(f"train: no parameter matches {', '.join(unmatched)}: expected {ALL}, {NEW_LAYERS}, {LORA} or "
                        f"patterns of names such as {next(name for name in shapes if 'q_proj' in name)}")
    if NEW_LAYERS in train:
        if not (new := lineage.get(NEW_LAYERS)):
            raise UserError(f"train: {init or 'a new model'} has no new layers: expected a growth.json of stack.py, or "
                            "a run that started from it; or give --new_layers N to insert some")
        depth = config.num_hidden_layers
        if outside := [layer for layer in new if type(layer) is not int or layer not in range(depth)]:
            raise UserError(f"train: {init} has {depth} layers, but its growth.json or run.json names the new layers "
                            f"{', '.join(map(str, outside))}: it is that of another model")
        patterns += [f"model.layers.{layer}.*" for layer in new]
    chosen = {name: shape for name, shape in shapes.items()
              if ALL in train or any(fnmatchcase(name, pattern) for pattern in patterns)}
    if ALL not in train and len(chosen) == len(shapes):
        raise UserError(f"train: {', '.join(train)} matches all parameters: give {ALL}")
    return chosen


def count_elements(shapes: Shapes) -> int:
    """The number of elements of some parameters."""
    return sum(map(math.prod, shapes.values()))


def training_flops(tokens: float, config: ModelConfig, chosen: Shapes) -> float:
    """The FLOPs of training some parameters on a number of tokens; of all parameters, `config.flops(tokens)`.

    The forward pass takes 2 of the 6 FLOPs per parameter. The gradients of the inputs take 2 for those that the
    backward pass reaches (`num_reached`), and the gradients of the weights 2 for those that are trained.
    """
    return 2 * (config.num_parameters + num_reached(config, chosen) + count_elements(chosen)) * tokens


def num_reached(config: ModelConfig, chosen: Shapes) -> int:
    """The number of parameters that the backward pass reaches, from the head down to the first layer with a parameter
    that is trained."""
    def depth(name: str) -> int:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return int(layer[1]) if layer else -1 if "embed_tokens" in name else config.num_hidden_layers

    first = min(map(depth, chosen))
    is_head = {"model.embed_tokens.weight"} if config.tie_word_embeddings else set()
    return sum(math.prod(shape) for name, shape in parameter_shapes(config).items()
               if depth(name) >= first or name in is_head)


def describe_selection(chosen: Shapes, config: ModelConfig) -> str:
    """The layers and other parameters that are trained, in words: "layers 2, 5 and model.norm.weight"."""
    layers = layer_names(chosen, config)
    others = [name for name in chosen if not re.match(r"model\.layers\.", name)]
    return " and ".join(filter(None, (layers, format_names(others))))


def layer_names(names: Iterable[str], config: ModelConfig) -> str:
    """The layers that own some parameters: "all 8 layers", "layers 2, 5"; "" for none."""
    layers = sorted({int(found[1]) for name in names if (found := re.match(r"model\.layers\.(\d+)\.", name))})
    if len(layers) == config.num_hidden_layers:
        return f"all {len(layers)} layers"
    if not layers:
        return ""
    return f"{'layers' if len(layers) > 1 else 'layer'} {', '.join(map(str, layers))}"
