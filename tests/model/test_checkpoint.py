"""Reading and writing Hugging Face directories, and rejecting damaged ones."""
import json
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import UserError
from common.writing import new_directory
from model import hub
from model.checkpoint import (
    INDEX,
    WEIGHTS,
    CheckpointReader,
    checkpoint_digest,
    is_finite,
    open_checkpoint,
    write_checkpoint,
    write_weights,
)
from model.config import ModelConfig
from model.hub import HubConfig, load_model
from model.transformer import parameter_shapes
from tests.conftest import error_line, random_model, run_script

IDS = torch.arange(3, 120)[None]


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def logits(directory):
    with torch.no_grad():
        return load_model(directory)(IDS)


def test_saved_checkpoint_loads_in_transformers(checkpoint):
    theirs, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(logits(checkpoint), theirs(IDS).logits, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token_id == 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_loads_what_transformers_saves(checkpoint, tmp_path, tied, shard):
    ours = random_model(tie_word_embeddings=tied)
    with new_directory(tmp_path / "ours") as folder:
        write_checkpoint(folder, ours.config, ours.named_parameters(), checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / INDEX).exists() == (shard == "20KB")
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "theirs"), ours(IDS), atol=0, rtol=0)


def test_shards_are_what_the_library_reads(tmp_path):
    tensors = {f"t{i}": torch.randn(7, i + 1).to(dtype) for i, dtype in
               enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32))}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_weights(tmp_path, specs, tensors.items(), max_shard_bytes=60)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_one_file_has_precedence_over_an_index_as_in_transformers(copy):
    """save_pretrained removes the shards that it replaces by one file, and leaves their index."""
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    theirs = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(copy), theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_are_read_as_they_are(copy, sharded):
    expected = logits(copy)
    state = load_file(copy / WEIGHTS) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    (copy / WEIGHTS).unlink()
    names = sorted(state)
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, copy / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, copy / "pytorch_model.bin")
    before = sorted(copy.iterdir())
    assert torch.equal(logits(copy), expected)
    assert sorted(copy.iterdir()) == before
    digests = {checkpoint_digest(copy)}
    state["model.norm.weight"][0] += 1
    torch.save({name: state[name] for name in (names[5:] if sharded else names)},
               copy / ("pytorch_model-00002-of-00002.bin" if sharded else "pytorch_model.bin"))
    assert checkpoint_digest(copy) not in digests


