"""The benchmarks run, and the models that they compare have the same losses. RESULTS.md has the measured speed."""
import dataclasses
import importlib
import re

import pytest

from bench.run_all import TITLES, RunAllConfig, benchmark_flags, written_by_hand
from bench.workload import random_checkpoint
from common.files import UserError
from common.settings import load
from model.config import size_config
from model.generation import GenerationConfig, generate
from tests.conftest import ROOT, random_model, run_script


@pytest.mark.parametrize("path", sorted(ROOT.glob("bench/*.py")), ids=lambda path: path.stem)
def test_benchmarks_can_be_imported_and_open_with_their_commands(path):
    module = importlib.import_module(f"bench.{path.stem}")
    opens_with_command = re.search(rf"^    \S.* ?bench/{path.name}", module.__doc__, re.MULTILINE)
    assert bool(opens_with_command) == ("__main__" in path.read_text())


def test_transformers_has_the_same_losses():
    """Two steps of the size tiny with both, under one DeepSpeed configuration: equal losses up to rounding."""
    result = run_script("bench/gpu.py", "--size", "tiny", "--offload", "false", "--dtype", "fp32", "--steps", 1,
                        "--seq_length", 32, "--global_batch_size", 4, "--max_tokens_per_microbatch", 64,
                        "--variants", "transformers,ours", PYTHONPATH="")
    difference = dict(re.findall(r"^(transformers|ours) .* (\S+)$", result.stdout, re.MULTILINE))
    assert float(difference["transformers"]) == 0 <= float(difference["ours"]) < 2e-6


def test_steps_from_a_checkpoint(tmp_path):
    """All its parameters are trained, and the losses before and after a step equal transformers'."""
    code = """if True:
        import sys
        import numpy as np
        from bench.workload import make_our_step, make_transformers_step
        from common.distributed import Distributed
        from model.config import ModelConfig
        from training.train_config import TrainConfig
        cfg = TrainConfig(task="simp", init=sys.argv[1], dtype="fp32", zero=0, learning_rate=1e-3)
        samples = [(np.array([1, 5, 9, 7, 300, 2]), 3), (np.array([1, 6, 8, 2]), 2)]
        with Distributed() as dist:
            for make, more in ((make_our_step, ()), (make_transformers_step, (2, False))):
                step = make(cfg, ModelConfig.read(sys.argv[1] + "/config.json"), *more, dist)
                print(step(samples), step(samples))"""
    result = run_script("-c", code, random_checkpoint(tmp_path / "tiny", size_config("tiny")), PYTHONPATH="")
    ours, theirs = ([float(loss) for loss in line.split()] for line in result.stdout.splitlines()[-2:])
    assert ours == pytest.approx(theirs, rel=3e-5)
    assert ours[1] < ours[0] - 0.05


@pytest.mark.parametrize(("beams", "columns"), [(1, (4, 5, 6)), (3, (6, 9, 12))])
def test_the_bounds_of_decoding(beams, columns):
    """Two prompts of 3 tokens, 4 new tokens: three steps after the pass over the prompts, a column for each beam."""
    from bench.decoding import Bounds  # imports transformers
    model = random_model()
    bounds, shape = Bounds(model, read_rate=100.0, matrix_rate=10.0), model.config
    generate(model, [[5, 6, 7], [8, 9, 10]], GenerationConfig(max_new_tokens=4, num_beams=beams))
    weights = shape.num_parameters - shape.vocab_size * shape.hidden_size - shape.hidden_size  # no embedding, last norm
    column = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    assert bounds.memory == pytest.approx(4 * (3 * weights + 2 * column * sum(columns)) / 100)
    assert bounds.both == pytest.approx(3 * 2 * weights * 2 * beams / 10)  # computing takes longer


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    config = size_config("tiny")
    folder = random_checkpoint(tmp_path / "tiny", config)
    assert random_checkpoint(folder, config) == folder
    with pytest.raises(UserError, match="another shape"):
        random_checkpoint(folder, dataclasses.replace(config, num_hidden_layers=3))


def test_what_is_written_by_hand_is_kept():
    text = (ROOT / "bench/RESULTS.md").read_text()
    kept = written_by_hand(text)
    assert kept.startswith("## Compared with an earlier version\n")
    assert re.findall("^## (.*)$", text, re.MULTILINE)[:len(TITLES)] == list(TITLES.values())
    assert text.endswith(kept)
    assert len(re.findall("^## ", text, re.MULTILINE)) == len(TITLES) + len(re.findall("^## ", kept, re.MULTILINE))
    assert written_by_hand("# Results\n\n## Fine-tuning\n") == ""


@pytest.mark.parametrize(("dtype", "expected"), [
    ("bf16", {"finetuning": ["bf16", "fp32"], "decoding": ["float32", "bfloat16"]}),
    ("fp32", {"finetuning": ["fp32"], "decoding": ["float32"]})])
@pytest.mark.parametrize("name", TITLES)
def test_benchmarks_accept_the_flags_of_run_all(name, dtype, expected, checkpoint, monkeypatch):
    """In bf16 as well where the hardware multiplies it."""
    monkeypatch.setattr("bench.run_all.resolve_dtype", lambda _: dtype)
    module = importlib.import_module(f"bench.{name}")
    cls, = (cls for key, cls in vars(module).items() if key.endswith("Config") and cls.__module__ == module.__name__)
    runs = benchmark_flags(RunAllConfig("simp.json", "folder", files="items"), str(checkpoint))[name]
    settings = [load(cls, map(str, flags)) for flags in runs]
    if name in expected:
        assert [one.dtype for one in settings] == expected[name]
    else:
        assert len(settings) == 1
