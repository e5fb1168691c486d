"""Methods on the plane of what is learned and what is forgotten, on folders with known effects."""
import json
import math
import re
import shutil
from unittest import mock

import numpy as np
import pytest

import report
from analysis import method_figures, method_plane
from analysis.difference_text import p_text
from analysis.inference import PairedDifference, t_quantile
from analysis.left_out import all_left_out
from analysis.measures import item_values, pool, weighted_sum
from analysis.method_figures import plot_planes
from analysis.method_interaction import interaction_section, left_out_of_interaction, method_effects
from analysis.method_plane import (
    Point,
    gap_of,
    left_out_of_plane,
    method_study,
    over_items,
    pareto_front,
    plane_section,
    points_of,
    start_point,
)
from analysis.results import read_runs
from common.files import UserError
from evaluation.result_files import total_losses
from report import ReportConfig
from tests.analysis.studies import RATES, SLOPE, learned_loss, write_study
from tests.analysis.test_report import cells

RISE = "rise of held-out loss"
EFFECTS = {"lora": {"llm": -0.3, "stack": -0.1}, "replay": {"llm": 0.0, "stack": 0.0}}  # nats per token


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study of two models with three methods. Each forgets as much as finetune, plus its effect, at equal learning;
    lora learns 0.1 nats less at each rate."""
    study = write_study(tmp_path_factory.mktemp("written") / "study")
    for model in study.glob("pair-*/*"):
        chains = list(model.glob("rate-*"))
        for method in ("finetune", *EFFECTS):
            for chain in chains:
                place = model / method / chain.name
                shutil.copytree(chain, place)
                for stage in place.iterdir():
                    effect = EFFECTS.get(method, {}).get(model.name, 0.0) + deviation(model.parent.name, method)
                    change(stage, method, effect, 0.1 * (method == "lora"))
        for chain in chains:
            shutil.rmtree(chain)
    return study


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the study."""
    return shutil.copytree(written, tmp_path / "study")


def deviation(pair, method):
    """The deviation of the effect of a method in a pair."""
    return 0.0 if method == "finetune" else np.random.default_rng(list(f"{pair} {method}".encode())).normal(0, 0.01)


def change(stage, method, effect, less):
    """Makes a stage one of a method: `less` is learned, and forgetting changes as it does along the curve, and by the
    effect."""
    record = json.loads((stage / "run.json").read_text())
    record["settings"]["method"] = method
    (stage / "run.json").write_text(json.dumps(record))
    number, task = int(stage.name[1]), stage.name.partition("-")[2]
    for name, added in (("text", effect - number * SLOPE * less), (task, less)):
        path, = stage.glob(f"eval/losses-*{name}.json")
        content = json.loads(path.read_text())
        content["items"]["nll"] = [nll + added * tokens for nll, tokens in
                                   zip(content["items"]["nll"], content["items"]["tokens"])]
        path.write_text(json.dumps(content | total_losses(content["items"])))


def studies_of(folder):
    stages = read_runs(folder)
    return stages, {model: method_study(stages, model, "finetune") for model in ("llm", "stack")}


def test_methods_are_compared_at_equal_learning(folder):
    stages, studies = studies_of(folder)
    assert studies["llm"].models == ["finetune", "lora", "replay"]
    for model, study in studies.items():
        for method, effects in EFFECTS.items():
            gap = gap_of(study, method, RISE)
            assert (gap.mean, gap.n) == (pytest.approx(effects[model], abs=0.02), 4)
    sentences, (title, text) = plane_section(studies["llm"], RISE)
    assert title == "Learned and forgotten: llm"
    row, = (line for line in text.splitlines() if line.startswith("| lora |"))
    assert row.startswith("| lora | 2.5000 to 2.9000 | 2.5000 to 2.8000 | -0.3")
    assert re.search(r"\| < 0.001 \| 0\.0\d+ \| 0.003, 0.001, 0.0003 \|", row)
    assert sentences[1].startswith("On the Pareto front of what llm learned and forgot, by the measured values: ")
    assert method_study(stages, "llm", "none") is None


