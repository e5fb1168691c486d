"""Results files of lm-eval."""
import datetime
import json
import math
import statistics

import numpy as np
import pytest

from analysis.results import add_results
from analysis.stages import Stage
from common.files import UserError
from evaluation.conditions import task_conditions, unlike
from evaluation.result_files import (
    metric_value,
    read_results_file,
    results_files,
    sample_files,
    write_results,
    write_task_results,
)


def test_values_of_old_and_new_results():
    entry = {"acc": 0.1, "acc_stderr": 0.2, "r@1,none": 0.3, "r@1_stderr,none": "N/A", "exact_match,strict": 0.4,
             "exact_match_stderr,strict": 0.5}
    assert metric_value(entry, "acc") == (0.1, 0.2)
    assert metric_value(entry, "exact_match,strict") == (0.4, 0.5)
    value, error = metric_value(entry, "r@1")
    assert value == 0.3
    assert math.isnan(error)
    assert metric_value(entry, "pct_stereotype") is None


def test_later_results_have_later_names(tmp_path):
    """Also than those of a clock that was ahead, such as in a zone farther east."""
    ahead = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(hours=9)
    (tmp_path / f"results_{ahead.isoformat().replace(':', '-')}.json").write_text('{"results": {}}')
    (tmp_path / "results_of-another-program.json").write_text('{"results": {}}')
    (tmp_path / f"results_{(ahead.year + 1)}-01-01T00-00-00.json").write_text('{"results": {"whole second": {}}}')
    for value in (0.25, 0.5):
        write_results(tmp_path, {"results": {"a": {"acc,none": value}}}, {})
    found = [path for path in results_files(tmp_path) if "another" not in path.name]
    assert [read_results_file(path).content["results"] for path in found] == [
        {}, {"whole second": {}}, {"a": {"acc,none": 0.25}}, {"a": {"acc,none": 0.5}}]


def test_items_of_a_group(tmp_path):
    content = {"results": {"all": {}, "a": {}, "b": {}}, "group_subtasks": {"all": ["part", "b"], "part": ["a"]}}
    write_results(tmp_path, content, {"a": [{"acc": 1.0, "doc": "long"}], "b": [{"acc": 0.0}]})
    path, = tmp_path.glob("results_*.json")
    found = read_results_file(path)
    assert found.items("all", "acc") == [1.0, 0.0]
    assert found.items("b", "acc") == [0.0]
    assert found.items("a", "doc") == [None]
    assert len(sample_files(path)) == 2
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a results file of lm-eval"):
        read_results_file(path)


def test_items_of_a_perplexity(tmp_path):
    """lm-eval records (log-likelihood, bytes) of a text, as its task wikitext does."""
    write_results(tmp_path, {"results": {"text": {"bits_per_byte,none": 1.5}}},
                  {"text": [{"bits_per_byte": [-12.5, 12], "word_perplexity": [-12.5, 3]}]})
    path, = results_files(tmp_path)
    assert read_results_file(path).items("text", "bits_per_byte") == [[-12.5, 12]]


def test_items_of_a_task_with_several_filters(tmp_path):
    """lm-eval repeats each item for each filter, and several processes write the items in another order."""
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    samples = [{"doc_id": index, "filter": name, "exact_match": value if name == "strict" else 1.0 - value}
               for name in ("strict", "flexible") for index, value in enumerate(scores)][::-1]
    mean, error = statistics.fmean(scores), statistics.stdev(scores) / len(scores) ** 0.5
    entry = {f"exact_match{kind},{name}": value for name in ("strict", "flexible")
             for kind, value in (("", mean), ("_stderr", error))}
    suite = [{"name": "sums", "category": "DK", "metric": "exact_match,strict"}]
    write_results(tmp_path, {"results": {"sums": entry}, "run": {"suite": suite}}, {"sums": samples})
    path, = results_files(tmp_path)
    found = read_results_file(path)
    assert found.items("sums", "exact_match,strict") == scores
    assert found.items("sums", "exact_match,flexible") == [1 - value for value in scores]
    assert found.items("sums", "exact_match") == []
    add_results(stage := Stage("llm", 42, 0, "m0"), path)
    (_, _, count), part = *stage.benchmarks["sums"].parts, *stage.benchmarks["sums"].parts.values()
    assert (count, part.tolist()) == (6, pytest.approx([(value - mean) / 6 for value in scores]))
    assert stage.benchmarks["sums"].error == pytest.approx(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float64(-math.inf), np.float32(math.nan)])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, value):
    interval = {"mean": 1.0, "low": 1.0, "high": 1.0}
    for write in (lambda: write_results(tmp_path, {"results": {"a": {"acc,none": value}}}, {"a": [{"acc": 1.0}]}),
                  lambda: write_results(tmp_path, {"results": {"a": {"acc,none": 1.0}}}, {"a": [{"resp": [[value]]}]}),
                  lambda: write_task_results(tmp_path, "simp", [{"src_info": {}, "scores": {"sari": 1.0}}],
                                             {"sari": {"mean": float(value)}}, {}),
                  lambda: write_task_results(tmp_path, "simp", [{"src_info": {}, "scores": {"sari": float(value)}}],
                                             {"sari": interval}, {})):
        with pytest.raises(UserError, match="was not written: the results hold numbers that are not finite"):
            write()
    assert not list(tmp_path.iterdir())


def test_folders_among_the_results_files(tmp_path):
    for name in ("results_b.json/x/results_1.json", "results_b.json/results.json", "results_a.json", "samples_a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"results": {}}))
    (tmp_path / "results_c.json").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in results_files(tmp_path)] == [
        "results_a.json", "results_b.json/results.json", "results_b.json/x/results_1.json"]


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    (tmp_path / "results_[1].json").write_text('{"results": {}}')
    (tmp_path / "samples_a_[1].jsonl").write_text("")
    (tmp_path / "samples_a_1.jsonl").write_text("")
    assert sample_files(tmp_path / "results_[1].json") == {"a": tmp_path / "samples_a_[1].jsonl"}


def test_the_seed_is_a_condition_of_sampling_alone():
    def found(seed, do_sample):
        decoding = {"num_beams": 3, "do_sample": do_sample, "seed": seed}
        return task_conditions({"run": {"decoding": decoding}}, "rougeL")

    assert unlike(found(1, False), found(2, False)) == []
    assert unlike(found(1, True), found(2, True)) == ["decoding seed"]


def test_bertscores_of_other_encoders_are_unlike():
    def found(layer):
        return task_conditions({"run": {"bertscore_model": "encoder", "bertscore_layer": layer}}, "bertscore")

    assert unlike(found(2), found(9)) == ["bertscore_layer"]
    assert "bertscore_layer" not in task_conditions({"run": {"bertscore_layer": 2}}, "rougeL")
