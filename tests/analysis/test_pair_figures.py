"""The figures of a study: their layout, and that they show the differences."""
from unittest import mock

import numpy as np
import pytest

from analysis import pair_figures
from analysis.measures import PRIMARY
from analysis.pair_figures import (
    draw_forest,
    plot_by_start,
    plot_differences,
    plot_learning,
    plot_pairs,
    plot_pretraining,
)
from analysis.pair_tables import pair_sections
from analysis.pairs import Study
from analysis.results import read_runs
from tests.analysis.studies import RATES, SPREAD, START, write_study
from tests.analysis.test_figures import layout_faults

ALL = {"differences", "learning", "by-rate", "by-stage", "by-start", "pretraining"}
LONG = "interleave" + 20 * "W"

CASES = {"study": ({"models": ("llm", "stack", "llm-level", "interleave", "base")}, ALL),
         "one pair and rate": ({"pairs": (0,), "rates": RATES[:1]}, ALL - {"by-rate", "by-start"}),
         "two pairs": ({"pairs": (1, 2), "rates": RATES[:1], "models": ("llm", "stack", LONG)}, ALL - {"by-rate"})}


def study_of(folder, **options):
    return Study(read_runs(write_study(folder, **options)), "stack", "llm")


@pytest.mark.parametrize("case", CASES)
def test_layout_of_a_study(tmp_path, case):
    options, names = CASES[case]
    found = {}
    with mock.patch.object(pair_figures, "save_figure",
                           lambda figure, path: found.update({path.name: layout_faults(figure)})):
        plot_pairs(study_of(tmp_path / "study", **options), tmp_path, PRIMARY)
    assert {name: faults for name, faults in found.items() if faults} == {}
    assert found.keys() == names


def test_the_primary_measure_is_on_top_and_marked(tmp_path):
    study = study_of(tmp_path / "study")
    study.named = "KL on the new task"
    figure = plot_differences(study, "KL on the new task")
    labels = [label for panel in figure.axes for label in panel.get_yticklabels()]
    assert labels[0].get_text() == "KL on the new task (primary)"
    assert [label.get_fontweight() for label in labels] == ["bold"] + ["normal"] * (len(labels) - 1)
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "difference (nats/token)", "difference (nats)", "difference (bits/byte)", "difference (share of items)"]


def test_a_forest_shows_difference_interval_and_detectable_size(tmp_path):
    study = study_of(tmp_path / "study")
    difference = study.main_difference(PRIMARY)
    panel = mock.MagicMock()
    draw_forest(panel, [[(0, difference)]], [0])
    assert panel.errorbar.call_args.args[0] == [difference.estimate.mean]
    assert panel.errorbar.call_args.kwargs["xerr"] == [difference.estimate.half_width]
    limit = difference.estimate.smallest_detectable
    assert panel.plot.call_args.args[0] == [-limit, limit]


def test_the_thick_line_is_the_mean_of_the_pairs(tmp_path):
    study = study_of(tmp_path / "study")
    lines = plot_learning(study, PRIMARY).axes[1].get_lines()
    thick = [line for line in lines if line.get_linewidth() == 2]
    assert (len(lines), len(thick)) == (2 * (4 + 1), 2)
    values = [study.values(PRIMARY, pair, "stack", RATES[0], 2).value for pair in study.pairs]
    assert thick[1].get_ydata()[0] == pytest.approx(sum(values) / 4)
    assert thick[1].get_xdata() == pytest.approx([2.65, 2.45, 2.25])


@pytest.mark.parametrize(("options", "matched", "several"), [
    ({}, True, True), ({"rates": RATES[:1]}, False, True), ({"pairs": (1,)}, True, False)])
def test_captions_say_what_was_compared(tmp_path, options, matched, several):
    with mock.patch.object(pair_figures, "save_figure"):
        captions = plot_pairs(study_of(tmp_path / "study", **options), tmp_path, PRIMARY)
    assert ("Within pairs at equal loss" in captions["learning"]) == matched
    assert ("at equal new-task loss" in captions["by-stage"]) == matched
    assert ("mean over the pairs and 95% interval" in captions["by-stage"]) == several


def test_a_compared_control_is_drawn(tmp_path):
    runs = read_runs(write_study(tmp_path / "study", models=("llm", "stack", "llm-level")))
    for reference, drawn in (("llm", {"llm", "stack"}), ("llm-level", {"llm", "stack", "llm-level"})):
        figure = plot_learning(Study(runs, "stack", reference), PRIMARY)
        assert {text.get_text() for text in figure.legends[0].get_texts()} == drawn


def test_a_rate_that_learns_no_more_is_hollow_and_not_joined(tmp_path):
    study = study_of(tmp_path / "study")
    straight = study.curve

    def bent(name, pair, model, *place):
        x, y, rates = straight(name, pair, model, *place)
        return (np.array([*x[:2], x[0] + 0.1]) if (pair, model) == (1, "llm") else x), y, rates
    with mock.patch.object(study, "curve", bent):
        lines = plot_learning(study, PRIMARY).axes[1].get_lines()
    hollow = [line for line in lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata() for line in hollow] == [pytest.approx([2.8 + 0.1])]
    assert sorted(len(line.get_xdata()) for line in lines) == [1, 2] + [3] * 9


def test_each_pair_is_drawn_over_the_difference_at_the_start(tmp_path):
    """The grown m0 has a lower held-out loss, by 0.2 nats, and forgets less. Both have the same loss on the task."""
    text, task = plot_by_start(study_of(tmp_path / "study"), PRIMARY).axes
    effects = [2 * (-0.1 + np.random.default_rng([pair, 7]).normal(0, SPREAD)) for pair in (1, 2, 3, 4)]
    for panel, start in ((text, START["stack"] - START["llm"]), (task, 0)):
        points = panel.get_lines()[0]
        assert points.get_xdata() == pytest.approx([start] * 4, abs=1e-9)
        assert points.get_ydata() == pytest.approx(effects)


def test_pretraining_shows_each_pair_and_their_mean(tmp_path):
    """The held-out loss of llm falls from 8 to 5 nats, and 0.01 nats are added in pair 1, 0.02 in pair 2, and so on."""
    study = study_of(tmp_path / "study", models=("llm", "stack", "llm-level"))
    (tmp_path / "study/pair-2/stack/m0/metrics.jsonl").unlink()
    figure = plot_pretraining(Study(read_runs(tmp_path / "study"), "stack", "llm"), PRIMARY)
    thin, thick = ([line for line in figure.axes[0].get_lines() if (line.get_linewidth() > 1) is is_thick]
                   for is_thick in (False, True))
    assert len(thin) == 4 + 3
    assert thick[0].get_ydata() == pytest.approx([8.025, 7.025, 6.025, 5.025])
    assert thick[1].get_xdata() == pytest.approx([2.5e12, 5e12, 7.5e12, 1e13])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "llm: 5.025 at the end, mean of 4", "stack: 4.827 at the end, mean of 3"]
    assert study.pretraining_curve(1, "stack")[0] == (2.5e12, pytest.approx(7.81))
    assert study.pretraining_curve(1, "middle") == []
    table = dict(pair_sections(study, PRIMARY, RATES[1], 0.05))["Pretraining"]
    assert "| llm | 4 | 8.025 | 5.025 | – | – |" in table
    # the speed-up is that of 10 / 9.5 TFLOP
    assert "| stack | 4 | 7.825 | 4.825 | -0.200000 [-0.200000, -0.200000] (-0.200 to -0.200) | +5% to +5% |" in table
    assert "llm-level" not in table