def test_methods_that_were_not_trained_alike_are_named(folder):
    """A method may have a learning rate of its own, but not data or epochs."""
    for method in folder.glob("pair-*/llm/*"):
        if (method / "rate-0.001").exists():
            (method / "rate-0.001").rename(method.parent / "kept")
            shutil.rmtree(method)
            (method.parent / "kept").rename(method)
    study = method_study(read_runs(folder), "llm", "finetune")
    assert study.trained_otherwise == []
    assert "at one learning rate (learning not matched), compared with finetune: smaller with lora" in plane_section(
        study, RISE)[0][0]
    for path in folder.glob("pair-*/llm/lora/m*/run.json"):
        run = json.loads(path.read_text())
        run["settings"] |= {"learning_rate": 1e-6, "weight_decay": 0.1}
        run["settings"] |= {"num_train_epochs": 2.0} if "m2-" in str(path) else {}
        path.write_text(json.dumps(run))
    study = method_study(read_runs(folder), "llm", "finetune")
    assert "at learning rates from 1e-06 to 0.001 (learning not matched)" in plane_section(study, RISE)[0][0]
    assert study.trained_otherwise == ["; ".join(f"pair {pair}, lora, m2-empd" for pair in (1, 2, 3, 4))
                                       + ": not trained as pair 1, finetune, m2-empd: num_train_epochs 2.0 and 1.0"]


def test_methods_with_rates_of_their_own_are_checked_too(folder):
    shutil.rmtree(folder / "pair-1/llm/lora/rate-0.0003")
    shutil.rmtree(folder / "pair-1/llm/lora/rate-0.003")
    (folder / "pair-1/llm/lora/rate-0.001").rename(folder / "pair-1/llm/lora/rate-0.002")
    for path in folder.glob("pair-1/llm/lora/rate-0.002/m1-*/run.json"):
        run = json.loads(path.read_text())
        path.write_text(json.dumps(run | {"settings": run["settings"] | {"num_train_epochs": 9.0}}))
    assert method_study(read_runs(folder), "llm", "finetune").trained_otherwise == [
        "pair 1, lora, rate 0.002, m1-simp: not trained as pair 1, finetune, rate 0.0003, m1-simp: num_train_epochs "
        "9.0 and 1.0"]


def test_does_the_effect_of_a_method_differ_between_the_models(folder):
    _, studies = studies_of(folder)
    (title, text), = interaction_section(studies, ("stack", "llm"), RISE)
    assert title == "Does the effect of a method differ between the models"
    row, = (line for line in text.splitlines() if line.startswith("| lora |"))
    values = [float(cell.split()[0]) for cell in row.strip("| ").split(" | ")[1:4]]
    assert values == pytest.approx([-0.1, -0.3, 0.2], abs=0.02)
    assert row.endswith("| 4 | 0.1500 |")
    assert interaction_section({"stack": studies["stack"]}, ("stack", "llm"), RISE) == []


def test_the_differences_of_effects_are_corrected_for_their_number(folder):
    for pair, more in ((1, 0.05), (2, 0.02)):
        for stage in folder.glob(f"pair-{pair}/llm/*/rate-*/m2-empd"):
            change(stage, stage.parents[1].name, more * (stage.parents[1].name == "lora"), 0.0)
            change(stage, stage.parents[1].name, 0.1 * more * pair * (stage.parents[1].name == "replay"), 0.0)
    _, studies = studies_of(folder)
    (_, text), = interaction_section(studies, ("stack", "llm"), RISE)
    rows = {cells(line)[0]: cells(line) for line in text.splitlines() if line.startswith(("| lora", "| replay"))}
    p_values = {}
    for method in EFFECTS:
        values = [effects.grown - effects.reference
                  for effects in method_effects((studies["stack"], studies["llm"]), method, RISE).values()]
        p_values[method] = PairedDifference(tuple(values)).p
    assert {method: row[4] for method, row in rows.items()} == {
        method: p_text(p) for method, p in p_values.items()}
    assert {method: row[5] for method, row in rows.items()} == {
        method: p_text(2 * p if p == min(p_values.values()) else max(p_values.values()))
        for method, p in p_values.items()}


