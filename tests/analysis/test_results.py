"""Reading results of this program and of lm-eval's own command line."""
import json
import math

import numpy as np
import pytest

from analysis.benchmark_catalog import shipped_benchmarks
from analysis.record import Record
from analysis.results import read_results, read_runs
from common.files import UserError, read_json
from evaluation.result_files import write_task_results
from tests.conftest import run_script


def test_of_a_group_and_its_parts_those_in_a_suite_count(tmp_path):
    value = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    for number, factor in enumerate((1.0, 0.8)):
        results = {name: value | {"acc,none": 0.5 * factor} for name in
                   ("mmlu", "mmlu_stem", "mmlu_astronomy", "mmlu_other", "boolq", "mine", "mine_a")}
        results["sums"] = {"exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}
        results["filtered"] = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
                               "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": 0.1}
        folder = tmp_path / f"stack/m{number}"
        folder.mkdir(parents=True)
        (folder / "results_1.json").write_text(json.dumps({"results": results | {"odd": {"f1,none": 1.0}},
            "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["mmlu_astronomy"],
                               "mine": ["mine_a"], "boolq": []}}))
    record = Record(read_results(tmp_path))
    assert [(b.name, b.category) for b in record.benchmarks] == [
        ("mmlu_stem", "DK"), ("mmlu_other", "DK"), ("boolq", "Rs"), ("mine", "other"), ("sums", "other"),
        ("filtered", "other")]
    assert [benchmark.metric for benchmark in record.benchmarks[-2:]] == ["exact_match", "exact_match,strict-match"]
    assert record.benchmark_value("stack", 0, "filtered").value == 0.25
    assert record.category_fg("stack", "DK").value == pytest.approx(20)
    assert record.missing[0] == ("stack: results of m0 that are not used: odd (no acc, r@1, pct_stereotype, "
                                 "exact_match, prompt_level_strict_acc)")
    assert shipped_benchmarks()["boolq"].category == "Rs"


def test_stages_ordered_by_a_list(tmp_path):
    for model, stages in (("llm", ("original", "first", "second")), ("stack", ("original", "second"))):
        for value, stage in enumerate(stages, 4):
            (tmp_path / model / stage).mkdir(parents=True)
            (tmp_path / model / stage / "results_1.json").write_text(json.dumps(
                {"results": {"piqa": {"acc,none": value / 10, "acc_stderr,none": 0.1}}}))
    with pytest.raises(UserError, match="the folder first does not say which stage it is"):
        read_results(tmp_path)
    (tmp_path / "map.toml").write_text("".join(
        f'[[result]]\nmodel = "{model}"\nstage = "{stage}"\nfile = "{model}/{stage}/results_1.json"\n'
        for model in ("llm", "stack") for stage in ("original", "first", "second")
        if (tmp_path / model / stage).exists()))
    record = Record(read_results(tmp_path / "map.toml"))
    assert record.stages == ["original", "first", "second"]
    assert record.missing == ["stack: the stage first is missing"]
    assert record.benchmark_value("stack", 2, "piqa").value == 0.5
    (tmp_path / "map.toml").write_text('[[result]]\nmodel = "llm"\nstage = "m0"\nfile = "[l]*/*nal"\n')
    stage, = read_results(tmp_path / "map.toml")
    assert stage.benchmarks["piqa"].value == 0.4
    brackets = tmp_path / "br[1]"
    brackets.mkdir()
    (tmp_path / "llm").rename(brackets / "llm")
    (tmp_path / "map.toml").rename(brackets / "map.toml")
    stage, = read_results(brackets / "map.toml")  # the folder is no pattern
    assert stage.benchmarks["piqa"].value == 0.4
    (tmp_path / "map.toml").write_text('[[result]]\nmodel = "llm"\nstage = "m0"\nfile = "[l]*/none"\n')
    with pytest.raises(UserError, match=r"\[l\]\*/none"):
        read_results(tmp_path / "map.toml")
    (tmp_path / "map.toml").write_text('[result]\nmodel = "llm"\n')
    with pytest.raises(UserError, match=r"expected a list of \[\[result\]\]"):
        read_results(tmp_path / "map.toml")


