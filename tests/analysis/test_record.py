"""Records of runs: their stages, what is missing, and FG."""
import json

import pytest

from analysis.flips import constant_benchmarks
from analysis.record import Record, matrix_of
from analysis.results import read_results, read_runs
from analysis.tables import result_tables
from common.files import UserError, read_json


def test_measures_of_a_record(runs):
    record = Record(read_runs(runs))
    assert record.stages == ["m0", "m1-simp", "m2-empd"]
    assert record.categories == ["DK", "Rs", "Bias"]
    assert not record.missing
    # (0.5 - 0.4)/0.5 and (0.5 - 0.3)/0.5: 20 and 40; continuation 25 and 50; passages 0 and 50
    assert record.category_fg("llm", "DK").value == pytest.approx(30)
    assert record.category_fg("llm", "Rs").value == pytest.approx((37.5 + 25) / 2)
    assert record.category_fg("stack", "Rs").value == pytest.approx((0 + 30) / 2)
    assert record.category_fg("llm", "Bias").value == pytest.approx(5)  # parts do not count
    assert record.learned == ["simp", "empd"]
    matrix = matrix_of(record.chains["llm"][0, 42])
    assert matrix[1, "simp"].value == 40
    assert matrix[1, "simp"].error == pytest.approx(1)


def test_constant_benchmarks_do_not_count(runs):
    """As r@1 of MuTual, which lm-eval 0.4.13 computes without the model's answers."""
    for path in runs.rglob("results_1.json"):
        found = read_json(path)
        found["results"]["passages"]["acc,none"] = 200 / 886
        path.write_text(json.dumps(found))
    stages = read_runs(runs)
    assert constant_benchmarks(stages) == {"passages", "pairs_age", "pairs_race"}  # the parts are constant here
    assert Record(stages).category_fg("llm", "Rs").value == pytest.approx((37.5 + 0) / 2)
    counted = Record(stages, uncounted=constant_benchmarks(stages))
    assert counted.category_fg("llm", "Rs").value == pytest.approx(37.5)
    assert counted.compare(counted.fg_measure("passages")).values["llm"].value == 0  # still shown


@pytest.mark.parametrize(("version", "is_noted"), [(3.0, True), (2, False), (2.0, False), (None, False)])
def test_another_version_than_the_published_one_is_noted(tmp_path, version, is_noted):
    for number in range(2):
        (tmp_path / f"llm/m{number}").mkdir(parents=True)
        versions = {"versions": {"race": version}} if version else {}
        (tmp_path / f"llm/m{number}/results_1.json").write_text(json.dumps(
            {"results": {"race": {"acc,none": 0.4 - number / 10}}} | versions))
    _, sections = result_tables(Record(read_results(tmp_path)))
    note = "race: version 3 of lm-eval's task, the published figures are of version 2.\n\n"
    assert dict(sections)["Benchmarks by stage: llm"].startswith(note) is is_noted


def test_missing_stages_and_results_are_listed(runs):
    (runs / "llm/m1-simp").rename(runs / "elsewhere")
    path = runs / "stack/m2-empd/eval/results_1.json"
    found = read_json(path)
    del found["results"]["terms"]
    path.write_text(json.dumps(found))
    (runs / "stack/m2-empd/eval/metrics-simp.json").unlink()
    record = Record(read_runs(runs))
    assert record.missing == ["llm: the stage m1-simp is missing", "stack: m2-empd lacks the benchmarks terms",
                              "stack: m2-empd lacks the test sets simp"]
    assert record.category_fg("llm", "DK").value == pytest.approx(40)  # of the remaining stage
    assert record.category_fg("stack", "DK").value == pytest.approx(0)


def test_a_seed_affects_all_benchmarks_of_a_category(seed_runs):
    """The seeds' spread is that of the category's FG, 31.25 and 15 here, and does not shrink with its benchmarks."""
    found = Record(read_runs(seed_runs)).category_fg("llm", "Rs")
    assert found.value == pytest.approx((31.25 + 15) / 2)
    assert found.error == pytest.approx(12.706 / 1.96 * (31.25 - 15) / 2, rel=0.01)


def test_seeds_are_chains_from_one_start(seed_runs):
    record = Record(read_runs(seed_runs))
    assert set(record.chains["llm"]) == {(0, 42), (0, 43)}
    found = record.category_fg("llm", "DK")
    assert found.value == pytest.approx((30 + 0) / 2)
    assert found.error == pytest.approx(97.3, abs=0.1)  # 12.706/1.96 · 21.2 / √2: two distant seeds say little
    assert record.chains["llm"][0, 43][0].name == "m0"


def test_tasks_in_another_order_are_not_compared(runs):
    (runs / "stack/m1-simp").rename(runs / "stack/m1-empd")
    with pytest.raises(UserError, match="stage 1 is m1-simp of llm, but m1-empd of stack"):
        Record(read_runs(runs))
