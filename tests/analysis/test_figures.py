"""The figures, measured as drawn: panels of a useful size, and texts that can be read."""
import itertools
import json
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.path import Path as Polygon
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

from analysis import record_figures
from analysis.figures import save_figure
from analysis.record import Record
from analysis.record_figures import first_common_key, loss_curve, plot_record
from analysis.results import read_results, read_runs
from analysis.stages import Stage
from common.files import UserError
from pipeline import growth_report
from tests.analysis.conftest import TASKS, VALUES, write_paper_runs, write_published_results

ALL = {"benchmarks", "forgetting", "bias", "tasks", "losses", "calibration"}


def draw(record, folder, measure):
    """{name: measure(figure)} of all figures of a record. The figures are drawn but not written."""
    found = {}
    with mock.patch.object(record_figures, "save_figure",
                           lambda figure, path: found.update({path.name: measure(figure)})):
        record_figures.plot_record(record, folder)
    return found


def drawn_texts(figure):
    """The texts that the renderer draws."""
    texts, draw_text = [], Text.draw

    def keep(text, renderer):
        texts.append(text)
        draw_text(text, renderer)
    with mock.patch.object(Text, "draw", keep):
        figure.draw_without_rendering()
    assert texts
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def outline(text):
    """The rectangle of a text, which may be rotated, in pixels, without a pixel at each side."""
    box, rotation = text.get_window_extent().padded(-1), text.get_rotation()
    if rotation % 90 == 0:
        return rectangle(box)
    text.set_rotation(0)
    flat = text.get_window_extent().padded(-1)
    text.set_rotation(rotation)
    turn = Affine2D().rotate_deg_around(*flat.get_points().mean(axis=0), rotation)
    return turn.translate(*(box.get_points() - flat.get_points()).mean(axis=0)).transform_path(rectangle(flat))


def rectangle(box):
    """A bounding box as a polygon."""
    return Polygon([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1), (box.x0, box.y0)],
                   closed=True)


def crossing(outlines, others):
    """The pairs of positions (in outlines, in others) of polygons that overlap."""
    (low, high), (other_low, other_high) = (np.array([shape.get_extents().get_points() for shape in shapes])
                                            .transpose(1, 0, 2) for shapes in (outlines, others))  # [N, 2] each
    near = ((low[:, None] < other_high) & (other_low < high[:, None])).all(axis=-1)
    return [(one, two) for one, two in np.argwhere(near) if outlines[one].intersects_path(others[two])]


def layout_faults(figure):
    """The faults in the layout of a figure, as sentences."""
    texts = drawn_texts(figure)
    names = [repr(text.get_text()) for text in texts]
    panels = [axes for axes in figure.axes if axes.get_visible() and axes.get_subplotspec()]
    faults = [f"the figure is {figure.get_figwidth():.1f} inches wide"] if figure.get_figwidth() > 12 else []
    for number, panel in enumerate(panels):
        grid = panel.get_gridspec()
        for side, size, cell, share, least in (
                ("wide", panel.bbox.width, figure.bbox.width / grid.ncols, 0.5, 1.0),
                ("high", panel.bbox.height, figure.bbox.height / grid.nrows, 0.3, 0.6)):
            if size < max(share * cell, least * figure.dpi):
                faults.append(f"panel {number} is {size:.0f} pixels {side} in a cell of {cell:.0f}")
    outlines, areas = [outline(text) for text in texts], [rectangle(panel.bbox) for panel in panels]
    (left, bottom), (right, top) = figure.bbox.get_points()
    for text, name, box in zip(texts, names, (shape.get_extents() for shape in outlines)):
        if box.x0 < left or box.y0 < bottom or box.x1 > right or box.y1 > top:
            faults.append(f"{name} is outside the picture")
        if text.get_fontsize() < 7:
            faults.append(f"{name} is too small")
    faults += [f"{names[text]} lies on panel {number}" for text, number in crossing(outlines, areas)
               if texts[text].axes is not panels[number]]
    faults += [f"{names[one]} lies on {names[two]}" for one, two in crossing(outlines, outlines) if one < two]
    faults += [f"the legend covers panel {number}" for legend in figure.findobj(Legend)
               for number, panel in enumerate(panels) if legend.get_window_extent().overlaps(panel.bbox)]
    return faults


