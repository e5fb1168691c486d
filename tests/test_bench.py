"""The benchmarks still run, and what they compare trains alike. Their speed is looked at in bench/RESULTS.md."""
import dataclasses
import re

import pytest
from conftest import ROOT, run_script

from bench.timing import random_checkpoint
from common.files import UserError
from pipeline.jobs import shape


def test_benchmarks_can_be_imported():
    scripts = sorted(f"bench.{path.stem}" for path in ROOT.glob("bench/*.py"))
    code = "import importlib, sys; print(len([importlib.import_module(name) for name in sys.argv[1:]]))"
    assert run_script("-c", code, *scripts, PYTHONPATH="").stdout.strip() == str(len(scripts)) != "0"


def test_transformers_trains_alike():
    """Two steps of the size tiny in both under one DeepSpeed configuration: the losses are the same to rounding."""
    result = run_script("bench/gpu.py", "--size", "tiny", "--offload", "false", "--dtype", "fp32", "--steps", 1,
                        "--seq_length", 32, "--global_batch_size", 4, "--max_tokens_per_microbatch", 64,
                        "--ways", "transformers,ours", PYTHONPATH="")
    apart = dict(re.findall(r"^(transformers|ours) .* (\S+)$", result.stdout, re.MULTILINE))
    assert float(apart["transformers"]) == 0 <= float(apart["ours"]) < 2e-6


def test_weights_of_another_shape_are_not_measured(tmp_path):
    config = dataclasses.replace(shape("tiny"), bos_token_id=1, eos_token_id=2)
    folder = random_checkpoint(tmp_path / "tiny", config)
    assert random_checkpoint(folder, config) == folder
    with pytest.raises(UserError, match="another shape"):
        random_checkpoint(folder, dataclasses.replace(config, num_hidden_layers=3))