def test_both_models_are_compared_at_the_same_losses(folder):
    """The more a model has learned with lora, the more it forgets, and stack learns 0.15 nats more at each rate."""
    for stage in folder.glob("pair-*/*/lora/rate-*/m2-empd"):
        place = RATES.index(stage.parent.name.removeprefix("rate-"))
        change(stage, "lora", 3 - (learned_loss(stage.parents[2].name, 2, place) + 0.1), 0.0)
    _, studies = studies_of(folder)
    effects = method_effects((studies["stack"], studies["llm"]), "lora", RISE)
    common = (2.5, 2.65)  # of stack 2.25 to 2.65 and 2.35 to 2.75, of llm 2.4 to 2.8 and 2.5 to 2.9
    for pair, of_models in effects.items():
        own = deviation(f"pair-{pair}", "lora") + 3 - sum(common) / 2
        assert of_models == pytest.approx([*(EFFECTS["lora"][model] + own for model in ("stack", "llm")), 0.15])
    for stage in folder.glob("pair-2/llm/*/rate-*/m2-empd"):  # both learn too little for a loss that stack reaches
        change(stage, stage.parents[1].name, 0.0, 0.5)
    _, studies = studies_of(folder)
    assert list(method_effects((studies["stack"], studies["llm"]), "lora", RISE)) == [1, 3, 4]
    assert left_out_of_interaction(studies, ("stack", "llm"), RISE) == [
        f"pair 2 is left out of the effects of {method}: the curves of both models, with the method and without, reach "
        "no common new-task loss" for method in ("lora", "replay")]


def test_effects_are_compared_only_if_learning_is_matched_for_both_models(folder):
    for chain in (*folder.glob("pair-*/stack/*/rate-0.0003"), *folder.glob("pair-*/stack/*/rate-0.003")):
        shutil.rmtree(chain)
    _, studies = studies_of(folder)
    assert [studies[model].matches_learning for model in ("stack", "llm")] == [False, True]
    assert interaction_section(studies, ("stack", "llm"), RISE) == []
    assert left_out_of_interaction(studies, ("stack", "llm"), RISE) == [
        "the effects of the methods on stack and llm are not compared: one was fine-tuned at several learning rates, "
        "and the other at one"]


def test_several_seeds_of_one_model_are_the_units(folder, tmp_path):
    """The chains of pair 2 become seed 43 of pair 1; replay was trained with one seed only."""
    one = tmp_path / "one"
    shutil.copytree(folder / "pair-1/llm", one / "llm")
    for chain in folder.glob("pair-2/llm/[fl]*/rate-*"):  # not those of replay
        seeded = one / "llm" / chain.parent.name / chain.name / "seed-43"
        shutil.copytree(chain, seeded)
    stages = read_runs(one)
    study = method_study(stages, "llm", "finetune")
    (seed,) = {stage.seed for stage in stages if stage.seed != 43 and stage.number}
    assert (study.unit, study.pairs) == ("seed", sorted((seed, 43)))
    gap, single = gap_of(study, "lora", RISE), gap_of(study, "replay", RISE)
    assert (gap.n, single.n) == (2, 1)
    assert gap.mean == pytest.approx(-0.3, abs=0.03)
    assert math.isnan(single.p)
    _, (_, text) = plane_section(study, RISE)
    assert "with the 95% interval over the seeds (for these items and this m0)" in text
    assert left_out_of_plane(study, RISE) == ["the Pareto front of llm is without seed 43, in which not all methods "
                                              "have results after m2-empd"]
    assert interaction_section({"llm": study, "stack": study}, ("stack", "llm"), RISE) == []
    path, = one.glob("llm/lora/rate-0.001/seed-43/m2-empd/eval/losses-text.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"run": content["run"] | {"dtype": "bf16"}}))
    assert any(line.startswith("seed 43, lora, rate 0.001, m2-empd: losses of text under other conditions")
               for line in all_left_out(method_study(read_runs(one), "llm", "finetune")))


def test_the_front_compares_the_same_pairs(folder):
    """A copy of finetune in the pairs 1 and 2 does not take its place on the front."""
    for pair in (1, 2):
        shutil.copytree(folder / f"pair-{pair}/llm/finetune", folder / f"pair-{pair}/llm/finetune-copy")
    for record in folder.glob("pair-*/llm/finetune-copy/rate-*/*/run.json"):
        assert json.loads(record.read_text())["settings"]["method"] == "finetune"
    study = method_study(read_runs(folder), "llm", "finetune")
    points = {(point.method, point.rate): (point.loss, point.forgetting) for point in points_of(study, RISE)}
    for rate in study.rates:
        assert points["finetune-copy", rate] == points["finetune", rate]
    shutil.rmtree(folder / "pair-2/llm/finetune-copy/rate-0.003/m2-empd")  # a rate that not all of these pairs have
    fewer = method_study(read_runs(folder), "llm", "finetune")
    assert [point.rate for point in points_of(fewer, RISE) if point.method == "finetune-copy"] == ["0.0003", "0.001"]
    assert left_out_of_plane(study, RISE) == ["the Pareto front of llm is without pair 3, pair 4, in which not all "
                                              "methods have results after m2-empd"]


def test_methods_without_a_common_pair_are_still_compared_with_the_baseline(folder, tmp_path):
    """lora is unfinished in the pairs 3 and 4, replay in 1 and 2."""
    for pair, method in ((1, "replay"), (2, "replay"), (3, "lora"), (4, "lora")):
        for stage in folder.glob(f"pair-{pair}/llm/{method}/rate-*/m2-empd"):
            shutil.rmtree(stage)
    study = method_study(read_runs(folder), "llm", "finetune")
    assert points_of(study, RISE) == []
    assert [gap_of(study, method, RISE).n for method in ("lora", "replay")] == [2, 2]
    with mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}):
        report.main(ReportConfig(runs=str(folder), out=str(tmp_path / "report")))
    text = (tmp_path / "report/report.md").read_text()
    assert "- the Pareto front of llm is without pair 1, pair 2, pair 3, pair 4, in which not all methods have" in text
    section = text.partition("## Learned and forgotten: llm")[2]
    assert re.search(r"^\| lora \| 2\.5000 to 2\.8000 \| -0\.(29|30)\d* \[", section, re.MULTILINE)


