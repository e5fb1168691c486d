"""The plan of a study, from pilots with known spread."""
import json
import re
import shutil

import numpy as np
import pytest

from analysis.inference import VarianceComponents, units_needed
from common.settings import load
from pipeline.experiment_plan import ExperimentPlanConfig, items_needed, print_plan, training_seconds
from tests.analysis.studies import RATES, write_study


def test_pairs_items_and_hours(tmp_path, capsys):
    """Each run takes a minute: 14 runs for each pair, two m0 and two stages at three rates of two models."""
    runs = write_study(tmp_path / "study")
    (runs / "pair-1/llm/m0/checkpoint-5").mkdir()
    (runs / "pair-1/llm/m0/checkpoint-5/run.json").write_text(json.dumps({"result": {"seconds": 9999.0}}))
    assert training_seconds(runs) == 60 * 4 * 14
    shutil.copytree(runs / "pair-1/llm", runs / "pair-9/llm")  # not finished: it does not count
    shutil.copytree(runs, tmp_path / "all/machine-1")
    (tmp_path / "all/machine-1/pair-2").rename(tmp_path / "scratch")
    (tmp_path / "all/machine-1/pair-2").symlink_to(tmp_path / "scratch")  # a pair on another disk
    print_plan(ExperimentPlanConfig(runs=str(tmp_path / "all"), effect=0.05))
    text = capsys.readouterr().out
    deviation = np.std([2 * np.random.default_rng([pair, 7]).normal(0, 0.02) for pair in (1, 2, 3, 4)], ddof=1)
    pairs = units_needed(deviation, 0.05)
    assert f"standard deviation between pairs: {deviation:.4g}" in text
    assert f"pairs needed: {pairs} with the pilot's items" in text
    assert f"hours: {pairs * 14 / 60:.1f} of training, 0.23 for each pair" in text
    assert "at equal new-task loss, stack − llm" in text
    table = [line.split() for line in re.findall(r"^ +(?:\d|all).*", text, re.MULTILINE)]
    assert [row[0] for row in table] == ["12", "24", "48", "96", "all"]
    assert table[1][1:] == [f"{deviation:.4g}", str(pairs), f"{pairs * 14 / 60:.1f}"]
    assert [float(row[1]) for row in table] == sorted((float(row[1]) for row in table), reverse=True)
    # the quantiles of chi-squared with 3 degrees of freedom are 0.2158 and 9.3484
    low, high = (units_needed(deviation * (3 / quantile) ** 0.5, 0.05) for quantile in (9.3484, 0.2158))
    assert f"; {low} to {high} over the 95% interval of the standard deviation" in text
    assert "can be compared" not in text


def test_items_needed_by_hand():
    assert items_needed(VarianceComponents(0.02, 1.0, 10)) == 450  # 1/450 is a tenth of 0.02 + 1/450
    assert items_needed(VarianceComponents(0.0, 1.0, 10)) is None


def test_the_pilot_has_one_method(tmp_path, refusal, capsys):
    runs = write_study(tmp_path / "study", pairs=(1, 2, 3), rates=RATES[:1])
    for stage in list(runs.glob("pair-*/*/m[12]-*")):
        other = shutil.copytree(stage, stage.parent / "ewc" / stage.name)
        record = json.loads((other / "run.json").read_text())
        (other / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"method": "ewc"}}))
    line = refusal((ExperimentPlanConfig, print_plan), "--runs", runs)
    assert "has stages of several methods, ewc, none: give --method, one of them" in line
    for method in ("ewc", "none"):
        print_plan(load(ExperimentPlanConfig, ["--runs", str(runs), "--method", method]))
        assert "pilot: 3 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "flags", "message"), [
    ({"pairs": (1,)}, (), "has 1 pairs with the rise of held-out loss of stack and llm after m2-empd, expected at"),
    ({"pairs": (1, 2), "models": ("llm",)}, (), "unknown model 'stack', expected one of llm"),
    ({"pairs": (1, 2)}, ("--method", "ewk"), "unknown method 'ewk', expected one of none"),
    ({"pairs": (1, 2)}, ("--primary", "accuracy"), "unknown measure 'accuracy'"),
    ({"pairs": (1, 2)}, ("--effect", "0"), "effect is 0.0, expected at least 1e-09")])
def test_too_little_for_a_plan(tmp_path, refusal, options, flags, message):
    runs = write_study(tmp_path / "study", rates=RATES[:1], **options)
    assert message in refusal((ExperimentPlanConfig, print_plan), "--runs", runs, *flags)


def test_pairs_without_a_common_loss_are_named(tmp_path, refusal, capsys):
    """In an error if too few are left, and otherwise in the plan."""
    runs = write_study(tmp_path / "study", pairs=(1, 2))
    for rate in RATES[1:]:
        shutil.rmtree(runs / f"pair-2/llm/rate-{rate}")
    line = refusal((ExperimentPlanConfig, print_plan), "--runs", runs)
    assert ("run experiment.py with more --pairs; pair 2 is left out of stack − llm after m2-empd: the models reach no "
            "common new-task loss (stack 2.2500 to 2.6500, llm 2.8000 to 2.8000 nats per token)") in line
    runs = write_study(tmp_path / "more", pairs=(1, 2, 3))
    for rate in RATES[1:]:
        shutil.rmtree(runs / f"pair-2/llm/rate-{rate}")
    print_plan(ExperimentPlanConfig(runs=str(runs)))
    assert "plan for more, since of the pilot pair 2 is left out of stack − llm" in capsys.readouterr().out
