"""Growth: layer maps by hand, weights bit for bit, and the growth plan compared with the published table."""
import json
import math
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.files import UserError
from common.provenance import git_commit
from model.checkpoint import CheckpointReader, checkpoint_digest
from model.config import ModelConfig
from model.growth import (
    OPERATORS,
    WholeParameter,
    grow_model,
    interleave,
    middle,
    open_moments,
    partial,
    solar,
    stack,
    write_moments,
)
from model.hub import load_model
from model.parameter_files import MOMENTS, SIDE_FILES, parameter_file_name, write_parameter_file
from model.transformer import parameter_shapes
from pipeline.growth_timing import growth_timing
from stack import COMMANDS, GrowConfig, grow, layer_map_of
from tests.conftest import SHAPE, error_line, random_model, run_script


def test_layer_maps_of_six_layers_by_hand():
    assert stack(6, 24) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert interleave(6, 24) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    assert middle(6, 24) == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5]
    assert partial(6, 24, 3, 5) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5]
    assert partial(6, 24, 0, 2) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="two copies of at most 6 layers and cannot make 24"):
        solar(6, 24)
    assert solar(6, 10) == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert solar(6, 12) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert solar(32, 48) == [*range(24), *range(8, 32)]  # SOLAR 10.7B


def test_growth_that_does_not_divide_evenly():
    assert interleave(4, 6) == [0, 0, 1, 2, 2, 3]
    assert interleave(6, 15) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5]
    assert partial(6, 8, 1, 2) == [0, 1, 2, 1, 2, 3, 4, 5]
    assert (middle(1, 3), middle(2, 4), middle(4, 6)) == ([0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 1, 2, 3])
    for operator, target, said in ((stack, 15, "cannot make 15: choose a multiple of 6"),
                                   (middle, 15, "adds 2 layers at a time to 6 and cannot make 15"),
                                   (solar, 9, "cannot make 9: choose an even number from 7 to 12")):
        with pytest.raises(UserError, match=said):
            operator(6, target)
    with pytest.raises(UserError, match="block 4,6 is not a block of the base's layers 0 to 5"):
        partial(6, 12, 4, 6)


@pytest.mark.parametrize("operator", ["midas", "lidas"])
def test_a_block_of_no_layers(operator):
    with pytest.raises(UserError, match=f"{operator} adds one block, whose size must divide the 4 layers of the base"):
        OPERATORS[operator](4, 4)


def test_how_deep():
    def depth(**given):
        return len(layer_map_of(GrowConfig(**given), 6))
    assert (depth(), depth(factor=2.0), depth(factor=2.5, operator="interleave"), depth(target_layers=12)) == \
        (24, 12, 15, 12)
    assert layer_map_of(GrowConfig(layers=(0, 5, 0, 1, 1, 1, 1)), 6) == [0, 5, 0, 1, 1, 1, 1]
    assert layer_map_of(GrowConfig(operator="partial", block=(1, 2), target_layers=8), 6) == partial(6, 8, 1, 2)
    for given, said in (({"factor": 2.3}, "2.3 times 6 layers are not a whole number"),
                        ({"target_layers": 6}, "target_layers is 6, expected more than the 6 of the base"),
                        ({"layers": (0, 6, -1)}, "layers names 6, -1, but the base has the layers 0 to 5")):
        with pytest.raises(UserError, match=said):
            layer_map_of(GrowConfig(**given), 6)


def sources(name, layer_map):
    """The base's name of a grown model's weight."""
    return re.sub(r"layers\.(\d+)", lambda match: f"layers.{layer_map[int(match[1])]}", name)


@pytest.mark.parametrize(("flags", "layer_map"), [
    (["--factor", "3"], [0, 1, 0, 1, 0, 1]), (["--operator", "interleave"], [0, 0, 0, 0, 1, 1, 1, 1]),
    (["--layers", "1,0,0"], [1, 0, 0])])
