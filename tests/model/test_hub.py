"""Models from the Hub, through the real client library and a stand-in of the server."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save

from common.settings import load
from model.hub import HubConfig, load_model, main
from tests.conftest import error_line, run_script
from tests.hub import HubStandIn, published_files

ID = "llm-stacking/StackLLM_410M_750BToken"
IDS = torch.arange(3, 120)[None]


@pytest.fixture
def hub(checkpoint, tmp_path):
    (tmp_path / "published").mkdir()
    with HubStandIn() as hub:
        hub.add("models", ID, published_files(checkpoint, tmp_path / "published"))
        yield hub


def fetch(hub, tmp_path, source=ID, *flags, **options):
    return run_script("-m", "model.hub", "--source", source, "--out", tmp_path / "out", *flags, **options,
                      **hub.environment(tmp_path / "cache"))


def test_a_published_model_is_downloaded_once(hub, checkpoint, tmp_path, capsys, refusal):
    """Without weights in a layout of the publisher's own."""
    hub.add("models", ID, dict(hub.repos["models", ID]["main"]) | {"consolidated.safetensors": b"weights"})
    result = fetch(hub, tmp_path, ID, "--dtype", "fp32")
    cache = tmp_path / "cache/hub/models--llm-stacking--StackLLM_410M_750BToken"
    assert not any("consolidated" in path for method, path in hub.requests if method == "GET")
    assert result.stdout.splitlines() == [f"{tmp_path}/out: 48,288 parameters",
                                          f"the download is not needed any more: {cache} (0.0 GB)"]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(IDS), load_model(checkpoint)(IDS))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "source.json", "tokenizer.json", "tokenizer_config.json"]
    assert not list(cache.rglob("*.safetensors"))
    names = [path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert names.count("pytorch_model.bin") == 1
    assert "README.md" not in names
    shutil.rmtree(cache)
    capsys.readouterr()
    main(HubConfig(ID, str(tmp_path / "out")))
    assert capsys.readouterr().out == f"{tmp_path}/out is there already\n"
    main(HubConfig(f"{checkpoint}", str(tmp_path / "copy")))
    main(HubConfig(f"{checkpoint}/", str(tmp_path / "copy")))  # the same directory in other words
    line = refusal((HubConfig, main), "--source", checkpoint, "--out", tmp_path / "out")
    assert f"out is there already and was made from {ID}, not from {checkpoint}: remove it, or choose another" in line
    (tmp_path / "out/source.json").write_text("{}")
    line = refusal((HubConfig, main), "--source", checkpoint, "--out", tmp_path / "out")
    assert "was made from None, not from" in line


def test_safetensors_are_preferred(hub, checkpoint, tmp_path):
    weights = {"model.safetensors": (checkpoint / "model.safetensors").read_bytes()}
    hub.add("models", ID, dict(hub.repos["models", ID]["main"]) | weights)
    fetch(hub, tmp_path)
    assert not any("pytorch_model.bin" in path for _, path in hub.requests if "/resolve/" in path)


def test_only_the_weights_of_the_model_are_downloaded(hub, checkpoint, tmp_path):
    """Not adapters, other data types and checkpoints of the training, which do not replace .bin files."""
    weights = (checkpoint / "model.safetensors").read_bytes()
    others = "adapter_model.safetensors", "model.fp16.safetensors", "checkpoint-9/model.safetensors"
    hub.add("models", ID, dict(hub.repos["models", ID]["main"]) | dict.fromkeys(others, weights))
    fetch(hub, tmp_path)
    got = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert "pytorch_model.bin" in got
    assert not got & {*others}


def test_shards_may_have_any_names(hub, checkpoint, tmp_path):
    weights, names = load_file(checkpoint / "model.safetensors"), ("part_1.safetensors", "part_2.safetensors")
    halves = dict(zip(names, (dict(list(weights.items())[::2]), dict(list(weights.items())[1::2]))))
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    files = dict(hub.repos["models", ID]["main"]) | {file: save(half) for file, half in halves.items()}
    hub.add("models", ID, files | {"model.safetensors.index.json": json.dumps(index).encode()})
    fetch(hub, tmp_path, ID, "--dtype", "fp32")
    assert not any("pytorch_model.bin" in path for _, path in hub.requests if "/resolve/" in path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(IDS), load_model(checkpoint)(IDS))


def test_a_revision(hub, checkpoint, tmp_path):
    other = dict(hub.repos["models", ID]["main"])
    config = json.loads(other["config.json"]) | {"rope_theta": 77.0}
    hub.add("models", ID, other | {"config.json": json.dumps(config).encode()}, branch="v2")
    fetch(hub, tmp_path, f"{ID}@v2")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 77.0
    record, snapshots = json.loads((tmp_path / "out/source.json").read_text()), tmp_path / "cache/hub"
    assert record["source"] == f"{ID}@v2"
    assert [path.name for path in snapshots.glob("*/snapshots/*")] == [record["commit"]]
    line = error_line(fetch(hub, tmp_path, check=False))
    assert f"was made from {ID}@v2, not from {ID}" in line


def test_a_cache_without_weights(hub, tmp_path):
    """As what has read the configuration alone leaves it to a machine without a network."""
    plan = ["-m", "pipeline.plan", "--init", ID]
    assert "parameters" in run_script(*plan, **hub.environment(tmp_path / "cache")).stdout
    assert not any(path.endswith((".bin", ".safetensors")) for _, path in hub.requests)
    hub.server.shutdown()
    hub.server.server_close()
    line = error_line(fetch(hub, tmp_path, check=False))
    assert f"no weights of {ID} are in " in line
    assert "either it has none, or the Hub, whose cache this is, cannot be reached" in line


def test_weights_in_bf16(checkpoint, tmp_path):
    main(HubConfig(str(checkpoint), str(tmp_path / "out"), "bf16"))
    written, source = load_file(tmp_path / "out/model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, source[name].bfloat16()) for name, tensor in written.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("record", ["run.json", "growth.json"])
def test_a_model_that_was_trained_or_grown_is_not_taken_for_a_published_one(checkpoint, tmp_path, refusal, record):
    shutil.copytree(checkpoint, tmp_path / "m0")
    (tmp_path / "m0" / record).write_text("{}")
    line = refusal((HubConfig, main), "--source", ID, "--out", tmp_path / "m0")
    assert f"m0 is there already and was trained or grown ({record}), not made from {ID}: remove it, or choose" in line


def test_a_copy_of_another_dtype_is_not_taken_for_the_one_asked_for(checkpoint, tmp_path, refusal):
    given = ["--source", checkpoint, "--out", tmp_path / "out", "--dtype"]
    main(load(HubConfig, map(str, [*given, "fp32"])))
    assert "is there already, with weights of another dtype than bf16" in refusal((HubConfig, main), *given, "bf16")
    main(load(HubConfig, map(str, [*given, "fp32"])))


def test_a_cut_connection(hub, checkpoint, tmp_path):
    """The client library itself goes on with the missing part."""
    hub.cut["pytorch_model.bin"] = 100_000
    fetch(hub, tmp_path, ID, "--dtype", "fp32")
    assert not hub.cut
    assert sum(path.endswith("pytorch_model.bin") for method, path in hub.requests if method == "GET") == 2
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(IDS), load_model(checkpoint)(IDS))


def test_repositories_that_cannot_be_read(hub, tmp_path):
    line = error_line(fetch(hub, tmp_path, "owner/other", check=False))
    assert "owner/other is neither a directory here nor a repository on the Hub that this account may read" in line
    assert "llm-stacking/LLM_3B_300BToken" in line
    hub.gated.add(ID)
    assert f"{ID} is gated: accept its terms on its page of the Hub" in error_line(fetch(hub, tmp_path, check=False))
    hub.server.shutdown()
    hub.server.server_close()
    assert "cannot be downloaded from the Hub" in error_line(fetch(hub, tmp_path, check=False))
    assert not (tmp_path / "out").exists()
