"""The 22 benchmarks of the suite `paper`: lm-eval's own prompts and metrics, on stand-ins of their datasets."""
import json
import os
import sys

import pytest

from common.configs import read_config
from evaluation.result_files import results_files
from tests.conftest import run_script
from tests.hub import HubStandIn
from tests.hub_datasets import add_benchmarks

ORACLE = """
import json, sys, lm_eval
from pathlib import Path
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model = HFLM(pretrained=sys.argv[1], dtype="float32", device="cpu", batch_size=8)
folders = [Path(lm_eval.__file__).parent / "tasks" / name for name in (
    "crows_pairs", "hellaswag", "mathqa", "mmlu/default", "piqa", "race", "super_glue", "winogrande")]
found, index = {}, TaskManager(include_defaults=False, include_path=folders)  # an index of all tasks takes seconds
for shots, names in json.loads(sys.argv[2]):
    found |= lm_eval.simple_evaluate(model, tasks=names, num_fewshot=shots, bootstrap_iters=0,
                                     task_manager=index)["results"]
print(json.dumps(found, default=str))
"""


@pytest.fixture(scope="module")
def paper(checkpoint, tmp_path_factory):
    """The folder of a run of the suite, with the cache of its datasets, and what it printed."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "dev").mkdir()
    for number in range(8):
        (folder / f"dev/dev_{number}.txt").write_text(json.dumps({
            "id": f"dev_{number}", "answers": "ABCD"[number % 4], "article": "f : do you like rain ? m : i do n't .",
            "options": [f"f : then take {word} ." for word in ("a coat", "the bus", "my car", "it easy")]}))
    files = folder / "files"
    run_script("data_prep.py", "mutual", "--folder_path", folder / "dev", "--output_path", files / "mutual.jsonl")
    with HubStandIn() as hub:
        add_benchmarks(hub)
        result = run_script("evaluate.py", "--checkpoint", checkpoint, "--out", folder / "eval", "--suite", "paper",
                            "--suite_files", files, "--dtype", "fp32", **hub.environment(folder / "cache"))
    return folder, result.stdout


def test_all_benchmarks_run(paper):
    folder, printed = paper
    suite = read_config("eval", "paper")["benchmark"]
    assert len(suite) == 22
    results = json.loads(results_files(folder / "eval")[0].read_text())["results"]
    assert not {entry["name"] for entry in suite} - results.keys()
    assert not (folder / "eval/missing.json").exists()
    chances = {"mmlu": 25.0, "piqa": 50.0, "boolq": 50.0, "winogrande": 50.0, "hellaswag": 25.0, "mathqa": 20.0,
               "mutual": 25.0, "race": 25.0, "crows": 50.0}
    for entry in suite:
        expected = next(value for name, value in chances.items() if entry["name"].startswith(name))
        assert 100 * results[entry["name"]]["chance,none"] == pytest.approx(expected)
    assert "race: version 3 of lm-eval's task, the published figures are of version 2\n" in printed


def test_values_equal_lm_evals_backend(paper, checkpoint):
    """Reads the datasets from the cache, without a network. One of the four groups of MMLU is compared."""
    folder, _ = paper
    results = json.loads(results_files(folder / "eval")[0].read_text())["results"]
    names = [[5, ["mmlu_social_sciences"]], [0, [entry["name"] for entry in read_config("eval", "paper")["benchmark"]
                                                 if not entry["name"].startswith(("mmlu", "mutual"))]]]
    result = run_script("-c", ORACLE, checkpoint, json.dumps(names), launcher=[sys.executable],
                        HF_HOME=str(folder / "cache"), PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    expected = json.loads(result.stdout.splitlines()[-1])
    assert len(expected) == 12 + 1 + 17
    for name, values in expected.items():
        metrics = values.keys() & {"acc,none", "acc_norm,none", "pct_stereotype,none"}
        assert metrics
        for metric in metrics:
            assert results[name][metric] == pytest.approx(values[metric], abs=1e-12), name
