"""Reading and writing config.json, and rejecting options that are not implemented."""
import json

import pytest
import torch
from transformers import LlamaConfig

from common.files import UserError
from model.config import ModelConfig
from tests.conftest import SHAPE


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
    theirs.rope_parameters.pop("type", None)  # the old name of rope_type, which transformers keeps too
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps"):
        assert getattr(again, name) == getattr(theirs, name), name


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "gpt2"}, "'gpt2'"),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"sliding_window": 4096}, "sliding_window = 4096"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
    ({"rope_interleaved": True}, "rope_interleaved = True"),
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


def test_all_problems_in_one_message(tmp_path):
    with pytest.raises(UserError, match=r"gelu.*sliding_window.*vocab_size is missing"):
        ModelConfig.read(written(tmp_path, hidden_act="gelu", sliding_window=1, vocab_size=None))