def test_results_of_lm_evals_own_command_line(tmp_path):
    (tmp_path / "tasks").mkdir()
    items = [{"text": f"q{n}", "choices": ["a", "b"], "label": n % 2} for n in range(12)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tasks/local.yaml").write_text(json.dumps({
        "task": "local_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}}, "doc_to_text": "text",
        "doc_to_choice": "choices", "doc_to_target": "label", "metric_list": [{"metric": "acc"}]}))
    run_script("-m", "lm_eval", "--model", "dummy", "--tasks", "local_choice", "--include_path", tmp_path / "tasks",
               "--output_path", tmp_path / "results/llm/m0", LM_EVAL_TASKS=str(tmp_path / "tasks"))
    start, = (tmp_path / "results").rglob("results_*.json")
    values = read_json(start)
    values["results"]["local_choice"] |= {"acc,none": 0.5, "acc_stderr,none": 0.1}
    start.write_text(json.dumps(values))
    old = {"results": {"local_choice": {"acc": 0.4, "acc_stderr": 0.1}}}  # the format of lm-eval 0.3
    (tmp_path / "results/llm/m1-any-task/.__my__m0").mkdir(parents=True)
    (tmp_path / "results/llm/m1-any-task/.__my__m0/results_x.json").write_text(json.dumps(old))
    record = Record(read_results(tmp_path / "results"))
    assert record.stages == ["m0", "m1-any-task"]
    assert record.category_fg("llm", "other").value == pytest.approx(20)
    (tmp_path / "map.toml").write_text("".join(
        f'[[result]]\nmodel = "llm"\nstage = "{stage}"\nfile = "{file}"\n' for stage, file in
        (("before", start), ("after", "results/llm/m1-any-task/.__my__m0/results_x.json"))))
    record = Record(read_results(tmp_path / "map.toml"))
    assert [record.benchmark_value("llm", number, "local_choice").value for number in range(2)] == [0.5, 0.4]


def test_a_test_set_of_one_sample_has_an_unknown_error(runs):
    path = runs / "llm/m1-simp/eval/metrics-simp.json"
    found = read_json(path) | {"samples": 1, "metrics": {"sari": {"mean": 40.0, "low": 40.0, "high": 40.0}}}
    path.write_text(json.dumps(found))
    one, two = (next(stage for stage in read_runs(runs) if (stage.model, stage.number) == (model, 1)).tasks["simp"]
                for model in ("llm", "stack"))
    assert one.value == 40
    assert math.isnan(one.error)
    assert not (one - two).excludes_zero


def test_a_stage_without_its_record_is_refused(runs):
    (runs / "llm/m1-simp/run.json").unlink()
    with pytest.raises(UserError, match=r"llm/m1-simp has no run.json, which says how it was trained: restore it, or"):
        read_runs(runs)


def test_stages_without_a_method_or_outside_its_folder(mixed_runs):
    methods = {stage.directory: (stage.model, stage.method) for stage in read_runs(mixed_runs)}
    assert methods[mixed_runs / "llm/m1-simp"] == ("llm", "rehearsal")
    assert methods[mixed_runs / "llm/m2-empd"] == ("llm", None)
    assert methods[mixed_runs / "llm/vcl-tau=0.5/m1-simp"] == ("llm", "vcl-tau=0.5")


def test_methods_are_compared_item_by_item(method_runs):
    """If the items of a test set are known, the values of two methods are compared in pairs."""
    scores = np.random.default_rng(0).normal(30, 10, 50)
    for method, shift in (("finetune", 0.0), ("ewc", 1.0)):
        values = scores + shift + np.arange(50) % 2 / 10
        write_task_results(method_runs / "llm" / method / "m2-empd/eval", "simp",
                           [{"src_info": {}, "scores": {"sari": value}} for value in values],
                           {"sari": {"mean": float(values.mean()), "low": 20.0, "high": 40.0}}, {})
    stages = read_runs(method_runs)
    one, two = (next(stage.tasks["simp"] for stage in stages if (stage.method, stage.number) == (method, 2))
                for method in ("finetune", "ewc"))
    assert (two - one).value == pytest.approx(1.0)
    assert (two - one).error < 1e-6
    assert one.error == pytest.approx((scores + np.arange(50) % 2 / 10).std(ddof=1) / 50 ** 0.5)
