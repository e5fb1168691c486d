"""The shape of a model: one frozen dataclass, read from and written to a Hugging Face `config.json`."""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.configs import read_config
from common.files import UserError, is_number, parsing, read_json
from common.writing import write_json
from model.families import (
    FAMILIES,
    FULL,
    MAX_LAYERS,
    SLIDING,
    Family,
    find_family,
    layer_kinds_options,
    layer_kinds_problems,
    no_rope_pattern,
    read_layer_kinds,
)

# Options of transformers' configuration that do not change the function that the weights compute. Names that begin
# with an underscore are private to transformers and are ignored too.
IGNORED_OPTIONS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "pretraining_tp",
    "name_or_path", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "task_specific_params", "problem_type", "id2label", "label2id", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "finetuning_task", "tokenizer_class", "prefix", "max_sequence_length",
    "chunk_size_feed_forward", "is_decoder", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "early_stopping",
    "num_return_sequences", "num_beam_groups", "diversity_penalty", "typical_p", "encoder_no_repeat_ngram_size",
    "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "auto_map", "attn_implementation",
}

# Options that are accepted only with the value that the decoder implements.
FIXED_OPTIONS = {"hidden_act": "silu", "attention_dropout": 0.0}
# The same, also within rope_scaling; not written.
NEUTRAL_OPTIONS = {"partial_rotary_factor": 1.0, "truncate": True, "is_causal": True}

# Limits of what is accepted. Numbers within the range do not overflow in fp32 when they are combined.
MAX_SIZE, MAX_PARAMETERS = 2 ** 31 - 1, 10 ** 15
SMALLEST, LARGEST = 1e-12, 1e12
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that only some families have, and their values in the other families.
FAMILY_FIELDS = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "layer_types": None,
                 "no_rope_layers": None}
LAYER_KINDS = ("layer_types", "no_rope_layers")  # fields with a value for each layer

