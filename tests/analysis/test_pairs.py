"""Pairs of models: measures, matched learning, controls, on folders with known effects."""
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from analysis.contrasts import Contrast
from analysis.inference import variance_components
from analysis.left_out import all_left_out, lacking_results, unmatched
from analysis.matching import efficient_branch, match, mean_weights
from analysis.measures import DECREASE, rise_of_earlier_tasks
from analysis.pairs import Study
from analysis.results import read_runs
from analysis.stages import ItemLosses, Stage, rates_of
from common.files import read_json
from evaluation.result_files import total_losses
from tests.analysis.studies import RATES, SLOPE, TASKS, TOKENS, digest_of, write_study


def study_of(folder):
    return Study(read_runs(folder), "stack", "llm")


@pytest.fixture
def study(tmp_path):
    return study_of(write_study(tmp_path / "study"))


def test_the_branch_ends_at_the_lowest_loss():
    assert efficient_branch(np.array([3.0, 2.2, 2.6, 2.4])).tolist() == [1, 0]
    assert efficient_branch(np.array([3.0, 3.1, 2.2])).tolist() == [2, 0]  # a rate that learns less than a smaller one
    assert efficient_branch(np.array([3.0])).tolist() == [0]


def test_the_mean_of_a_curve_is_an_integral():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.3, 0.1, 0.7])
    grid = np.linspace(1.5, 3.5, 200_001)
    assert mean_weights(x, 1.5, 3.5) @ y == pytest.approx(np.interp(grid, x, y).mean(), abs=1e-5)
    assert mean_weights(x, 3.0, 3.0) @ y == pytest.approx(0.4)
    assert mean_weights(x, 1.5, 3.5).sum() == pytest.approx(1)


def test_curves_are_matched_where_both_have_learned_as_much():
    one, two = np.array([3.0, 2.5, 2.0, 2.4]), np.array([2.6, 2.2])
    found = match(one, two)
    assert found.ranges == ((2.0, 3.0), (2.2, 2.6))
    # both forget 3 - x, the first 0.5 more; the last rate of the first is not on its branch
    assert found.weights[0] @ (3.5 - one + [0, 0, 0, 9]) - found.weights[1] @ (3 - two) == pytest.approx(0.5)
    assert match(np.array([3.0, 2.7]), two).weights is None
    within = match(one, two, (2.3, 9.0))
    assert within.common == (2.3, 2.6)
    assert within.weights[1] @ two == pytest.approx(2.45)
    assert match(one, two, (2.7, 9.0)).weights is None


def test_the_folders_of_a_study(tmp_path):
    stages = read_runs(write_study(tmp_path / "study", pairs=(1, 12)))
    place = tmp_path / "study/pair-12/stack"
    found = {stage.directory: stage for stage in stages}
    assert len(stages) == 2 * 2 * (1 + 2 * 3)
    ends = [found[place / "m0"], found[place / "rate-0.001/m1-simp"]]
    assert [(stage.pair, stage.model, stage.rate) for stage in ends] == [(12, "stack", None), (12, "stack", "0.001")]
    assert found[place / "m0"].losses.keys() == {"text", *TASKS}


def test_forgetting_is_compared_at_equal_learning(study):
    """The grown model learns more at each rate. At equal learning it forgets 0.1 nats per token and stage less."""
    assert study.rates == list(RATES)
    for number in (1, 2):
        found = study.main_difference("rise of held-out loss", number)
        own = np.array([np.random.default_rng([pair, 7]).normal(0, 0.02) for pair in study.pairs])
        assert found.estimate.values == pytest.approx(tuple(number * (own - 0.1)))
        # at one rate the further learning, 0.15 nats, costs forgetting
        shared = study.difference(Contrast("stack", "llm"), "rise of held-out loss", number, "0.001")
        assert shared.estimate.values == pytest.approx(tuple(number * (own - 0.1 + SLOPE * 0.15)))
    assert study.difference(Contrast("stack", "llm"), "new-task loss", 1, "0.001").estimate.mean == pytest.approx(-0.15)


