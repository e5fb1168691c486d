"""The shape of a model: one frozen dataclass, read from and written to a Hugging Face `config.json`."""
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.files import UserError, read_json, write_json

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"

# Options of transformers' configuration that do not change the function that the weights compute. Names that begin
# with an underscore are private to transformers and are ignored too.
IGNORED_OPTIONS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "pretraining_tp",
    "name_or_path", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "task_specific_params", "problem_type", "id2label", "label2id", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "finetuning_task", "tokenizer_class", "prefix", "max_sequence_length",
    "chunk_size_feed_forward", "is_decoder", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "early_stopping",
    "num_return_sequences", "num_beam_groups", "diversity_penalty", "typical_p", "encoder_no_repeat_ngram_size",
    "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "auto_map", "rope_parameters", "hidden_act", "attention_dropout", "attn_implementation",
}

# Options that are accepted only with the value that the decoder implements.
FIXED_OPTIONS = {"hidden_act": "silu", "attention_dropout": 0.0}

ROPE_OPTIONS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a Llama decoder, with the names of Hugging Face's `config.json`.

    `num_key_value_heads` defaults to `num_attention_heads`, `head_dim` to hidden_size / num_attention_heads.
    `rope_scaling` is None or a mapping with `rope_type` "linear" (divides positions by `factor`; Chen et al., arXiv
    2306.15595) or "llama3" (scales by frequency; Llama 3.1). Raises UserError with all problems if the sizes do not
    fit together.
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
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        problems = [f"{name} is {value!r}, expected a whole number above 0"
                    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
                    if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value > 0)]
        problems += [f"{name} is {value!r}, expected a number above 0"
                     for name in ("rms_norm_eps", "rope_theta", "initializer_range")
                     if not is_number(value := getattr(self, name)) or value <= 0]
        if problems:
            raise UserError("model shape: " + "; ".join(problems))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                f"{self.num_attention_heads}, and head_dim is not given")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                            f"{self.num_key_value_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd; the rotary embedding rotates pairs")
        if self.rope_scaling is not None:
            problems += rope_problems(self.rope_scaling)
        if problems:
            raise UserError("model shape: " + "; ".join(problems))

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
        layer += self.attention_bias * (query + 2 * key + C) + self.mlp_bias * (2 * F + C)
        return self.num_hidden_layers * layer + (2 - self.tie_word_embeddings) * self.vocab_size * C + C

    def flops(self, tokens: float) -> float:
        """Returns the FLOPs of training on a number of tokens: C = 6 N D (Kaplan et al., arXiv 2001.08361, section
        2.1), without attention scores, as in the papers on growth."""
        return 6 * self.num_parameters * tokens

    @classmethod
    def read(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`. Raises UserError that names every option the decoder does not implement."""
        raw = read_json(path)
        try:
            return cls(**config_values(raw))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def write(self, directory: str | Path, dtype: str) -> None:
        """Writes `config.json` into a directory, for weights of `dtype` ("float32" or "bfloat16")."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        head = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "torch_dtype": dtype}
        write_json(Path(directory) / "config.json", head | FIXED_OPTIONS | values)


def config_values(raw: Any) -> dict:
    """Returns the fields of ModelConfig that the content of a `config.json` gives."""
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object, found {type(raw).__name__}")
    if raw.get("model_type") != MODEL_TYPE:
        raise UserError(f"model_type {raw.get('model_type')!r} is not implemented; expected {MODEL_TYPE!r}")
    if (architectures := raw.get("architectures") or [ARCHITECTURE]) != [ARCHITECTURE]:
        raise UserError(f"architectures {architectures} is not implemented; expected ['{ARCHITECTURE}']")
    names = [field.name for field in fields(ModelConfig)]
    values = {name: raw[name] for name in names if raw.get(name) is not None} | rope_values(raw)
    problems = [f"option {name} = {raw[name]!r} is not implemented (expected {expected!r})"
                for name, expected in FIXED_OPTIONS.items() if raw.get(name, expected) != expected]
    problems += [f"option {name} = {value!r} is not implemented" for name, value in raw.items()
                 if name not in IGNORED_OPTIONS.union(names) and not name.startswith("_")
                 and value not in (None, False, [], {})]
    problems += [f"{name} is missing" for name in names[:5] if name not in values]
    if problems:
        raise UserError("; ".join(problems))
    return values


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rope_values(raw: dict) -> dict:
    """Returns `rope_scaling`, from that name or transformers 5's `rope_parameters`, and `rope_theta` if it is in it."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"rope_scaling is {scaling!r}, expected an object")
    scaling = dict(scaling)
    theta = {"rope_theta": scaling.pop("rope_theta")} if "rope_theta" in scaling else {}
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    return theta | {"rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def rope_problems(scaling: dict) -> list[str]:
    """Returns the problems of a `rope_scaling` mapping, as sentences."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_OPTIONS:
        return [f"rope_scaling type {kind!r} is not implemented; expected one of {', '.join(ROPE_OPTIONS)}"]
    missing = ROPE_OPTIONS[kind] - scaling.keys()
    unknown = scaling.keys() - ROPE_OPTIONS[kind] - {"rope_type"}
    wrong = [f"rope_scaling {name} is {scaling[name]!r}, expected a number above 0"
             for name in ROPE_OPTIONS[kind] & scaling.keys() if not is_number(scaling[name]) or scaling[name] <= 0]
    return wrong + ([f"rope_scaling {kind} needs {', '.join(sorted(missing))}"] if missing else []) + \
           ([f"rope_scaling {kind} does not have {', '.join(sorted(unknown))}"] if unknown else [])
