"""Growth from directory to directory."""
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.checkpoint import Weights, load_model
from stack import g_stack
from tests.conftest import error_line, run_script


def test_layer_map_of_g_stack():
    assert g_stack(6, 4) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert g_stack(1, 2) == [0, 0]


def test_grown_checkpoint(checkpoint, tmp_path):
    result = run_script("stack.py", "--init", checkpoint, "--out", tmp_path / "grown", "--factor", 3)
    assert "2 layers grown to 6" in result.stdout
    base, grown = Weights(checkpoint), Weights(tmp_path / "grown")
    assert len(grown.files) == 3 * (len(base.files) - 3) + 3
    for name in grown.files:
        source = re.sub(r"layers\.(\d)", lambda match: f"layers.{int(match[1]) % 2}", name)
        assert torch.equal(grown[name], base[source]), name
    ours = load_model(tmp_path / "grown")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", output_loading_info=True,
                                                        dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("flags", "said"), [
    (["--factor", "1"], "factor is 1"),
    (["--factor", "2", "--init", "nowhere"], "nowhere is neither a checkpoint directory nor a Hub id"),
    (["--size", "huge"], "unknown size 'huge'"),
])
def test_bad_input(checkpoint, tmp_path, flags, said):
    result = run_script("stack.py", "--init", checkpoint, "--out", tmp_path / "grown", *flags, check=False)
    assert said in error_line(result)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_touched(checkpoint, tmp_path):
    result = run_script("stack.py", "--init", checkpoint, "--out", tmp_path, check=False)
    assert "exists already" in error_line(result)
    assert not list(tmp_path.iterdir())