def test_grown_checkpoint(checkpoint, tmp_path, flags, layer_map):
    base, out = shutil.copytree(checkpoint, tmp_path / "base"), tmp_path / "grown"
    (base / "run.json").write_text('{"lineage": {"flops": 12.5}}')
    result = run_script("stack.py", "grow", "--init", base, "--out", out, *flags)
    assert f"2 layers grown to {len(layer_map)}" in result.stdout
    weights, grown = CheckpointReader(base), CheckpointReader(out)
    assert len(grown.files) == len(layer_map) * 9 + 3
    for name in grown.files:
        assert torch.equal(grown[name], weights[sources(name, layer_map)]), name
    told = json.loads((out / "growth.json").read_text())
    assert told["layer_map"] == layer_map
    assert (told["base"], told["base_digest"]) == (str(base), checkpoint_digest(base))
    new = [layer for layer, source in enumerate(layer_map) if source in layer_map[:layer]]
    assert told["lineage"] == {"flops": 12.5, "new_layers": new}
    assert told["commit"] == git_commit()
    ours = load_model(out)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("layer_map", [stack(3, 12), interleave(3, 7), middle(3, 6), solar(3, 4)])
def test_zero_initialised_growth_computes_what_the_base_does(shape, layer_map):
    base, ids = random_model(num_hidden_layers=3, **shape), torch.arange(3, 90)[None]
    with torch.no_grad():
        expected = base(ids)
        assert torch.equal(grow_model(base, layer_map, zero_init=True)(ids), expected)
        assert torch.equal(grow_model(base, layer_map, zero_init=True, noise=0.5)(ids), expected)
        assert not torch.allclose(grow_model(base, layer_map)(ids), expected, atol=1e-2)


def test_zero_initialisation_needs_every_layer_in_order():
    with pytest.raises(UserError, match="zero_init preserves the function only if the map contains every layer"):
        grow_model(random_model(), [1, 0, 1], zero_init=True)


def test_noise_is_on_the_new_layers_matrices_alone():
    base = random_model(hidden_size=64, intermediate_size=96)
    grown, layer_map = grow_model(base, [0, 1, 0, 1], noise=0.1), [0, 1, 0, 1]
    before, after = base.state_dict(), grown.state_dict()
    for name in after:
        change = after[name] - before[sources(name, layer_map)]
        if re.search(r"layers\.[23].*proj", name):
            spread = before[sources(name, layer_map)].std().item()
            assert change.std().item() == pytest.approx(0.1 * spread, rel=0.1), name
        else:
            assert not change.any(), name
    pairs = [after[f"model.layers.{index}.mlp.up_proj.weight"] for index in (2, 3)]
    noise = [pair - base.state_dict()[f"model.layers.{index}.mlp.up_proj.weight"] for index, pair in enumerate(pairs)]
    assert abs(torch.corrcoef(torch.stack([part.flatten() for part in noise]))[0, 1]) < 0.1
    again = grow_model(base, layer_map, noise=0.1).state_dict()
    other = grow_model(base, layer_map, noise=0.1, seed=1).state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)
    assert not torch.equal(other["model.layers.2.mlp.up_proj.weight"], pairs[0])


def test_a_grown_model_in_memory_equals_the_one_on_disk_and_shares_nothing(checkpoint, tmp_path):
    flags = "--init", checkpoint, "--noise", "0.2", "--factor", "2"
    run_script("stack.py", "grow", *flags, "--seed", "3", "--out", tmp_path / "grown")
    base = load_model(checkpoint)
    grown, on_disk = grow_model(base, [0, 1, 0, 1], noise=0.2, seed=3), load_model(tmp_path / "grown")
    assert all(torch.equal(a, b) for a, b in zip(grown.parameters(), on_disk.parameters(), strict=True))
    pointers = [parameter.data_ptr() for model in (base, grown) for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    run_script("stack.py", "grow", *flags, "--zero_init", "--out", tmp_path / "zero")
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "zero")(ids), base(ids))