def wide(name):
    """A name of 40 wide characters without a place to break it."""
    return name.replace("_", "").upper().ljust(40, "W")[:30] + f"{hash_of(name):010}"


def hash_of(name):
    """A number of a name, the same in each process."""
    return sum(place * ord(letter) for place, letter in enumerate(name, 1))


CASES = {
    "small": lambda folder, small: small,
    "one model": lambda folder, small: [stage for stage in small if stage.model == "llm"],
    "start alone": lambda folder, small: [stage for stage in small if stage.number == 0],
    "published": lambda folder, small: read_results(write_published_results(folder)),
    "four models": lambda folder, small: read_runs(write_paper_runs(folder, ("llm", "stack", "middle", "wide"),
                                                                    seeds=(42, 43))),
    "long names": lambda folder, small: read_runs(write_paper_runs(folder, [wide("llm"), wide("stack"), wide("x")],
                                                                   4, rename=wide, categories=("DK", "Bias")))}


@pytest.mark.parametrize("case", CASES)
def test_layout(runs, tmp_path, case):
    record = Record(CASES[case](tmp_path / "made", read_runs(runs)))
    found = draw(record, tmp_path, layout_faults)
    assert {name: faults for name, faults in found.items() if faults} == {}
    assert found.keys() == {"published": {"benchmarks", "forgetting", "bias"},
                            "start alone": ALL - {"forgetting"}}.get(case, ALL)


def test_values_of_the_figures(runs, tmp_path):
    """VALUES and TASKS of conftest.py in percent, and FG by hand: of terms ((0.5 - 0.4) + (0.5 - 0.3)) / (2 · 0.5)."""
    figures = draw(Record(read_runs(runs)), tmp_path, lambda figure: figure)
    for place, panel in enumerate(figures["benchmarks"].axes):
        for model, (line, _, (errors,)) in zip(VALUES, panel.containers, strict=True):
            values = [100 * stage[place] for stage in VALUES[model]]
            assert line.get_ydata() == pytest.approx(values)
            assert [list(segment[:, 1]) for segment in errors.get_segments()] == [
                pytest.approx([value - 3.92, value + 3.92]) for value in values]
    panel, = figures["forgetting"].axes
    bars = [container.patches[0].get_width() for container in panel.containers if hasattr(container, "patches")]
    assert bars == pytest.approx([30, 0, 31.25, 15, 5, 0], abs=1e-9)
    assert [float(text.get_text()) for text in panel.texts] == pytest.approx(bars, abs=0.06)
    for model, heat_map in zip(TASKS, figures["tasks"].axes):
        assert [text.get_text() for text in heat_map.texts] == [f"{value:.1f}" for row in TASKS[model] for value in row]
    assert {text.get_text() for panel in figures["bias"].axes[:2] for text in panel.texts} == {"50"}
    for panel in figures["losses"].axes:
        training, evaluated = ([list(zip(*line.get_data())) for line in panel.get_lines()[place:4:2]]
                               for place in (0, 1))
        assert training == 2 * [[(100 * step, 5 - step / 5) for step in range(1, 9)]]
        assert evaluated == 2 * [[(0, 5.0), (800, 3.5)]]
    for place, panel in enumerate(figures["calibration"].axes):
        for model, line in zip(VALUES, panel.get_lines()[::4], strict=True):
            assert line.get_xdata() == pytest.approx([0.1, 0.2, 0.3])
            assert line.get_ydata() == pytest.approx([100 * stage[place] for stage in VALUES[model]])


def test_layout_of_a_growth_study(tmp_path):
    curve = [(1e21 * step, 9 / step) for step in range(1, 20)]
    runs = {seed: {"base": curve[:5], **{name: curve[5:] for name in ("stack", "interleave", "middle")},
                   "scratch": curve[2:]} for seed in (42, 43)}
    faults = []
    with mock.patch.object(growth_report, "save_figure", lambda figure, path: faults.extend(layout_faults(figure))):
        growth_report.plot_study(tmp_path, runs, "70552.1M parameters: 128 layers from scratch, and grown from 32")
    assert faults == []