def test_one_run_of_each_method_gives_no_verdict(folder, tmp_path):
    shutil.copytree(folder / "pair-1", tmp_path / "one")
    stages = read_runs(tmp_path / "one")
    study = method_study(stages, "llm", "finetune")
    sentences, (_, text) = plane_section(study, RISE)
    assert sentences[0] == ("llm, rise of held-out loss after m2-empd (primary measure), at equal new-task loss, "
                            "compared with finetune: one run of each method gives no verdict, since runs that differ "
                            "only in their seed differ, too.")
    row, = (line for line in text.splitlines() if line.startswith("| lora |"))
    assert "] | 0.003" in row
    gap = gap_of(study, "lora", RISE)
    assert gap.mean == pytest.approx(-0.3, abs=0.03)
    assert gap.n == 24
    assert gap.half_width < 0.02
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        tokens = rng.integers(5, 40, 30)
        values = tokens * rng.normal(0.2, 0.5, 30)
        gap = over_items(item_values(values / tokens.mean(), tokens / tokens.mean()))
        covered += abs(gap.mean - 0.2) <= gap.half_width
    assert 0.92 < covered / 400 < 0.98
    same = over_items(item_values(np.full(3, 3.5e-18)))
    assert (same.mean, same.interval) == (0.0, (0.0, 0.0))
    gap = over_items(item_values(np.array([1.0, 3.0, 5.0])))
    assert (gap.mean, gap.half_width) == (3.0, pytest.approx(t_quantile(2) * 2 / np.sqrt(3)))
    assert gap.p == pytest.approx(0.1217, abs=1e-3)  # t = 2.598 with two degrees of freedom
    assert coverage_of_two_sets() == pytest.approx(0.95, abs=0.03)