def test_an_equal_decrease_counts_from_the_own_m0(tmp_path):
    """The m0 of stack has a higher loss on the tasks, by 0.15 nats: at an equal decrease its loss is higher as well."""
    folder = write_study(tmp_path / "study")
    for task, path in itertools.product(TASKS, folder.glob("pair-*/stack/m0/eval")):
        change_items(path / f"losses-task-{task}.json", lambda nll, tokens: nll + 0.15 * tokens)
    study = study_of(folder)
    own = np.array([np.random.default_rng([pair, 7]).normal(0, 0.02) for pair in study.pairs])
    for number in (1, 2):
        found = study.difference(study.contrasts[0], "rise of held-out loss", number, DECREASE)
        assert found.estimate.values == pytest.approx(tuple(number * (own - 0.1 - SLOPE * 0.15)))
        assert study.difference(study.contrasts[0], "new-task loss", number, DECREASE).estimate.mean == \
            pytest.approx(0.15)
    for rate in RATES:
        change_items(folder / f"pair-3/stack/rate-{rate}/m2-empd/eval/losses-task-empd.json",
                     lambda nll, tokens: nll - tokens)
    assert list(unmatched(study_of(folder), study.contrasts[0], 2, DECREASE)) == [
        "pair 3 is left out of stack − llm after m2-empd: the models reach no common decrease of new-task loss (stack "
        "1.7000 to 2.1000, llm 0.4000 to 0.8000 nats per token)"]


def test_measures_of_a_chain_by_hand(study):
    def value(name, number=2):
        return study.values(name, 1, "llm", "0.001", number).value
    assert value("rise of held-out loss") == pytest.approx(2 * SLOPE * (3.2 - 2.6))
    assert value("KL on held-out text") == pytest.approx(0.2)
    assert value("KL on the new task") == pytest.approx(0.02)
    assert value("rise of earlier tasks' losses") == pytest.approx(0.1)
    assert study.values("rise of earlier tasks' losses", 1, "llm", "0.001", 1) is None  # nothing was learned before
    assert value("new-task loss") == pytest.approx(2.6)
    assert value("loss of accuracy, DK") == pytest.approx(4 / 40)  # four of 20 right items are wrong after stage 2
    assert value("rise of right options' NLL, DK") == pytest.approx(4 / 40)
    assert value("rise of right options' bits per byte, DK", 1) == pytest.approx(2 / 40)


def test_items_are_paired(study):
    found = study.main_difference("rise of held-out loss")
    start, end = (read_json(study.chains(2, "llm", "0.001")[0][number].directory / "eval/losses-text.json")["items"]
                  for number in (0, 2))
    rises = (np.array(end["nll"]) - start["nll"]) / np.mean(end["tokens"])
    assert study.values("rise of held-out loss", 2, "llm", "0.001", 2).values == pytest.approx(rises)
    assert found.components.items == len(rises)
    assert found.components.of_item > 0


def test_ranges_that_do_not_overlap_leave_the_pair_out(tmp_path):
    folder = write_study(tmp_path / "study")
    for rate in RATES:
        path = folder / f"pair-3/stack/rate-{rate}/m1-simp/eval/losses-task-simp.json"
        change_items(path, lambda nll, tokens: nll - tokens)
    study = study_of(folder)
    assert list(study.main_difference("rise of held-out loss", 1).by_pair) == [1, 2, 4]
    assert list(unmatched(study, study.contrasts[0], 1)) == [
        "pair 3 is left out of stack − llm after m1-simp: the models reach no common new-task loss "
        "(stack 1.3500 to 1.7500, llm 2.5000 to 2.9000 nats per token)"]


def test_a_rate_that_only_one_model_has_is_named(tmp_path):
    folder = write_study(tmp_path / "study")
    shutil.rmtree(folder / "pair-2/stack/rate-0.001")
    study = study_of(folder)
    assert list(lacking_results(study, study.contrasts[0], 2)) == [
        "pair 2, stack − llm after m2-empd: stack lacks results at the rate 0.001"]
    assert set(lacking_results(study, study.contrasts[0], 2)) < set(all_left_out(study))