@pytest.mark.parametrize(("flags", "said"), [
    (["--factor", "1"], "factor is 1.0, expected a number from 2 to 10000"),
    (["--factor", "1.5"], "factor is 1.5, expected a number from 2 to 10000"),
    (["--factor", "2", "--init", "nowhere"], "nowhere is neither a checkpoint directory nor a Hub id"),
    (["--target_layers", "5"], "cannot make 5: choose a multiple of 2"),
    (["--layers", "0,2"], "layers names 2, but the base has the layers 0 to 1"),
    (["--layers", "0,x"], "layers is '0,x', expected whole numbers separated by commas"),
    (["--layers", "0,1", "--factor", "2"], "factor and layers each give the depth"),
    (["--operator", "solar"], "cannot make 8: choose an even number from 3 to 4"),
    (["--operator", "partial"], "block (two numbers, first and last layer) is for the operator partial"),
    (["--operator", "partial", "--block", "0,4"], "block 0,4 is not a block"),
    (["--operator", "double"], "unknown operator 'double', expected one of stack, interleave, middle, partial, solar"),
    (["--layers", "1,0"], "layers has 2 entries, expected more than the 2 layers of the base"),
    (["--seed", "7"], "seed would change nothing without noise: give it as well"),
    (["--layers", "1,0", "--zero_init"], "zero_init preserves the function only if"),
    (["--layers", "1,0", "--operator", "solar"], "layers and operator solar both say which layers to repeat"),
    (["--noise", "-1"], "noise is -1.0, expected a number from 0 to 100"),
    (["--noise", "1e308"], "noise is 1e+308, expected a number from 0 to 100"),
    (["--factor", "1e308"], "factor is 1e+308, expected a number from 2 to 10000"),
    (["--factor", "9999"], "2 layers would grow to 19,998, more than 10,000: choose fewer"),
    (["--target_layers", str(10 ** 13)], "target_layers is 10000000000000, expected a number at most 10000"),
])
def test_bad_input(checkpoint, tmp_path, refusal, flags, said):
    assert said in refusal(COMMANDS, "grow", "--init", checkpoint, "--out", tmp_path / "grown", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_grown(checkpoint, tmp_path, refusal, value):
    base, name = shutil.copytree(checkpoint, tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    state = load_file(base / "model.safetensors")
    state[name][3, 5] = value
    save_file(state, base / "model.safetensors")
    said = refusal(COMMANDS, "grow", "--init", base, "--out", tmp_path / "grown")
    assert said == f"error: {base}: {name} holds values that are not finite (NaN or infinity)"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_noise_that_overflows_is_not_written(checkpoint, tmp_path, refusal):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"].mul_(1e38)
    save_file(state, base / "model.safetensors")
    said = refusal(COMMANDS, "grow", "--init", base, "--out", tmp_path / "grown", "--noise", "100")
    assert said == "error: model.layers.2.mlp.up_proj.weight holds values that are not finite (NaN or infinity)"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_every_tensor_keeps_its_dtype(checkpoint, tmp_path, capsys):
    base, out = shutil.copytree(checkpoint, tmp_path / "base"), tmp_path / "grown"
    state = {name: tensor.bfloat16() if tensor.ndim == 2 else tensor
             for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors")
    grow(GrowConfig(init=str(base), out=str(out), factor=2.0, noise=0.1))
    grown = load_file(out / "model.safetensors")
    assert len(grown) == 4 * 9 + 3
    for name, tensor in grown.items():
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 2 else torch.float32), name
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert "2 layers grown to 4" in capsys.readouterr().out


def test_a_damaged_lineage_is_found_before_growing(checkpoint, tmp_path, refusal, monkeypatch):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "growth.json").write_text("[1]")
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda reader, name: pytest.fail("a weight was read"))
    assert refusal(COMMANDS, "grow", "--init", base, "--out", tmp_path / "grown") == \
        f"error: {base}/growth.json: expected an object, found a list"