ROPE_OPTIONS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
OPTIONAL_ROPE_OPTIONS = {"yarn": {"beta_fast", "beta_slow", "attention_factor"}}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder, with the names of Hugging Face's `config.json`.

    `model_type` names the family (see model/families.py). `num_key_value_heads` defaults to `num_attention_heads`,
    `head_dim` to hidden_size / num_attention_heads. `rope_scaling` is None or a mapping with `rope_type` "linear"
    (divides positions by `factor`; Chen et al., arXiv 2306.15595), "llama3" (scales by frequency; Llama 3.1) or "yarn"
    (Peng et al., arXiv 2309.00071). In layers of the type "sliding_attention", or in all layers without `layer_types`,
    a token attends to the last `sliding_window` tokens, itself included. Layers with 0 in `no_rope_layers` have no
    rotary embedding. Raises UserError with all problems if the values do not fit together.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # set by __post_init__
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        problems = [f"{name} is {value!r:.80}, expected a whole number from 1 to {limit(name):,}" for name in SIZES
                    if (value := getattr(self, name)) is not None
                    and not (type(value) is int and 0 < value <= limit(name))]
        problems += [f"{name} is {value!r:.80}, expected a number from {SMALLEST} to {LARGEST}" for name in NUMBERS
                     if not in_range(value := getattr(self, name))]
        problems += [f"{name} is {value!r:.80}, expected true or false" for name in SWITCHES
                     if type(value := getattr(self, name)) is not bool]
        problems += [] if self.model_type in FAMILIES else \
            [f"model_type is {self.model_type!r:.80}, expected one of {', '.join(FAMILIES)}"]
        if problems:
            raise UserError("model shape: " + "; ".join(problems))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                f"{self.num_attention_heads}, and head_dim is not given")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.no_rope_layers is None:
            object.__setattr__(self, "no_rope_layers",
                               no_rope_pattern(self.num_hidden_layers, self.family.no_rope_interval))
        problems += layer_kinds_problems(vars(self))
        problems += [f"{name} is {getattr(self, name)!r:.80}, which models of the type {self.model_type} do not have"
                     for name, absent in FAMILY_FIELDS.items()
                     if name not in self.family.options and getattr(self, name) != absent]
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                            f"{self.num_key_value_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd; the rotary embedding rotates pairs")
        if self.rope_scaling is not None:
            problems += rope_problems(self.rope_scaling, self.rope_theta)
        if not problems and self.num_parameters > MAX_PARAMETERS:
            problems.append(f"{self.num_parameters:,} parameters are more than {MAX_PARAMETERS:,}")
        for name in SPECIAL_IDS:
            problems += special_id_problems(name, getattr(self, name), self.vocab_size)
        if problems:
            raise UserError("model shape: " + "; ".join(problems))

    @property
    def family(self) -> Family:
        """The differences between the model's family and Llama."""
        return FAMILIES[self.model_type]

    def window(self, layer: int) -> int | None:
        """Returns the number of tokens that a token attends to in a layer; None: all before it."""
        return self.sliding_window if self.layer_types is None or self.layer_types[layer] == SLIDING else None

    @property
    def windows(self) -> set[int | None]:
        """The windows of all layers."""
        return {self.window(layer) for layer in range(self.num_hidden_layers)}

    def rotates(self, layer: int) -> bool:
        """Returns whether a layer has the rotary embedding."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])

    @property
    def rotary_scale(self) -> float:
        """Factor of the rotary embedding's cos and sin, with which YaRN scales the attention (eq. 22)."""
        scaling = self.rope_scaling or {}
        default = 0.1 * math.log(max(scaling["factor"], 1)) + 1 if scaling.get("rope_type") == "yarn" else 1.0
        return scaling.get("attention_factor", default)

    def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
        """Returns the configuration of a model whose layers are copies of these, in this order. A copy is of the kind
        of its original: it has the same window, and a rotary embedding if the original has one."""
        kinds: dict[str, Any] = {name: [values[layer] for layer in layers] for name in LAYER_KINDS
                                 if (values := getattr(self, name))}
        return replace(self, num_hidden_layers=len(layers), **kinds)

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_parameters(self) -> int:
        """Number of parameters. A tied head is not counted again."""
        C, D, F = self.hidden_size, self.head_dim, self.intermediate_size
        query, key = self.num_attention_heads * D, self.num_key_value_heads * D
        layer = 2 * C * (query + key) + 3 * C * F + 2 * C
        layer += (self.attention_bias or self.family.qkv_bias) * (query + 2 * key) + self.attention_bias * C
        layer += self.mlp_bias * (2 * F + C)
        layer += {None: 0, "head": 2 * D, "projection": query + key}[self.family.qk_norm]
        return self.num_hidden_layers * layer + (2 - self.tie_word_embeddings) * self.vocab_size * C + C

    def flops(self, tokens: float) -> float:
        """Returns the FLOPs of training all parameters on a number of tokens: C = 6 N D (Kaplan et al., arXiv
        2001.08361, section 2.1), without attention scores, as in the papers on growth. N includes the embeddings."""
        return 6 * self.num_parameters * tokens

    @classmethod
    def read(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`. Raises UserError that names every option the decoder does not implement."""
        raw = read_json(path, dict)
        with parsing(path, "the configuration of a model"):
            try:
                return cls(**config_values(raw))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None

    def write(self, directory: str | Path, dtype: str) -> None:
        """Writes `config.json` into a directory, for weights of `dtype`, one of "float32", "bfloat16" and "float16"."""
        # A special id that is not given is written as null, because transformers has defaults for absent ones.
        values = {name: value for name, value in asdict(self).items() if name in SPECIAL_IDS or value is not None and
                  (name not in FAMILY_FIELDS or name in self.family.options)}
        if values.get("rope_scaling", {}).get("rope_type") == "linear":  # by the older name, which all versions read
            values["rope_scaling"] = {"type": "linear", "factor": values["rope_scaling"]["factor"]}
        head = {"architectures": [self.family.architecture], "torch_dtype": dtype}
        write_json(Path(directory) / "config.json",
                   head | FIXED_OPTIONS | values | layer_kinds_options(vars(self), self.family))


def size_config(size: str, depth: int | None = None, **token_ids: Any) -> ModelConfig:
    """Returns the configuration of a size preset (configs/size), with `depth` layers instead of its own if given.

    token_ids: bos_token_id and eos_token_id. Raises UserError if the preset's table [model] is missing, lacks a field
    or has an unknown one.
    """
    if (shape := read_config("size", size).get("model")) is None:
        raise UserError(f"configs/size/{size}.toml gives no model shape: this size starts from published weights")
    names = [field.name for field in fields(ModelConfig)]
    problems = [f"lacks {name}" for name in names[:5] if name not in shape]
    problems += [f"has an unknown field {name!r}" for name in shape if name not in names]
    if problems:
        raise UserError(f"configs/size/{size}.toml: [model] {', '.join(problems)}")
    return ModelConfig(**shape | ({} if depth is None else {"num_hidden_layers": depth}) | token_ids)


def config_values(raw: dict) -> dict:
    """Returns the fields of ModelConfig that the content of a `config.json` gives."""
    family = find_family(raw)
    raw = {**family.defaults, **raw}
    if "layer_types" not in family.options and all(kind == FULL for kind in raw.get("layer_types") or ()):
        raw["layer_types"] = None
    names = [field.name for field in fields(ModelConfig) if
             field.name not in FAMILY_FIELDS or field.name in family.options]
    values = {name: raw[name] for name in names if raw.get(name) is not None} | rope_values(raw)
    values |= read_layer_kinds(raw, family)
    if values.get("pad_token_id") == -1:  # "none" in configurations of the first Llama models
        del values["pad_token_id"]
    problems = [f"option {name} = {raw[name]!r:.80} is not implemented (expected {expected!r})"
                for name, expected in (FIXED_OPTIONS | NEUTRAL_OPTIONS).items() if raw.get(name, expected) != expected]
    known = IGNORED_OPTIONS.union(names, family.options, FIXED_OPTIONS, NEUTRAL_OPTIONS)
    known |= {"rope_parameters"}  # read by rope_values
    problems += [f"option {name} = {value!r:.80} is not implemented" for name, value in raw.items()
                 if name not in known and not name.startswith("_") and value not in (None, False, [], {})]
    problems += [f"{name} is missing" for name in names[:5] if name not in values]
    if problems:
        raise UserError("; ".join(problems))
    return values


def limit(name: str) -> int:
    """Returns the largest accepted value of a size."""
    return MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE


def in_range(value: Any) -> bool:
    """Returns whether a value is a number from SMALLEST to LARGEST."""
    return is_number(value) and SMALLEST <= value <= LARGEST


def special_id_problems(name: str, value: Any, vocab_size: int = MAX_SIZE) -> list[str]:
    """Returns the problems of special token ids, as sentences. Only eos may be a list of ids."""
    several = name == "eos_token_id" and isinstance(value, list)
    ids = value if several else [] if value is None else [value]
    return [f"{name} is {value!r:.80}, expected a token id below {vocab_size:,}" for index in ids
            if type(index) is not int or not 0 <= index < vocab_size][:1]


def rope_values(raw: dict) -> dict:
    """Returns `rope_scaling`, from that name or transformers 5's `rope_parameters`, and `rope_theta` if it is in it."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"rope_scaling is {scaling!r:.80}, expected an object")
    scaling = {name: value for name, value in scaling.items()
               if value is not None and (name, value) not in NEUTRAL_OPTIONS.items()}
    old_name = scaling.pop("type", "default")  # transformers prefers rope_type
    if scaling.setdefault("rope_type", old_name) == "yarn" and "max_position_embeddings" in raw:
        scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    theta = {"rope_theta": scaling.pop("rope_theta")} if "rope_theta" in scaling else {}
    return theta | {"rope_scaling": None if scaling == {"rope_type": "default"} else scaling}


def rope_problems(scaling: dict, theta: float) -> list[str]:
    """Returns the problems of a `rope_scaling` mapping, as sentences."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_OPTIONS:
        return [f"rope_scaling type {kind!r:.80} is not implemented; expected one of {', '.join(ROPE_OPTIONS)}"]
    known = ROPE_OPTIONS[kind].union(OPTIONAL_ROPE_OPTIONS.get(kind, ()))
    missing = ROPE_OPTIONS[kind] - scaling.keys()
    unknown = scaling.keys() - known - {"rope_type"}
    wrong = [f"rope_scaling {name} is {scaling[name]!r:.80}, expected a number from {SMALLEST} to {LARGEST}"
             for name in sorted(known & scaling.keys()) if not in_range(scaling[name])]
    if kind == "yarn" and theta <= 1:
        wrong.append(f"rope_theta is {theta}, expected more than 1 with rope_scaling yarn")
    if kind == "llama3" and not missing and not wrong and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        wrong.append(f"rope_scaling low_freq_factor is {scaling['low_freq_factor']}, expected less than the "
                     f"high_freq_factor {scaling['high_freq_factor']}")
    return wrong + ([f"rope_scaling {kind} needs {', '.join(sorted(missing))}"] if missing else []) + \
           ([f"rope_scaling {kind} does not have {', '.join(sorted(unknown))}"] if unknown else [])