def test_losses_that_a_stage_lacks_are_named(tmp_path):
    """Also where all stages are of one learning rate. A pair that lacks a point changes the difference."""
    for rates, place, dropped in ((RATES, "rate-0.003/", []), (RATES[:1], "", [2])):
        folder = write_study(tmp_path / str(len(rates)), rates=rates)
        assert all_left_out(study_of(folder)) == []
        stage = folder / f"pair-2/llm/{place}m2-empd"
        (stage / "eval/losses-text.json").unlink()
        study = study_of(folder)
        assert all_left_out(study) == [f"pair 2, llm, {'rate 0.003, ' if place else ''}m2-empd lacks the loss of "
                                        "text, the KL of text, which other stages have"]
        (folder / "pair-2/best").symlink_to("llm")  # no other model
        assert study_of(folder).models == study.models
        used = study.main_difference("rise of held-out loss").by_pair
        assert [pair for pair in study.pairs if pair not in used] == dropped


def test_a_stage_without_its_own_loss_is_named_once(tmp_path):
    folder = write_study(tmp_path / "study")
    (folder / "pair-2/llm/rate-0.001/m2-empd/eval/losses-task-empd.json").unlink()
    assert all_left_out(study_of(folder)) == ["pair 2, stack − llm after m2-empd: llm lacks results at the rate 0.001"]


def test_pairs_may_have_other_rates(tmp_path):
    """No model of the pair 3 lacks a rate that the other one has."""
    folder = write_study(tmp_path / "study")
    for model in ("llm", "stack"):
        shutil.copytree(folder / f"pair-3/{model}/rate-0.003", folder / f"pair-3/{model}/rate-0.01")
    study = study_of(folder)
    assert study.rates[-1] == "0.01"
    assert all_left_out(study) == []


def test_a_rate_is_the_same_however_it_is_written(tmp_path):
    folder = write_study(tmp_path / "study")
    expected = study_of(folder).main_difference("rise of held-out loss").estimate
    (folder / "pair-2/stack/rate-0.001").rename(folder / "pair-2/stack/rate-1e-3")
    study = study_of(folder)
    assert study.rates == list(RATES)
    assert study.main_difference("rise of held-out loss").estimate == expected


def test_a_chain_outside_a_folder_of_a_rate_is_named_and_changes_nothing(tmp_path):
    """As `make train` leaves one in the folder in which an experiment with rates then runs."""
    folder = write_study(tmp_path / "study", pairs=(0,))
    expected = study_of(folder).main_difference("rise of held-out loss").estimate
    for model in ("llm", "stack"):
        shutil.copytree(folder / model / "rate-0.001/m1-simp", folder / model / "m1-simp")
    study = study_of(folder)
    assert study.rates == list(RATES)
    assert study.main_difference("rise of held-out loss").estimate == expected
    assert study.left_out == ["llm, m1-simp: not used, since it is not in the folder of a learning rate",
                              "stack, m1-simp: not used, since it is not in the folder of a learning rate"]
    shutil.rmtree(folder / "llm/rate-0.001")
    assert all_left_out(study_of(folder))[2:] == [
        f"the pair, stack − llm after {stage}: llm lacks results at the rate 0.001"
        for stage in ("m1-simp", "m2-empd")]


def change_items(path, change):
    """Changes the losses of the items in a losses file, and its totals."""
    found = read_json(path)
    items = found["items"]
    items["nll"] = change(np.array(items["nll"]), np.array(items["tokens"])).tolist()
    path.write_text(json.dumps(found | total_losses(items)))


def test_a_single_rate_is_not_matched(tmp_path):
    study = study_of(write_study(tmp_path / "study", rates=("0.001",)))
    assert not study.matches_learning
    assert study.main_difference("rise of held-out loss").setting == ""
    assert study.main_difference("rise of held-out loss").estimate.n == 4