def test_a_bin_with_other_dtypes(copy):
    norm = {"model.norm.weight": torch.ones(32, dtype=torch.int64)}
    torch.save(load_file(copy / WEIGHTS) | norm, copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(UserError, match="model.norm.weight has the dtype torch.int64, expected F32, BF16, F16"):
        open_checkpoint(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_neither_read_nor_written(copy, tmp_path, value, dtype):
    name = "model.layers.0.self_attn.q_proj.weight"
    state = {key: tensor.to(dtype) for key, tensor in load_file(copy / WEIGHTS).items()}
    assert all(map(is_finite, state.values()))
    assert is_finite(torch.empty(0, dtype=dtype))
    state[name][7, 7] = value
    assert not is_finite(state[name])
    save_file(state, copy / WEIGHTS)
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        load_model(copy)
    config = ModelConfig.read(copy / "config.json")
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"), \
            new_directory(tmp_path / "out") as folder:
        write_checkpoint(folder, config, [(key, state[key]) for key in parameter_shapes(config)], copy, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("hardware", ["fp32", "bf16"])
def test_fetching_keeps_each_dtype_unless_bf16_is_trained_and_a_loser_finds_it_there(copy, tmp_path, capsys,
                                                                                     monkeypatch, hardware):
    monkeypatch.setattr("model.hub.resolve_dtype", lambda dtype: hardware)
    state = {name: tensor.bfloat16() if tensor.ndim == 2 else tensor
             for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file(state, copy / WEIGHTS)
    out, other = tmp_path / "out", write_checkpoint
    cfg = HubConfig(str(copy), str(out))
    monkeypatch.setattr("model.hub.write_checkpoint", lambda *args: (
        monkeypatch.setattr("model.hub.write_checkpoint", other), hub.main(cfg), other(*args)))
    hub.main(cfg)
    assert capsys.readouterr().out == f"{out}: 48,288 parameters\n{out} is there already\n"
    written = load_file(out / WEIGHTS)
    kept = {name: tensor if hardware == "fp32" else tensor.bfloat16() for name, tensor in state.items()}
    assert all(torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype
               for name, tensor in kept.items())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (tmp_path / "something").mkdir()
    with pytest.raises(UserError, match="exists already"):
        hub.main(HubConfig(str(copy), str(tmp_path / "something")))


def test_a_tied_head_is_the_embedding(checkpoint, tmp_path):
    """transformers uses a head that differs, whatever config.json says. inv_freq of old checkpoints is ignored."""
    ours = random_model(tie_word_embeddings=True)
    write_checkpoint(tmp_path, ours.config, ours.named_parameters(), checkpoint)
    state = load_file(tmp_path / WEIGHTS) | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                             "lm_head.weight": ours.lm_head.weight.detach().clone()}
    save_file(state, tmp_path / WEIGHTS)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path), ours(IDS))
    save_file(state | {"lm_head.weight": torch.zeros(512, 32)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, although"):
        load_model(tmp_path)


def test_every_difference_is_listed(copy):
    state = load_file(copy / WEIGHTS)
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.ones(1)
    state["lm_head.weight"] = torch.zeros(512, 31)
    save_file(state, copy / WEIGHTS)
    with pytest.raises(UserError) as error:
        load_model(copy)
    for said in ("model.norm.weight is missing", "model.extra.weight is not expected",
                 "lm_head.weight has the shape [512, 31], expected [512, 32]"):
        assert said in str(error.value)


@pytest.mark.parametrize("content", [[1], 5, {"weight_map": ["a"]}, {"weight_map": {"model.norm.weight": {"a": 1}}},
                                     {"weight_map": {"model.norm.weight": 5}}, {"weight_map": {}}])
@pytest.mark.parametrize("name", [INDEX, "pytorch_model.bin.index.json"])
def test_an_index_of_another_shape(copy, content, name):
    (copy / WEIGHTS).unlink()
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}: expected an object"):
        load_model(copy)


def index_with(copy, file):
    names = list(load_file(copy / WEIGHTS))
    (copy / WEIGHTS).rename(copy / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors") | {names[0]: file}
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(("file", "said"), [("../secret.safetensors", "would leave the directory"),
                                            ("/etc/passwd", "would leave the directory"),
                                            ("model-00002-of-00002.safetensors", "is missing")])
def test_an_index_may_name_only_files_of_its_directory(copy, file, said):
    index_with(copy, file)
    with pytest.raises(UserError, match=said):
        CheckpointReader(copy)


@pytest.mark.parametrize("keep", [4, 100, 20_000])
def test_a_truncated_file(copy, keep):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:keep])
    assert keep < len(data)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        load_model(copy)


def overlap(header):
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    header[first]["data_offsets"] = header[second]["data_offsets"]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("change", [
    overlap, lambda header: header[Q_PROJ].update(dtype="F7"), lambda header: header[Q_PROJ].update(dtype="I32"),
    lambda header: header[Q_PROJ].update(shape=[-32, -32]), lambda header: header[Q_PROJ].update(shape=[2 ** 62] * 2),
    lambda header: header.update({Q_PROJ: [1]}), lambda header: header.clear()])
def test_a_damaged_header(copy, change):
    data = (copy / WEIGHTS).read_bytes()
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    (copy / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])
    with pytest.raises(UserError, match=r"truncated or damaged|does not fit its config\.json"):
        load_model(copy)
    (copy / WEIGHTS).write_bytes(struct.pack("<Q", 2 ** 60) + data[8:])
    with pytest.raises(UserError, match=r"truncated or damaged"):
        load_model(copy)


def test_open_checkpoint_checks_the_parts_together(checkpoint, copy, tmp_path):
    opened = open_checkpoint(checkpoint, require_eos=True)
    assert (opened.directory, opened.config, opened.tokenizer.eos_id) == (checkpoint, load_model(checkpoint).config, 2)
    parameters = dict(load_model(checkpoint).named_parameters())
    tensors = dict(opened.weights.named_tensors(opened.config))
    assert list(tensors) == list(parameters)
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in tensors.items())
    for file in ("config.json", "tokenizer_config.json"):
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({name: value for name, value in values.items() if "eos" not in name}))
    assert open_checkpoint(copy).tokenizer.eos_id is None
    with pytest.raises(UserError, match=r"names no end-of-text token: add eos_token_id to its config\.json"):
        open_checkpoint(copy, require_eos=True)
    ours = random_model(vocab_size=500)
    write_checkpoint(copy, ours.config, ours.named_parameters(), checkpoint)
    with pytest.raises(UserError, match="special tokens need 512 ids, but the model's vocabulary has only 500"):
        open_checkpoint(copy)


def test_opening_a_checkpoint_imports_neither_the_compiler_nor_the_hooks_of_scripts(checkpoint):
    code = ("import sys; from model.hub import load_model; from model.checkpoint import open_checkpoint;"
            "open_checkpoint(sys.argv[1]); load_model(sys.argv[1]);"
            "print('torch._dynamo' in sys.modules, 'common.preamble' in sys.modules)")
    assert run_script("-c", code, checkpoint, launcher=[sys.executable]).stdout == "False False\n"


def test_no_space_leaves_nothing_behind(checkpoint, tmp_path):
    """The process has a file size limit, which is reached in the middle of the weights."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
            "import runpy; runpy.run_module('model.hub', run_name='__main__', alter_sys=True)")
    result = run_script("-c", code, "--source", checkpoint, "--out", tmp_path / "out", check=False)
    assert f"cannot write {tmp_path / 'out'}" in error_line(result)
    assert not list(tmp_path.iterdir())
