"""Errors of any process reach rank 0, and no process waits for one that failed."""
import numpy as np
import pytest

from common.files import UserError
from evaluation.parallel import ParallelModel
from model.generation import GenerationConfig
from model.hub import load_model
from model.tokenizer import Tokenizer
from tests.conftest import random_model, run_script

FAILING = """
import os
import evaluate
from common.files import UserError
from evaluation import parallel

def failing(model, *rest, real=parallel.{function}):
    {failure}
    return real(model, *rest)

parallel.{function} = failing
evaluate.scripts.run((evaluate.EvaluateConfig, evaluate.main), "")
"""


@pytest.mark.parametrize(("function", "failure", "reason"), [
    ("sample_losses", "if os.environ['RANK'] == '1': raise UserError('a reason')", "a reason"),
    ("generate", "if os.environ['RANK'] == '1': raise UserError('a reason')", "a reason"),
    ("generate", "if os.environ['RANK'] == '1': raise KeyError('a reason')", "KeyError on rank 1: 'a reason'"),
    ("generate", "model.lm_head.weight.data[9, 0] = float('inf')", "the model's logits are not finite (from ")])
def test_two_processes(function, failure, reason, checkpoint, simp_file, tmp_path):
    """The losses are measured and written before the test set is decoded."""
    result = run_script("-c", FAILING.format(failure=failure, function=function), "--checkpoint", checkpoint,
                        "--tasks", "simp", "--data", simp_file.parent, "--limit", "4", "--out", tmp_path / "out",
                        launcher=2, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {checkpoint}: {reason}")
    assert ("Traceback" in result.stderr) == ("KeyError" in reason)  # of a bug
    assert [path.name for path in tmp_path.rglob("*.json*")] == ["losses-task-simp.json"] * (function == "generate")


def test_an_error_of_this_rank(checkpoint, dist):
    model = ParallelModel(dist, load_model(checkpoint), Tokenizer(checkpoint))
    model.model.lm_head.weight.data[9, 0] = float("nan")
    for request in (lambda: model.log_likelihoods([([5], [6])]), lambda: model.generate([[5]], GenerationConfig(2)),
                    lambda: model.losses([(np.array([5, 6]), 1)])):
        with pytest.raises(UserError, match=f"^{checkpoint}: the model's logits are not finite"):
            request()
    model.model = random_model()
    assert len(model.generate([[5]], GenerationConfig(2))) == 1  # further requests are answered