def test_the_control_at_equal_loss_replaces_one_model_of_each_pair(tmp_path):
    folder = write_study(tmp_path / "study", models=("llm", "stack", "llm-level", "interleave"))
    for path in (folder / "pair-4/llm-level").rglob("m*"):
        if path.is_dir():
            path.rename(path.with_name(f"gone-{path.name}"))
    study = study_of(folder)
    assert list(map(str, study.contrasts)) == ["stack − llm", "stack − llm, m0 of nearly equal loss",
                                               "interleave − llm"]
    control = study.contrasts[1]
    assert study.models_of(control, 1) == ("stack", "llm-level")
    assert study.models_of(control, 4) is None
    assert list(study.difference(control, "rise of held-out loss", 2).by_pair) == [1, 2, 3]
    assert study.start_losses(study.contrasts[0])[1] == pytest.approx((4.8, 5.0))
    assert study.start_losses(control)[1] == pytest.approx((4.8, 4.8))
    assert 4 not in study.start_losses(control)
    path = folder / "pair-2/llm-level/m0/eval/losses-text.json"
    change_items(path, lambda nll, tokens: nll + 0.06 * tokens)  # training on has not reached the loss of stack
    study = study_of(folder)
    assert list(study.difference(control, "rise of held-out loss", 2).by_pair) == [1, 3]
    assert ("pair 2: llm-level is not used as the control at equal held-out loss, since its m0 differs from that of "
            "stack by +0.060 nats per token") in all_left_out(study)
    assert study_of(folder).models_of(Contrast("interleave", "llm", equal_loss=True), 1) is None  # level with stack


def test_only_like_losses_are_compared(tmp_path):
    folder = write_study(tmp_path / "study", rates=("0.001",))
    path = folder / "pair-2/stack/m2-empd/eval/losses-text.json"
    found = read_json(path)
    found["run"]["dtype"] = "bf16"
    path.write_text(json.dumps(found))
    study = study_of(folder)
    assert list(study.main_difference("rise of held-out loss").by_pair) == [1, 3, 4]
    assert study.left_out == ["pair 2, stack, m2-empd: losses of text under other conditions, not used: dtype bf16 "
                              "(elsewhere fp32)"]


def test_the_kl_counts_from_the_own_m0(tmp_path):
    folder = write_study(tmp_path / "study", rates=("0.001",))
    reference = folder / "pair-1/stack/m0"
    for pair in (1, 2):
        path = folder / f"pair-{pair}/stack/m1-simp/eval/losses-text.json"
        found = read_json(path)
        found["run"]["reference_digest"] = digest_of(reference)
        path.write_text(json.dumps(found))
    study = study_of(folder)
    assert list(study.main_difference("KL on held-out text", 1).by_pair) == [1, 3, 4]
    assert list(study.main_difference("rise of held-out loss", 1).by_pair) == [1, 2, 3, 4]
    assert study.left_out == ["pair 2, stack, m1-simp: the KL of text is not used, since it was measured from another "
                              "checkpoint than m0"]


def test_seeds_of_a_pair_are_averaged(tmp_path):
    pair = write_study(tmp_path / "study", pairs=(1, 2), rates=("0.001",)) / "pair-1"
    for stage in (*pair.glob("*/m1-simp"), *pair.glob("*/m2-empd")):
        shutil.copytree(stage, stage.parent / "seed-43" / stage.name)
    text, name = pair / "llm/seed-43/m2-empd/eval/losses-text.json", "rise of held-out loss"
    one = study_of(tmp_path / "study").values(name, 1, "llm", "", 2)
    change_items(text, lambda nll, tokens: nll + 0.1 * tokens)
    assert study_of(tmp_path / "study").values(name, 1, "llm", "", 2).value == pytest.approx(one.value + 0.05)
    text.unlink()
    study = study_of(tmp_path / "study")
    assert study.values(name, 1, "llm", "", 2) is None
    assert list(study.main_difference(name).by_pair) == [2]


@pytest.mark.parametrize(("lacking", "said"), [("stack/*", "stack at the rate 0.0003 lacks it"),
                                               ("llm/rate-0.003", "llm at the rate 0.003 lacks it")])
def test_a_seed_counts_where_all_models_of_a_pair_have_it_at_all_rates(tmp_path, lacking, said):
    """As in an experiment that was stopped: with the other seed the difference would be that of a single model."""
    folder, name = write_study(tmp_path / "study", pairs=(1, 2)), "rise of held-out loss"
    expected = study_of(folder).main_difference(name).estimate.values
    chains = set(folder.glob("pair-1/*/rate-*")) - set(folder.glob(f"pair-1/{lacking}"))
    for chain in chains:
        for stage in list(chain.iterdir()):
            shutil.copytree(stage, chain / "seed-43" / stage.name)
        change_items(chain / "seed-43/m2-empd/eval/losses-text.json", lambda nll, tokens: nll + tokens)
    study = study_of(folder)
    assert study.main_difference(name).estimate.values == expected
    assert study.left_out == [f"pair 1: fine-tuning seed 43 is not used, since {said}"]