def legend_colours(figure):
    """{label: colour} of a figure's legend."""
    return {label.get_text(): to_hex(handle.get_facecolor() if isinstance(handle, Patch) else handle.get_color())
            for legend in figure.legends for handle, label in zip(legend.legend_handles, legend.get_texts())}


def test_a_model_has_one_colour_in_all_figures(runs, tmp_path):
    for path in runs.glob("llm/*/metrics.jsonl"):
        path.unlink()
    for path in runs.glob("llm/*/eval/results_1.json"):
        found = json.loads(path.read_text())
        for values in found["results"].values():
            values.pop("ece,none", None)
        path.write_text(json.dumps(found))
    colours = draw(Record(read_runs(runs)), tmp_path, legend_colours)
    assert {colours[name]["stack"] for name in ("benchmarks", "forgetting", "calibration")} == \
        {colours["losses"]["stack: eval loss"]} != {colours["benchmarks"]["llm"]}


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["_hidden", "a$b$", "$\\frac$", "zero\tand  more"]
    for model, (number, name) in itertools.product(names[:2], enumerate(("m0", "m1-simp"))):
        (tmp_path / model / name).mkdir(parents=True)
        (tmp_path / model / name / "results_1.json").write_text(json.dumps(
            {"results": {benchmark: {"acc,none": 0.5 - number / 10} for benchmark in names[2:]}}))
    texts = draw(Record(read_results(tmp_path)), tmp_path,
                 lambda figure: [text.get_text() for text in drawn_texts(figure)])["benchmarks"]
    assert {"_hidden", "a$b$", "$\\frac$\nother, acc (%)", "zero and more\nother, acc (%)"} <= set(texts)


def test_a_figure_of_any_size_can_be_written(tmp_path):
    figure = Figure((5, 500))
    save_figure(figure, tmp_path / "tall")
    assert (tmp_path / "tall.png").stat().st_size
    assert (tmp_path / "tall.svg").stat().st_size


@pytest.mark.parametrize(("log", "settings"), [
    ('{"step": 1, "loss": 2.0}', {}),
    ('{"step": 1, "tokens": null, "loss": 2.0}', {}),
    ('{"step": 1, "tokens": 10, "loss": 2.0}', {"num_train_epochs": "3"})])
def test_a_damaged_log_is_refused(runs, tmp_path, log, settings):
    stage = runs / "llm/m1-simp"
    (stage / "metrics.jsonl").write_text(log)
    run = json.loads((stage / "run.json").read_text())
    run["settings"] |= settings
    (stage / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="llm/m1-simp.* is damaged"):
        plot_record(Record(read_runs(runs)), tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_logs_and_calibration_are_of_a_chain_that_all_models_have():
    """Pair 3, not the first of each; without a common one the chain that most have."""
    chains = {"llm": {(1, 42): 0, (3, 42): 0}, "stack": {(1, 42): 0, (3, 42): 0}, "stack-level": {(3, 42): 0}}
    record = SimpleNamespace(chains=chains, all_chains=lambda: (
        (model, key, chain) for model, group in chains.items() for key, chain in group.items()))
    assert first_common_key(record) == (3, 42)
    del chains["stack-level"][3, 42]
    chains["stack-level"][5, 42] = 0
    assert first_common_key(record) == (1, 42)


def test_very_many_epochs_are_not_marked():
    log = [{"step": 1, "tokens": 100, "loss": 2.0}, {"step": 1, "eval_loss": None}]
    curve = {epochs: loss_curve(Stage("llm", 0, 1, "m1-simp", log=log, run={
        "settings": {"task": "simp", "num_train_epochs": epochs}})) for epochs in (4.0, 2.5, 1e308)}
    assert curve == {4.0: ([(100, 2.0)], [], [25, 50, 75]), 2.5: ([(100, 2.0)], [], [40, 80]),
                     1e308: ([(100, 2.0)], [], [])}


def test_figures_have_the_formats_of_their_names(tmp_path):
    with matplotlib.rc_context({"savefig.format": "pdf"}):  # of the user
        save_figure(Figure(), tmp_path / "figure")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
