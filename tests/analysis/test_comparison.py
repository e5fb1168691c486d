"""Like is compared with like: the same stages, results, conditions and seeds on both sides."""
import json
import shutil

import pytest

from analysis.comparison import CommonPart
from analysis.estimates import Estimate, estimate_of_items
from analysis.method_tables import compare_methods
from analysis.record import Record, records_by_method
from analysis.results import read_results, read_runs
from analysis.stages import Stage
from analysis.tables import result_tables
from common.files import read_json
from tests.analysis.conftest import TASKS, VALUES, write_stage

PAIR = ("stack", "llm")
RATES = {"finetune": "", "ewc": ""}


def change_json(path, **entries):
    """Changes entries of a JSON file."""
    path.write_text(json.dumps(read_json(path) | entries))


def record_of(runs):
    return Record(read_runs(runs), compared=PAIR)


def report_of(record):
    """(sentences, {title: text of the section}) of a record."""
    sentences, sections = result_tables(record)
    return sentences, dict(sections)


def row(table, title):
    """The cells of the row of a table that begins with a title."""
    line, = (line for line in table.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def longer_runs(runs):
    """The runs with a third task. simp falls to 20 points; llm's last stage lacks its test set."""
    for model in PAIR:
        stage = runs / model / "m3-inqqg"
        shutil.copytree(runs / model / "m2-empd", stage)
        change_json(stage / "run.json", settings={"task": "inqqg", "seed": 42})
        change_json(stage / "eval/metrics-simp.json", metrics={"sari": {"mean": 20, "low": 19.9, "high": 20.1}})
    (runs / "llm/m3-inqqg/eval/metrics-simp.json").unlink()
    return runs


def test_pairs_behind_are_left_out_of_a_comparison():
    """A pair of which one group lacks the last stage does not take this stage from the other pairs."""
    def group(value, without=None):
        return {(pair, 42): {number: Stage("llm", 42, number, f"m{number}", benchmarks={"terms": Estimate(value, 0.1)})
                             for number in range(3) if (pair, number) != without} for pair in (1, 2, 3)}

    common = CommonPart(group(0.4, without=(3, 2)), group(0.5), ("ewc", "finetune"))
    assert common.left_out == ["ewc and finetune are compared without the pair 3, seed 42, which lacks results of a "
                               "later stage"]
    assert [list(chain) for chain in common.one.values()] == [list(chain) for chain in common.two.values()] \
        == [[0, 1, 2], [0, 1, 2]]
    assert all(chain[2].benchmarks for groups in (common.one, common.two) for chain in groups.values())


def test_differences_are_those_within_each_seed():
    """Two seeds differ much, but both sides have the same values: the difference is 0, and this is certain."""
    def group():
        of_seeds = {42: [0, 1, 1, 1], 43: [0, 0, 0, 1]}
        return {(0, seed): {1: Stage("llm", seed, 1, "m1", benchmarks={"terms": estimate_of_items(items, "terms")})}
                for seed, items in of_seeds.items()}

    one, two, difference = CommonPart(group(), group(), ("one", "two")).compare(
        lambda chains: [chain[1].benchmarks["terms"] for chain in chains])
    assert (one.value, two.value, one.error > 1) == (0.5, 0.5, True)
    assert (difference.value, difference.error) == (0, 0)


def test_only_test_sets_that_both_have_are_compared(longer_runs):
    record = record_of(longer_runs)
    sentences, sections = report_of(record)
    assert sentences[-1].startswith("Backward transfer: stack and llm cannot be told apart from noise (+0.0 points")
    assert sentences[-1].endswith("of what both have, see What is missing).")
    name, llm, stack, gap = row(sections["Over the tasks"], "backward transfer")
    assert (llm.split()[0], stack.split()[0], gap.split()[0]) == ("0.00", "0.00", "0.00")
    assert gap.endswith("] (part)")
    assert "only one of the two models has" in sections["Over the tasks"]
    assert "llm: m3-inqqg lacks the test sets simp" in record.missing


def test_a_missing_benchmark_is_left_out_on_both_sides(runs):
    path = runs / "stack/m2-empd/eval/results_1.json"
    results = read_json(path)["results"]
    del results["passages"]
    change_json(path, results=results)
    record = record_of(runs)
    _, sections = report_of(record)
    table = sections["Forgetting by category"]
    # passages after m1 only: 0 of llm and 20 of stack; continuation: 37.5 and 0
    assert [cell.split()[0] for cell in row(table, "Rs")[1:]] == ["18.8", "10.0", "-8.8"]
    assert row(table, "Rs")[-1].endswith("(part)")
    assert not row(table, "DK")[-1].endswith("(part)")
    assert record.category_fg("stack", "Rs").value == pytest.approx(10)  # the figure shows the same values


def test_what_only_one_model_has_is_not_compared(runs):
    for number in ("m1-simp", "m2-empd"):
        shutil.rmtree(runs / "stack" / number)
    sentences, sections = report_of(record_of(runs))
    assert all("not compared, stack and llm have no results in common that count; the end of this report "
               "says what is missing or noise." in one
               for one in sentences)
    for title in ("DK", "Rs", "Bias"):
        assert row(sections["Forgetting by category"], title)[2:] == ["–", "–"]
    assert row(sections["Forgetting by category"], "DK")[1].startswith("30.0 [")  # all that llm has


# How a results file tells a condition, what it is at the start, what it is after m1, and how that is described.
CONDITIONS = {
    "items": (lambda value: {"n-samples": {"terms": {"original": 500, "effective": value}}}, 10, 500,
              "items 500 (m0: 10)"),
    "limit": (lambda value: {"config": {"limit": value}}, 10, None, "limit none (m0: 10)"),
    "shots": (lambda value: {"n-shot": {"terms": value}}, 0, 5, "shots 5 (m0: 0)"),
    "shots of a suite": (lambda value: {"run": {"suite": [
        {"name": "terms", "category": "DK", "num_fewshot": value}]}}, 0, 5, "shots 5 (m0: 0)"),
    "file": (lambda value: {"run": {"suite": [{"name": "terms", "category": "DK", "file": value}]}}, "a1", "b2",
             "file b2 (m0: a1)"),
    "metric": (lambda value: {"run": {"suite": [{"name": "terms", "category": "DK", "metric": value}]}}, "acc",
               "acc_norm", "metric acc_norm (m0: acc)"),
    "version": (lambda value: {"versions": {"terms": value}}, 2, 3, "version 3 (m0: 2)"),
    "prompts": (lambda value: {"task_hashes": {"terms": value}}, "x", "y", "items and prompts "),
    "chat template": (lambda value: {"chat_template_sha": value}, None, "c0", "chat_template_sha c0 (m0: none)"),
    "dtype": (lambda value: {"config": {"model_dtype": value}}, "torch.float32", "torch.bfloat16",
              "dtype bf16 (m0: fp32)"),
    "dtype of evaluate.py": (lambda value: {"run": {"dtype": value}}, "fp32", "bf16", "dtype bf16 (m0: fp32)"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_unlike_results_are_listed_and_not_used(name, tmp_path):
    told, start, other, described = CONDITIONS[name]
    for number, (value, condition) in enumerate(((0.5, start), (0.4, other), (0.3, start))):
        path = tmp_path / f"llm/m{number}/results_1.json"
        path.parent.mkdir(parents=True)
        entry = {"acc,none": value, "acc_norm,none": value, "acc_stderr,none": 0.01, "acc_norm_stderr,none": 0.01}
        path.write_text(json.dumps({"results": {"terms": entry}} | told(condition)))
    record = Record(read_results(tmp_path))
    category = record.categories[0]
    line, = (line for line in record.missing if "not used" in line)
    assert line.startswith("llm: m1: terms under other conditions, not used: ")
    assert described in line
    assert record.category_fg("llm", category).value == pytest.approx(40)  # of m2 alone
    assert record.benchmark_value("llm", 1, "terms") is None


def test_conditions_that_a_file_does_not_tell_match(tmp_path):
    """As in results of lm-eval before 0.4, which do not tell the number of items or the dtype."""
    contents = ({"config": {"limit": None, "num_fewshot": 5}}, {"n-shot": {"terms": 5}, "n-samples": {}},
                {"n-samples": {"terms": {"effective": 9}}, "config": {"limit": 100, "model_dtype": "torch.float32"}},
                {"n-samples": {"terms": {"effective": 9}}, "config": {"limit": None}})
    for number, content in enumerate(contents):
        (tmp_path / f"llm/m{number}").mkdir(parents=True)
        (tmp_path / f"llm/m{number}/results_1.json").write_text(json.dumps(
            {"results": {"terms": {"acc": 0.5 - number / 10, "acc_stderr": 0.1}}} | content))
    record = Record(read_results(tmp_path))
    assert record.missing == ["llm: m2: terms under other conditions, not used: limit 100 (m0: none)"]
    assert record.category_fg("llm", "other").value == pytest.approx((20 + 60) / 2)


def test_unlike_test_sets_are_listed_and_not_used(runs):
    """The decoding, the data and the other settings of a task's evaluation."""
    run = {"dtype": "bf16", "limit": None, "data_digest": "d1", "decoding": {"num_beams": 4, "seed": 42}}
    for stage in runs.glob("*/m*"):
        change_json(stage / "eval/metrics-simp.json", run=run, samples=20, prompts={"a": 20})
    change_json(runs / "llm/m2-empd/eval/metrics-simp.json", samples=10, prompts={"b": 10}, run=run | {
        "limit": 10, "data_digest": "d2", "decoding": {"num_beams": 1, "seed": 42}})
    record = record_of(runs)
    assert record.missing == ["llm: m2-empd: simp under other conditions, not used: data_digest d2 (m0: d1), decoding "
                              "num_beams 1 (m0: 4), items 10 (m0: 20), prompts {'b': 10} (m0: {'a': 20})"]
    sentences, _ = report_of(record)
    assert sentences[-1].startswith("Backward transfer: not compared")
    assert record.task_value("llm", 2, "simp") is None


def test_models_under_different_conditions_are_not_compared(runs):
    for stage in runs.glob("*/m*"):
        shots = 5 if stage.parent.name == "llm" else 0
        change_json(stage / "eval/results_1.json", **{"n-shot": {"terms": shots, "pairs": 0}})
    record = record_of(runs)
    sentences, sections = report_of(record)
    assert record.missing == ["stack and llm are compared without terms: shots 0 and 5"]
    assert sentences[0].startswith("FG, DK: not compared")
    assert [cell.split()[0] for cell in row(sections["Forgetting by category"], "DK")[1:]] == ["30.0", "0.0", "–"]
    assert row(sections["Forgetting by category"], "Bias")[-1].startswith("-5.0 [")
    assert record.category_fg("llm", "DK") is None  # no bars side by side


def test_seeds_are_averaged_over_what_all_have(seed_runs):
    path = seed_runs / "llm/seed-43/m2-empd/eval/results_1.json"
    results = read_json(path)["results"]
    del results["terms"]
    change_json(path, results=results)
    record = Record(read_runs(seed_runs))
    assert record.category_fg("llm", "DK").value == pytest.approx((20 + 0) / 2)  # after m1, of both seeds
    assert record.benchmark_value("llm", 2, "terms") is None
    assert "llm, seed 43: m2-empd lacks the benchmarks terms" in record.missing


def test_only_common_seeds_are_compared(seed_runs):
    record = record_of(seed_runs)
    comparison = record.compare(record.category_measure("DK"))
    assert comparison.values["llm"].value == pytest.approx(30)  # seed 42 alone, as stack has it
    assert comparison.is_part
    assert record.own_value("llm", record.category_measure("DK")).value == pytest.approx(15)
    assert record.missing == ["stack and llm are compared without the seed 43, which only one of them has"]


def test_a_benchmark_that_starts_at_zero_for_one_model_is_left_out_of_both(runs):
    path = runs / "stack/m0/eval/results_1.json"
    results = read_json(path)["results"]
    results["continuation"]["acc,none"] = 0.0
    change_json(path, results=results)
    record = record_of(runs)
    comparison = record.compare(record.category_measure("Rs"))
    assert comparison.values["llm"].value == pytest.approx(25)  # passages alone
    assert comparison.values["stack"].value == pytest.approx(30)
    assert "stack: no FG, since the value at the start is 0: continuation" in record.missing


def test_methods_with_other_tasks_are_compared_until_they_differ(method_runs):
    stage = method_runs / "llm/ewc/m2-empd"
    stage.rename(stage.with_name("m2-inqqg"))
    records = records_by_method(read_runs(method_runs), (), "finetune")
    sentences, sections, left_out = compare_methods(records, "finetune", RATES, ())
    assert sentences[1].startswith("llm, ewc compared with finetune in one run of each: better by FG DK (-20.00 [")
    assert left_out == ["llm, ewc and llm, finetune are compared up to stage 1: the next one is m2-inqqg and m2-empd"]


def test_an_unfinished_method_has_no_measures_after_the_last_stage(method_runs):
    shutil.rmtree(method_runs / "llm/ewc/m2-empd")
    records = records_by_method(read_runs(method_runs), (), "finetune")
    record = records["ewc"]
    assert record.own_value("llm", record.task_measure("average performance")) is None
    assert "llm, ewc: the stage m2 is missing" in record.missing
    _, sections, _ = compare_methods(records, "finetune", RATES, ())
    ewc = row(dict(sections)["Methods: llm"], "ewc")
    assert ewc[1].endswith("(part)")
    assert ewc[-1] == "–"  # minutes of training


def test_calibration_is_averaged_over_benchmarks_that_all_methods_have(method_runs):
    for method, ece in (("ewc", 0.9), ("finetune", 0.6)):
        path = method_runs / f"llm/{method}/m2-empd/eval/results_1.json"
        results = read_json(path)["results"]
        results["terms"]["ece,none"] = ece
        if method == "ewc":
            del results["continuation"]["ece,none"], results["passages"]["ece,none"]
        change_json(path, results=results)
    _, sections, _ = compare_methods(records_by_method(read_runs(method_runs), (), "finetune"), "finetune", RATES, ())
    table = dict(sections)["Methods: llm"]
    assert row(table, "ewc")[-3] == "0.900"
    assert row(table, "finetune")[-3] == "0.600"


def test_of_several_results_of_a_benchmark_the_most_complete_is_used(runs):
    """evaluate.py keeps earlier results of which it has replaced a part."""
    folder = runs / "llm/m1-simp/eval"
    suite = read_json(folder / "results_1.json")["run"]["suite"]
    for name, value, items in (("results_2", 0.45, 90), ("results_3", 0.2, 7), ("results_4", 0.35, 90)):
        (folder / f"{name}.json").write_text(json.dumps({
            "results": {"terms": {"acc,none": value}}, "n-samples": {"terms": {"effective": items}},
            "run": {"suite": suite[:1]}}))
    stage, = (stage for stage in read_runs(runs) if (stage.model, stage.number) == ("llm", 1))
    assert stage.benchmarks["terms"].value == 0.35
    assert stage.benchmarks["continuation"].value == 0.3
    assert stage.unused == ["terms in results_1.json (results_2.json is newer)",
                            "terms in results_3.json (results_2.json has more items)",
                            "terms in results_2.json (results_4.json is newer)"]


def test_the_models_have_no_seed_in_common(tmp_path):
    for model, seed in (("llm", 1), ("stack", 2)):
        for number in range(3):
            write_stage(tmp_path / model, number, VALUES[model][number], TASKS[model][number], seed=seed)
    record = record_of(tmp_path)
    sentences, _ = report_of(record)
    assert all("not compared" in sentence for sentence in sentences)
    assert record.missing[0] == "stack and llm are compared without the seed 1, which only one of them has"