def test_a_control_without_a_seed_of_the_compared_models_is_left_out(tmp_path):
    """The seed stays in the comparison of the others."""
    name = "rise of held-out loss"
    folder = write_study(tmp_path / "study", pairs=(1, 2), models=("llm", "stack", "base"))
    for chain in (*folder.glob("pair-1/llm/rate-*"), *folder.glob("pair-1/stack/rate-*")):
        for stage in list(chain.iterdir()):
            shutil.copytree(stage, chain / "seed-43" / stage.name)
        if chain.parent.name == "stack":
            change_items(chain / "seed-43/m2-empd/eval/losses-text.json", lambda nll, tokens: nll + tokens)
    study = study_of(folder)
    first, second = (study_of(folder).difference(Contrast(model, "llm"), name, 2) for model in ("stack", "base"))
    expected = study_of(write_study(tmp_path / "one", pairs=(1, 2))).main_difference(name)
    assert first.by_pair[1].value == pytest.approx(expected.by_pair[1].value + 0.5)
    assert list(second.by_pair) == [2]
    assert study.left_out == [f"pair 1: base at the rate {rate} is not used, since it lacks the fine-tuning seed 43"
                              for rate in RATES]


def test_a_seed_that_is_not_finished_leaves_its_pair_out(tmp_path):
    folder = write_study(tmp_path / "study", pairs=(1, 2))
    for chain in folder.glob("pair-1/*/rate-*"):
        for stage in list(chain.iterdir()):
            shutil.copytree(stage, chain / "seed-43" / stage.name)
        if chain.parent.name == "stack":
            shutil.rmtree(chain / "seed-43/m2-empd")
    study = study_of(folder)
    assert list(study.main_difference("rise of held-out loss", 1).by_pair) == [1, 2]
    assert list(study.main_difference("rise of held-out loss").by_pair) == [2]
    assert all_left_out(study) == ["pair 1 is left out of stack − llm after m2-empd: stack lacks results of one seed "
                                    "or of all"]


def test_rates_ascend_as_numbers():
    stages = [Stage("llm", 42, 1, "m1", rate=rate) for rate in ("0.0001", "2e-05", "0.001", "5e-05")]
    assert rates_of(stages) == ["2e-05", "5e-05", "0.0001", "0.001"]


def test_items_count_by_their_tokens(study):
    found = study.main_difference("rise of held-out loss")
    values = np.array([one.values for one in found.by_pair.values()])
    means = values.mean(axis=1)
    by_tokens, alike = (variance_components(means, values - means[:, None] * weights).of_item
                        for weights in (TOKENS / TOKENS.mean(), 1.0))
    assert found.components.of_item == pytest.approx(by_tokens)
    assert by_tokens != pytest.approx(alike)


def test_losses_of_earlier_tasks_by_hand():
    def losses(loss, items):
        return ItemLosses(np.full(items, 2 * loss), np.full(items, 2.0), None, {})

    chain, items = {0: Stage("llm", 42, 0, "m0")}, {"a": 2, "b": 4}
    for number, measured in ((1, {"a": 2.0}), (2, {"a": 2.4, "b": 3.0}), (3, {"a": 2.1, "b": 3.3})):
        chain[number] = Stage("llm", 42, number, f"m{number}", " abc"[number],
                              losses={name: losses(loss, items[name]) for name, loss in measured.items()})
    assert rise_of_earlier_tasks(chain, 3).value == pytest.approx((0.1 + 0.3) / 2)
    assert rise_of_earlier_tasks(chain | {3: dataclasses.replace(chain[3], task="a")}, 3).value == pytest.approx(0.3)
    del chain[2].losses["b"]
    assert rise_of_earlier_tasks(chain, 3) is None
