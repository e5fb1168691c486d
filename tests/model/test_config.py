"""Reading and writing config.json, and rejecting options that are not implemented."""
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from common.files import UserError
from model.config import ModelConfig
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Block, Transformer, parameter_shapes
from tests.conftest import SHAPE

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def written(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE, **changes}))
    return path


@pytest.mark.parametrize("rope", [
    None, {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}])
def test_read_what_transformers_writes_and_it_reads_ours(tmp_path, rope):
    path = written(tmp_path, rope_theta=5e5, **({"rope_scaling": rope} if rope else {}))
    ours = ModelConfig.read(path)
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta == 5e5
    theirs.save_pretrained(tmp_path / "theirs")  # in the spelling of transformers 5: rope_parameters
    assert ModelConfig.read(tmp_path / "theirs/config.json") == ours
    (tmp_path / "ours").mkdir()
    ours.write(tmp_path / "ours", "bfloat16")
    again = LlamaConfig.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for config in (again, theirs):
        config.rope_parameters.pop("type", None)  # the old name of rope_type, which transformers keeps too
    if rope and ours.rope_scaling["rope_type"] == "linear":  # OLMo 2 in transformers 4 takes these two fields alone
        written_scaling = json.loads((tmp_path / "ours/config.json").read_text())["rope_scaling"]
        assert written_scaling == {"type": "linear", "factor": 2.0}
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps"):
        assert getattr(again, name) == getattr(theirs, name), name


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "gpt2"}, "'gpt2'"),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"sliding_window": 4096}, "sliding_window = 4096"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
    ({"rope_interleaved": True}, "rope_interleaved = True"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling type ['linear']"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0, expected less than"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5}}, "low_freq_factor is 5, expected less than"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, "factor is 1e-300"),
    ({"rope_theta": 10 ** 400}, "00000 is not a finite number"),
    ({"rope_theta": float("inf")}, "Infinity is not a finite number"),
    ({"rope_theta": 1e-300}, "rope_theta is 1e-300"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
    ({"num_hidden_layers": 10 ** 7}, "num_hidden_layers is 10000000, expected a whole number from 1 to 10,000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"vocab_size": 10 ** 18}, "vocab_size is 1000"),
    ({"hidden_size": 2 ** 31 - 8, "intermediate_size": 2 ** 31 - 1}, "parameters are more than"),
    ({"eos_token_id": 5000}, "eos_token_id is 5000, expected a token id below 512"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"eos_token_id": 2.5}, "eos_token_id is 2.5"),
    ({"eos_token_id": True}, "eos_token_id is True"),
    ({"eos_token_id": [2, 512]}, "eos_token_id is [2, 512]"),
    ({"eos_token_id": [[2]]}, "eos_token_id is [[2]]"),
    ({"bos_token_id": 512}, "bos_token_id is 512"),
    ({"bos_token_id": [1]}, "bos_token_id is [1]"),
    ({"pad_token_id": {"id": 1}}, "pad_token_id is {'id': 1}"),
])
def test_options_that_are_not_implemented_are_rejected_by_name(tmp_path, changes, named):
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        ModelConfig.read(path)
    assert named in str(error.value)
    assert str(path) in str(error.value)


def test_options_without_effect_are_ignored(tmp_path):
    notes = {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "pruned_heads": {}, "_note": "x",
             "num_return_sequences": 1, "rope_interleaved": False, "sliding_window": None}
    assert ModelConfig.read(written(tmp_path, **notes)) == ModelConfig.read(written(tmp_path))


def test_both_names_of_the_kind_of_rope_scaling(tmp_path):
    """transformers prefers rope_type."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}
    one = ModelConfig.read(written(tmp_path, rope_scaling=scaling))
    assert one.rope_scaling == scaling
    assert ModelConfig.read(written(tmp_path, rope_scaling=scaling | {"type": "default"})) == one
    for without_kind in ({"factor": 2.0}, {"rope_type": "default", "factor": 2.0}):
        with pytest.raises(UserError, match="rope_scaling default does not have factor"):
            ModelConfig.read(written(tmp_path, rope_scaling=without_kind))
    with pytest.raises(UserError, match="rope_scaling type 'dynamic' is not implemented"):
        ModelConfig.read(written(tmp_path, rope_scaling={"rope_type": "dynamic", "type": "linear", "factor": 2.0}))


def test_special_ids_up_to_the_vocabulary(tmp_path):
    config = ModelConfig.read(written(tmp_path, eos_token_id=[511, 0], bos_token_id=511))
    assert (config.eos_token_id, config.bos_token_id) == ([511, 0], 511)


def test_parameter_shapes_builds_one_layer_of_a_deep_model():
    config = ModelConfig(**SHAPE | {"num_hidden_layers": 1000})
    with mock.patch("model.transformer.Block", wraps=Block) as block:
        assert len(parameter_shapes(config)) == 9 * 1000 + 3
    assert block.call_count == 1
    small = replace(config, num_hidden_layers=3, tie_word_embeddings=True, attention_bias=True)
    assert list(parameter_shapes(small).items()) == [(name, tuple(parameter.shape)) for name, parameter
                                                     in Transformer(small).named_parameters()]


def test_all_problems_in_one_message(tmp_path):
    with pytest.raises(UserError, match=r"gelu.*sliding_window.*vocab_size is missing"):
        ModelConfig.read(written(tmp_path, hidden_act="gelu", sliding_window=1, vocab_size=None))


def test_a_pad_token_of_minus_one_is_none(tmp_path):
    """As in configurations of the first Llama models."""
    ModelConfig(**SHAPE).write(tmp_path, "float32")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"pad_token_id": -1}))
    assert ModelConfig.read(tmp_path / "config.json").pad_token_id is None
    train_tokenizer(["some text"], 300, tmp_path)
    assert Tokenizer(tmp_path).pad_id is None
