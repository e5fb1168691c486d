"""Results files of lm-eval."""
import math

import pytest

from common.files import UserError
from evaluation.result_files import metric_value, read_results_file, sample_files, write_results


def test_values_of_old_and_new_results():
    entry = {"acc": 0.1, "acc_stderr": 0.2, "r@1,none": 0.3, "r@1_stderr,none": "N/A", "exact_match,strict": 0.4,
             "exact_match_stderr,strict": 0.5}
    assert metric_value(entry, "acc") == (0.1, 0.2)
    assert metric_value(entry, "exact_match,strict") == (0.4, 0.5)
    value, error = metric_value(entry, "r@1")
    assert value == 0.3
    assert math.isnan(error)
    assert metric_value(entry, "pct_stereotype") is None


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