def test_an_existing_directory_is_not_touched(checkpoint, tmp_path, refusal):
    assert "exists already" in refusal(COMMANDS, "grow", "--init", checkpoint, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut short", "no weights", "a tensor less"])
def test_an_incomplete_base(checkpoint, tmp_path, refusal, damage):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    said = {"cut short": "truncated or damaged", "no weights": "holds no weights",
            "a tensor less": "model.layers.2.input_layernorm.weight is missing"}[damage]
    if damage == "cut short":
        os.truncate(base / "model.safetensors", 5000)
    elif damage == "no weights":
        (base / "model.safetensors").unlink()
    else:
        config = (base / "config.json").read_text()
        (base / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert said in refusal(COMMANDS, "grow", "--init", base, "--out", tmp_path / "grown")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk(checkpoint, tmp_path):
    """With a real limit on the size of a file, below that of the grown weights."""
    code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
            "sys.argv = sys.argv[1:]; runpy.run_path('stack.py', run_name='__main__')")
    result = run_script("-c", code, "stack.py", "grow", "--init", checkpoint, "--out", tmp_path / "grown", check=False)
    assert f"cannot write {tmp_path}/grown" in error_line(result)
    assert not list(tmp_path.iterdir())


def test_the_growth_plan_equals_the_published_table():
    """Du et al., arXiv 2405.15319: d in billions of tokens, as printed."""
    for params, tokens, published in ((8e9, 15e12, "6.58"), (7e9, 2e12, "11.11"), (13e9, 2e12, "15.84"),
                                      (70e9, 2e12, "42.48")):
        assert f"{growth_timing(params, tokens) / 1e9:.2f}" == published
    lines = run_script("stack.py", "plan").stdout.splitlines()[-4:]
    assert [re.findall(r"([\d.]+)B", line)[-2:] for line in lines] == [
        ["6.58", "6.58"], ["11.11", "11.11"], ["15.84", "15.84"], ["42.48", "42.48"]]


def test_a_plan_by_hand():
    text = run_script("stack.py", "plan", "--params", "7e9", "--tokens", "300e9").stdout
    # 6·7e9·300e9 = 1.26e22; base of 7e9/4: 6·1.75e9·20.48e9 = 2.15e20; 300e9 - 20.48e9/4 = 294.9e9; 1.26e22/1.546
    for said in ("log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74", "7e+09 parameters, 32 layers", "g    4",
                 "1.75e+09 parameters, 8 layers", "2.048e+10 tokens", "1.26e+22 FLOPs: 3e+11 tokens",
                 "2.15e+20 for the base (1.71%), then 2.949e+11 tokens", "8.15e+21 FLOPs", "4.45e+21 FLOPs, 35.3%"):
        assert said in text, said
    text = run_script("stack.py", "plan", "--size", "7b", "--tokens", "300e9", "--factor", "2").stdout
    # 5,933,109,248 - 16 × 177,217,536 in a layer (2·4096·(4096 + 1024) + 3·4096·11008 + 2·4096)
    assert "base               3.098e+09 parameters, 16 layers" in text
    text = run_script("stack.py", "plan", "--size", "small", "--tokens", "1e6").stdout
    assert "so that growing saves nothing" in text
    assert "same loss" not in text


@pytest.mark.parametrize(("flags", "said"), [
    (["--params", "7e9"], "a plan needs the size of the model (--params or --size) and --tokens"),
    (["--factor", "2", "--num_hidden_layers", "8"],
     "num_hidden_layers and factor would change nothing without --tokens"),
    (["--tokens", "7e9"], "a plan needs the size of the model (--params or --size) and --tokens"),
    (["--params", "-1", "--tokens", "1e9"], "params is -1.0, expected a number from 1 to 1e+18"),
    (["--params", "7e9", "--tokens", "1e9", "--factor", "1"], "factor is 1, expected at least 2"),
    (["--params", "7e9", "--tokens", "1e9", "--factor", "5", "--num_hidden_layers", "32"],
     "not a multiple of the factor"),
    (["--size", "410m", "--tokens", "1e9"], "410m.toml gives no model shape")])
def test_invalid_plans(refusal, flags, said):
    assert said in refusal(COMMANDS, "plan", *flags)


def test_moments_of_more_than_ten_layers(tmp_path):
    """Layer 1 is new and 11 is not, although its name begins alike."""
    base = ModelConfig(**SHAPE | {"num_hidden_layers": 11})
    for name in ("base", "grown"):
        (tmp_path / name).mkdir()
    name, values = parameter_file_name(MOMENTS, 0, 1), {kind: lambda part: torch.ones(part.count)
                                                        for kind in SIDE_FILES[MOMENTS]}
    parts = [WholeParameter(key, math.prod(shape)) for key, shape in parameter_shapes(base).items()]
    write_parameter_file(tmp_path / "base" / name, parts, values)
    write_moments(tmp_path / "grown", open_moments(tmp_path / "base", base), base, [0, 0, *range(1, 11)], zero=True)
    found = load_file(tmp_path / "grown" / name)
    assert {int(key.split("layers.")[1].split(".")[0]) for key, tensor in found.items()
            if "layers." in key and not tensor.any()} == {1}