def coverage_of_two_sets():
    """The share of intervals that cover the mean over two sets of items with other means: the difference between the
    sets is no noise."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        gap = over_items(pool([item_values(rng.normal(mean, 1, size)) for mean, size in ((0.0, 20), (6.0, 80))]))
        covered += abs(gap.mean - 3.0) <= gap.half_width
    return covered / 400


def test_a_mean_of_which_one_set_has_no_items_has_none():
    """Its value is known, and how well it is measured is not."""
    known, unknown = item_values(np.array([1.0, 2.0, 6.0])), item_values(np.array([5.0]))
    for found in (pool([known, unknown]), weighted_sum([(0.5, known), (0.5, unknown)])):
        assert found.values.tolist() == [4.0]
        assert found.residuals.tolist() == [0.0]
    assert len(pool([known, known]).values) == 6


def test_methods_without_a_common_loss(folder):
    for stage in folder.glob("pair-*/llm/lora/rate-*/m*"):
        change(stage, "lora", 0.0, 1.0)
    stages, studies = studies_of(folder)
    assert gap_of(studies["llm"], "lora", RISE) is None
    sentences, (_, text) = plane_section(studies["llm"], RISE)
    assert "| no common new-task loss |" in text
    assert "smaller with" not in sentences[0]
    assert any("is left out of lora − finetune of llm after m2-empd: the methods reach no common new-task loss" in line
               for line in all_left_out(studies["llm"]))


def test_methods_that_could_not_be_tested_give_no_verdict(folder):
    """lora reaches no common loss, and replay is in one pair only."""
    for stage in folder.glob("pair-*/llm/lora/rate-*/m*"):
        change(stage, "lora", 0.0, 1.0)
    for place in folder.glob("pair-[234]/llm/replay"):
        shutil.rmtree(place)
    _, studies = studies_of(folder)
    sentences, (_, text) = plane_section(studies["llm"], RISE)
    assert sentences[0].endswith(": no method could be tested: it takes two pairs that can be compared and differ.")


def test_a_method_that_is_not_finished(folder):
    """Has no result, which is another thing than no common loss, and no time of a chain."""
    for stage in folder.glob("pair-*/llm/lora/rate-*/m2-*"):
        shutil.rmtree(stage)
    stages, studies = studies_of(folder)
    _, (_, text) = plane_section(studies["llm"], RISE)
    assert "\n| lora | – | – | – | – | – | – | – |\n" in text
    assert "no common new-task loss" not in text


def test_an_unfinished_method_leaves_the_others_on_the_plane(folder):
    shutil.copytree(folder / "pair-1", folder.parent / "one")
    for stage in (folder.parent / "one").glob("llm/lora/rate-*/m2-*"):
        shutil.rmtree(stage)
    study = method_study(read_runs(folder.parent / "one"), "llm", "finetune")
    assert {point.method for point in points_of(study, RISE)} == {"finetune", "replay"}
    assert left_out_of_plane(study, RISE) == ["the Pareto front of llm is without lora, without results after m2-empd"]


def test_tasks_in_another_order_are_compared_up_to_the_first_that_differs(folder):
    for stage in folder.glob("pair-*/llm/lora/rate-*/m2-*"):
        stage.rename(stage.with_name("m2-inqqg"))
    study = method_study(read_runs(folder), "llm", "finetune")
    assert study.left_out == ["llm, lora: not compared at equal learning from stage 2 on, which is m2-inqqg, and "
                              "m2-empd with finetune"]
    contrast = study.contrasts[0]
    assert contrast.one == "lora"
    assert study.difference(contrast, RISE, 1).estimate.mean == pytest.approx(-0.3, abs=0.02)
    assert study.difference(contrast, RISE, 2) is None


def test_a_measure_that_only_the_baseline_has(folder):
    """Is no measure of the other method, which is another thing than no common loss."""
    for path in folder.glob("pair-*/llm/lora/rate-*/m2-*/eval/losses-text.json"):
        path.unlink()
    _, studies = studies_of(folder)
    _, (_, text) = plane_section(studies["llm"], RISE)
    assert re.search(r"^\| lora \| – \| – \| – \| – \| – \| ", text, re.MULTILINE)


def test_methods_with_learning_rates_of_their_own(folder):
    """lora at larger rates than finetune: no rate is missing, but one that is not finished in one pair."""
    for chain in folder.glob("pair-*/llm/lora/rate-0.003"):
        chain.rename(chain.with_name("rate-0.01"))
    for chain in folder.glob("pair-*/llm/lora/rate-0.0003"):
        shutil.rmtree(chain)
    _, studies = studies_of(folder)
    assert gap_of(studies["llm"], "lora", RISE).mean == pytest.approx(-0.3, abs=0.02)
    assert not [line for line in all_left_out(studies["llm"]) if "lacks" in line]
    shutil.rmtree(folder / "pair-2/llm/lora/rate-0.01/m2-empd")
    shutil.rmtree(folder / "pair-1/llm/lora/rate-0.001/m1-simp")  # only the last stage is compared
    _, studies = studies_of(folder)
    assert [line for line in all_left_out(studies["llm"]) if "lacks" in line] == [
        "pair 2, lora − finetune of llm after m2-empd: lora lacks results at the rate 0.01"]


def test_chains_outside_folders_of_rates_are_no_method_of_the_plane(folder, tmp_path):
    """As `make experiment` without rates leaves them in the folder in which methods are then compared with rates."""
    for model in folder.glob("pair-*/*"):
        for stage in (model / "finetune/rate-0.001").iterdir():
            own = shutil.copytree(stage, model / stage.name)
            record = json.loads((own / "run.json").read_text())
            (own / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"method": None}}))
    study = method_study(read_runs(folder), "llm", "finetune")
    assert "none" not in study.models
    assert [line for line in all_left_out(study) if "none" in line] == [
        "llm, none: not compared at equal learning, since its stages are not in folders of learning rates"]
    assert left_out_of_plane(study, RISE) == []
    with mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}):
        report.main(ReportConfig(runs=str(folder), out=str(tmp_path / "report")))
    assert "lora 0.001, none (no folder of a rate), replay 0.001" in (tmp_path / "report/report.md").read_text()


def test_a_rate_that_the_baseline_lacks(folder, tmp_path):
    """The methods without it are shown at their own middle rate, and the baseline stays the same."""
    for chain in folder.glob("pair-*/*/lora/rate-0.003"):
        chain.rename(chain.with_name("rate-0.1"))
    with mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}):
        report.main(ReportConfig(runs=str(folder), out=str(tmp_path / "report"), rate=0.1))
    text = (tmp_path / "report/report.md").read_text()
    assert "Learning is not matched. The learning rates are: finetune 0.001, lora 0.1, replay 0.001." in text
    assert "compared with finetune: smaller with lora" in text


def test_a_model_without_the_primary_measure_has_no_plane(folder, tmp_path):
    for path in folder.glob("pair-*/stack/**/eval/results_*.json"):
        path.unlink()
    with mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}):
        report.main(ReportConfig(runs=str(folder), out=str(tmp_path / "report"), primary="loss of accuracy, DK"))
    text = (tmp_path / "report/report.md").read_text()
    assert "## Learned and forgotten: llm" in text
    assert "the methods of stack are not compared at equal learning: this takes the loss of accuracy, DK of finetune" \
        in text


def test_a_method_that_learned_nothing_is_not_on_the_front(folder):
    """m0 learned nothing, either, and forgot nothing."""
    for chains in folder.glob("pair-*/llm/lora"):
        shutil.rmtree(chains)
    for stage in folder.glob("pair-*/llm/replay/rate-*/m*"):
        change(stage, "replay", int(stage.name[1]) * (SLOPE * 5 - 0.195), 5.0)  # a loss above that of m0
    _, studies = studies_of(folder)
    start, = start_point(studies["llm"], RISE)
    own = [point for point in points_of(studies["llm"], RISE) if point.method == "replay"]
    assert start.loss == pytest.approx(3.2)
    assert all(point.loss > start.loss for point in own)
    others = [point.forgetting for point in points_of(studies["llm"], RISE) if point.method != "replay"]
    assert 0 < min(point.forgetting for point in own) < min(others)
    _, (_, text) = plane_section(studies["llm"], RISE)
    head, row = (next(line for line in text.splitlines() if line.startswith(f"| {name} |")).split(" | ")
                 for name in ("method", "replay"))
    assert row[head.index("on the front")] == "–"


def test_pairs_without_a_common_loss_in_both_models(folder):
    """lora is matched in other pairs of stack than of llm."""
    for model, pairs in (("stack", (1, 2)), ("llm", (3, 4))):
        for pair in pairs:
            for stage in folder.glob(f"pair-{pair}/{model}/lora/rate-*/m*"):
                change(stage, "lora", 0.0, 1.0)
    _, studies = studies_of(folder)
    (_, text), = interaction_section(studies, ("stack", "llm"), RISE)
    assert "| lora |" not in text
    assert "| replay |" in text


def test_the_pareto_front_by_hand():
    points = [Point(name, "", x, y) for name, x, y in (
        ("a", 1.0, 0.9), ("b", 2.0, 0.5), ("c", 2.5, 0.6), ("d", 3.0, 0.1), ("e", 3.0, 0.2), ("f", 1.0, 1.0),
        ("g", 4.0, 0.1),
        ("h", 2.0, 0.5))]
    assert [point.method for point in pareto_front(points)] == ["a", "b", "h", "d"]


def test_the_report_of_methods(folder, tmp_path):
    with mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}):
        report.main(ReportConfig(runs=str(folder), out=str(tmp_path / "report")))
    text = (tmp_path / "report/report.md").read_text()
    assert ("llm, rise of held-out loss after m2-empd (primary measure), at equal new-task loss, compared with "
            "finetune: smaller with lora.") in text
    assert "## Does the effect of a method differ between the models" in text
    assert "![methods](methods.png)\n*rise of held-out loss over new-task loss: a panel for each method" in text
    assert (tmp_path / "report/methods.png").stat().st_size > 10_000
    assert (tmp_path / "report/methods.svg").exists()


def test_a_model_is_not_compared_with_methods_that_it_has_not(folder, tmp_path):
    for place in folder.glob("pair-*/stack/lora"):
        shutil.rmtree(place)
    with (mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}),
          mock.patch("report.plot_planes", return_value={})):
        report.main(ReportConfig(runs=str(folder), out=str(tmp_path / "report")))
    text = (tmp_path / "report/report.md").read_text()
    assert "stack, lora" not in text
    assert "- stack has no runs with lora\n" in text
    assert [line.startswith("| lora |") for line in text.split("## Methods: stack")[1].split("##")[0].splitlines()
            if line.startswith("| ")] == [False] * 3  # head, finetune, replay
    assert "| lora |" in text.split("## Methods: llm")[1].split("##")[0]


def test_one_run_of_each_method_says_nothing_of_better_and_worse(folder, tmp_path):
    """At one learning rate a method may forget less because it learned less."""
    shutil.copytree(folder / "pair-1/llm", tmp_path / "one/llm")
    with mock.patch("report.plot_record", return_value={}):
        report.main(ReportConfig(runs=str(tmp_path / "one"), out=str(tmp_path / "report")))
    text = (tmp_path / "report/report.md").read_text()
    assert "compared with finetune in one run of each" not in text
    assert "Learning is not matched. The learning rates are: finetune 0.001, lora 0.001, replay 0.001." in text
    assert "| llm | m1-simp | seed 42, lora, rate 0.001 |" in text
    with pytest.raises(UserError, match="unknown measure 'KL on text' of forgetting, expected one of rise of held-out"):
        report.main(ReportConfig(runs=str(tmp_path / "one"), out=str(tmp_path / "report"), primary="KL on text"))


def test_curves_of_the_figure(folder, tmp_path):
    _, studies = studies_of(folder)
    points = points_of(studies["llm"], RISE)
    assert [(point.method, point.rate) for point in points[:4]] == [
        ("finetune", "0.0003"), ("finetune", "0.001"), ("finetune", "0.003"), ("lora", "0.0003")]
    assert [point.loss for point in points[:3]] == pytest.approx([2.8, 2.6, 2.4])
    assert [point.forgetting for point in points[:3]] == pytest.approx([2 * SLOPE * (3.2 - x) for x in (2.8, 2.6, 2.4)])
    with mock.patch.object(method_figures, "save_figure") as save:
        assert list(plot_planes(studies, tmp_path, RISE)) == ["methods"]
    panels = save.call_args.args[0].axes
    assert [panel.get_title("left") for panel in panels] == ["llm: lora", "llm: replay", "stack: lora", "stack: replay"]
    texts = [text.get_text() for text in panels[0].texts]
    assert texts == ["3e-4", "1e-3", "3e-3"]
    assert save.call_args.args[0].legends[0].get_texts()[0].get_text() == "finetune (3e-4, 1e-3, 3e-3)"
    everything, front, baseline, _, method, _ = panels[0].lines
    assert len(everything.get_xdata()) == 9
    assert list(baseline.get_xdata()) == pytest.approx([2.4, 2.6, 2.8])
    assert list(method.get_xdata()) == pytest.approx([2.5, 2.7, 2.9])


def test_rates_that_learn_no_more_are_not_joined():
    points = [Point("a", rate, x, y) for rate, x, y in (("1", 3.0, 0.1), ("2", 2.0, 0.3), ("3", 2.5, 0.9))]
    joined, others = method_figures.split_curve(points, "a")
    assert [point.rate for point in joined] == ["2", "1"]
    assert [point.rate for point in others] == ["3"]


def test_verdicts_are_corrected_for_the_number_of_methods(folder):
    _, studies = studies_of(folder)
    gap = PairedDifference((0.05, 0.3, 0.2, 0.35))  # p is 0.042, and 0.085 for two methods
    with mock.patch.object(method_plane, "gap_of", return_value=gap):
        sentences, (_, text) = plane_section(studies["llm"], RISE)
    assert "no method can be told apart from it" in sentences[0]
    assert f"| {2 * gap.p:.3f} | {gap.smallest_detectable:.3g} |" in text
