"""Families of decoders: how each differs from Llama, and the options of its `config.json`.

To add one, describe it in FAMILIES. tests/model/test_families.py compares every family with transformers.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from common.files import UserError

MAX_LAYERS = 10_000  # the deepest published decoders have 1,000
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of attention in `layer_types`
WINDOW_OPTIONS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


@dataclass(frozen=True)
class Family:
    """The differences between a family and Llama.

    architecture: class in transformers. options: what its `config.json` contains besides the options of all families.
    defaults: values of options that `config.json` lacks, as in transformers, where they differ from ModelConfig's.
    """
    architecture: str
    options: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False  # query, key and value have biases, the output has none
    qk_norm: Literal["head", "projection"] | None = None  # norm of query and key: each head, or all heads together
    norm_after: bool = False  # norms of the outputs of attention and MLP, not of their inputs
    fp32_factors: bool = False  # the weights of norms and the rotation multiply in fp32, also in a model in bf16
    no_rope_interval: int | None = None  # n: every n-th layer has no rotary embedding


FAMILIES = {
    "llama": Family("LlamaForCausalLM", frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(
        "MistralForCausalLM", frozenset({"sliding_window"}),
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}),
    "qwen2": Family(
        "Qwen2ForCausalLM", WINDOW_OPTIONS,
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", WINDOW_OPTIONS | {"attention_bias"},
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096,
         "max_window_layers": 28}, qk_norm="head"),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        WINDOW_OPTIONS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True},
        no_rope_interval=4),
    "olmo2": Family(
        "Olmo2ForCausalLM", frozenset({"attention_bias"}), {"rms_norm_eps": 1e-5}, qk_norm="projection",
        norm_after=True, fp32_factors=True),
}

# What other families need that the decoder lacks, for the error message.
EXPERTS, PARALLEL = "a mixture of experts", "LayerNorm, and attention and MLP in parallel"
GEMMA = "GELU, a scaled embedding, norms with a gain of 1 + weight"
MISSING = {
    "gemma": GEMMA, "gemma2": f"{GEMMA} on both sides, and logit soft-capping",
    **dict.fromkeys(("gemma3", "gemma3_text"), f"{GEMMA} on both sides, and two rotary bases"),
    "gpt_neox": PARALLEL, "phi": PARALLEL, "falcon": PARALLEL, "cohere": PARALLEL, "cohere2": PARALLEL,
    "gpt2": "LayerNorm and learned positions", "opt": "LayerNorm and learned positions",
    "stablelm": "LayerNorm", "starcoder2": "LayerNorm and an MLP without a gate",
    "granite": "scaled embeddings, residuals, attention and logits",
    "olmo": "norms without weights",
    "phi3": "fused projections",
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS, "deepseek_v2": EXPERTS,
    "deepseek_v3": EXPERTS, "gpt_oss": EXPERTS, "llama4": EXPERTS,
}


def find_family(raw: Mapping[str, Any]) -> Family:
    """Returns the family of a `config.json`. Raises UserError, with what the decoder lacks, if it is not implemented.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        missing = f", which needs {MISSING[model_type]}," if isinstance(model_type, str) and model_type in MISSING \
            else ""
        raise UserError(f"model_type {model_type!r:.80}{missing} is not implemented; expected one of "
                        f"{', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if (architectures := raw.get("architectures") or [family.architecture]) != [family.architecture]:
        raise UserError(f"architectures {architectures!r:.80} is not implemented; expected ['{family.architecture}']")
    return family


def no_rope_pattern(depth: int, interval: int | None) -> list[int] | None:
    """Returns `no_rope_layers`: 0 for every `interval`-th layer, which has no rotary embedding, and 1 for the others.
    None without an interval."""
    return [int((index + 1) % interval != 0) for index in range(depth)] if interval else None


def read_layer_kinds(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the fields `sliding_window`, `layer_types` and `no_rope_layers` of ModelConfig from a `config.json` with
    the family's defaults. A list that it lacks follows from its numbers, as in transformers."""
    options = family.options
    if "sliding_window" not in options:
        return {}
    depth = whole_number(raw, "num_hidden_layers", 1)
    no_rope = raw.get("no_rope_layers") if "no_rope_layers" in options else None
    if no_rope is None and family.no_rope_interval:
        no_rope = no_rope_pattern(depth, whole_number(raw, "no_rope_layer_interval", family.no_rope_interval))
    kinds = {"no_rope_layers": no_rope[:depth] if isinstance(no_rope, list) else no_rope,
             "sliding_window": raw.get("sliding_window"), "layer_types": None}
    if "use_sliding_window" not in options:
        return kinds
    layer_types = raw.get("layer_types")
    if not raw.get("use_sliding_window") or raw.get("sliding_window") is None:
        if isinstance(layer_types, list) and SLIDING in layer_types:
            raise UserError(f"layer_types names {SLIDING}, but use_sliding_window or sliding_window is off")
        return kinds | {"sliding_window": None}
    if layer_types is None and isinstance(no_rope, list):
        layer_types = [FULL if rotates else SLIDING for rotates in no_rope]
    elif layer_types is None:
        first = whole_number(raw, "max_window_layers", depth, least=0)
        layer_types = [SLIDING if index >= first else FULL for index in range(depth)]
    return kinds | {"layer_types": layer_types}


def whole_number(raw: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    """Returns a number of layers in a `config.json`, or the default if it is missing."""
    value = default if raw.get(name) is None else raw[name]
    if type(value) is not int or not least <= value <= MAX_LAYERS:
        raise UserError(f"{name} is {value!r:.80}, expected a whole number from {least} to {MAX_LAYERS:,}")
    return value


def layer_kinds_problems(values: Mapping[str, Any]) -> list[str]:
    """Returns the problems of `layer_types` and `no_rope_layers`, as sentences."""
    depth = values["num_hidden_layers"]
    if isinstance(values["layer_types"], list) and SLIDING in values["layer_types"] and not values["sliding_window"]:
        return [f"layer_types names {SLIDING}, but sliding_window is not given"]
    return [f"{name} is {value!r:.80}, expected a list of {expected} for each of the {depth} layers"
            for name, known, expected in (("layer_types", (FULL, SLIDING), f"{FULL!r} or {SLIDING!r}"),
                                          ("no_rope_layers", (0, 1), "0 or 1"))
            if (value := values[name]) is not None
            and not (isinstance(value, list) and len(value) == depth and all(kind in known for kind in value))]


def layer_kinds_options(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the options of a `config.json` that say what `sliding_window`, `layer_types` and `no_rope_layers` say.
    Older tools read `max_window_layers`, the number of layers without a window, instead of `layer_types`."""
    depth, window = values["num_hidden_layers"], values["sliding_window"]
    layer_types = values["layer_types"] or [SLIDING if window else FULL] * depth
    options = {"no_rope_layers": values["no_rope_layers"], "sliding_window": window, "layer_types": layer_types,
               "use_sliding_window": window is not None, "max_window_layers": layer_types.count(FULL)}
    return {name: value for name, value in options.items() if name in family.options}
