"""The report of a study: the answer first, the differences, and what the results cannot say."""
import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest

import report
from analysis import pair_answer, record_figures
from analysis.difference_text import with_interval
from analysis.inference import PairedDifference
from analysis.measures import primary_file, write_primary
from analysis.pairs import Study
from analysis.record import Record
from analysis.results import read_runs
from common.files import UserError, read_json
from evaluation.result_files import write_losses
from report import ReportConfig
from tests.analysis.studies import RATES, digest_of, losses_of, write_study
from tests.analysis.test_report import cells, make_report


def first_lines(text):
    """The sentences at the top of a report."""
    return [line.removeprefix("- ") for line in text.split("\n\n")[1].splitlines()]


def numbers(text):
    """The numbers in a text."""
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*(?:e-?\d+)?", text)]


def test_the_answer_comes_first(tmp_path):
    text = make_report(tmp_path / "out", runs=write_study(tmp_path / "runs"))
    answer, uncertainty, data, decrease, start = first_lines(text)
    values = np.array([2 * (np.random.default_rng([pair, 7]).normal(0, 0.02) - 0.1) for pair in (1, 2, 3, 4)])
    mean, half = values.mean(), 3.18245 * values.std(ddof=1) / 2
    assert answer.startswith("stack forgets less than llm: at equal new-task loss, the rise of held-out loss after "
                             "m2-empd (primary measure) differs by ")
    assert numbers(answer.split("differs by")[1])[:3] == pytest.approx([mean, mean - half, mean + half], abs=6e-3)
    assert answer.endswith("n = 4 pairs).")
    assert uncertainty.startswith("4 pairs find a true difference of ")
    assert "one of 0.05 takes 25 pairs" in uncertainty
    assert data == "Data: 4 pairs (pretraining seeds 1, 2, 3, 4), 24 items, learning rates 0.0003, 0.001, 0.003."
    assert start.startswith("Held-out loss before fine-tuning: stack 4.8000, llm 5.0000 nats/token; difference -0.200.")
    assert text.index("stack forgets less") < text.index("## Differences between the models")


def test_one_measure_is_primary_and_the_others_are_corrected(tmp_path):
    runs = write_study(tmp_path / "runs", models=("llm", "stack", "llm-level", "interleave"))
    text = make_report(tmp_path / "out", runs=runs)
    table = [cells(line) for line in text.split("## Differences between the models")[1].split("## ")[0].splitlines()
             if line.startswith("| ")][1:]
    assert [row[0] for row in table if "(primary)" in row[0]] == ["rise of held-out loss (primary)"]
    assert table[0][7] == "–"
    assert {row[2] for row in table} == {"stack − llm", "stack − llm, m0 of nearly equal loss",
                                         "interleave − llm"}
    learning = next(row for row in table if row[0] == "new-task loss")
    assert learning[3:6] == ["rate 0.001", "4", "-0.150"]
    control = next(row for row in table if row[0] == "rise of held-out loss" and row[2].endswith("equal loss"))
    tested = sum(row[6] != "–" for row in table[1:])
    assert float(control[7]) == pytest.approx(min(1, tested * float(control[6])), rel=0.1)
    assert "With m0 of nearly equal held-out loss (remaining difference 0), it differs by -0." in text
    assert "| stack − llm | held-out text | 4 | 4.8000 | 5.0000 | -0.200 |" in text
    assert "| stack − llm | empd | 4 | 3.2000 | 3.2000 | 0 | – |" in text
    assert "| stack − llm, m0 of nearly equal loss | held-out text | 4 | 4.8000 | 4.8000 | 0 " in text
    assert re.search(r"^\| stack − llm, m0 of nearly equal loss \| m1-simp \| rate 0\.001 \| 4 \| ", text, re.MULTILINE)
    assert "| quiz | llm | 160 | 16 | 0 |" in text  # four of 40 items in each pair


@pytest.mark.parametrize(("values", "text"), [
    ((0.13049,), "+0.130"), ((1234.5,), "+1.23e+03"), ((0.2, 0.2), "+0.200"), ((0.0, 0.0), "0"),
    # half widths by hand, t(1) = 12.706, t(2) = 4.3027: 1.2706, 0.13, 0.00098, 127.06 and 0.1245
    ((0.1, 0.3), "+0.2 [-1.1, +1.5]"), ((0.03, 0.08, 0.135), "+0.08 [-0.05, +0.21]"),
    ((0.0004, 0.001, 0.00115), "+0.00085 [-0.00014, +0.00184]"), ((100.0, 120.0), "+110 [-17, +237]"),
    ((0.0751, 0.125, 0.1755), "+0.1252 [+0.0005, +0.2499]"),
    ((0.0694, 0.1194, 0.1694), "+0.119 [-0.005, +0.244]")])
def test_an_interval_has_as_many_decimals_as_it_tells(values, text):
    assert with_interval(PairedDifference(values)) == text


def test_a_null_result_says_what_would_have_been_found(tmp_path):
    study = Study(read_runs(write_study(tmp_path / "runs", effect=0.0)), "stack", "llm")
    answer, uncertainty, *_ = pair_answer.answer(study, "rise of held-out loss", 0.02)
    assert answer.startswith("stack and llm cannot be told apart: ")
    assert re.search(r"a true difference of (0\.\d+) nats/token \((0\.\d+) to (0\.\d+) over the 95% interval of the "
                     r"standard deviation\) with 80% power; one of 0.02 takes (\d+) pairs \((\d+) to ([\d,]+)\)",
                     uncertainty)


def test_equal_differences_of_all_pairs_give_no_test(tmp_path):
    with mock.patch("tests.analysis.studies.SPREAD", 0.0):
        runs = write_study(tmp_path / "runs")
    text = make_report(tmp_path / "out", runs=runs)
    assert "There is no test: the difference is the same in all pairs." in text
    assert "find a true difference" not in text
    assert re.search(r"\| rise of held-out loss \(primary\) .*\| – \| – \|\n", text)


def test_only_the_measure_named_before_the_first_run_is_primary(tmp_path):
    runs = write_study(tmp_path / "runs")
    write_primary(primary_file(runs), "KL on the new task")
    first, *_ = first_lines(text := make_report(tmp_path / "out", runs=runs))
    assert "the KL on the new task after m2-empd (primary measure) differs by" in first
    assert first.startswith("stack and llm cannot be told apart: ")
    assert "| KL on the new task (primary) |" in text
    again = make_report(tmp_path / "again", results=tmp_path / "out/stages.csv")
    assert first_lines(again)[0] == first
    first, *_ = first_lines(text := make_report(tmp_path / "out", runs=runs, primary="rise of held-out loss"))
    assert ("rise of held-out loss after m2-empd (not the primary measure, which was named before the first run: KL on "
            "the new task) differs by") in first
    assert first.startswith("stack compared with llm: ")  # no verdict, since other measures could have been chosen
    assert ", not corrected for the number of measures, n = " in first
    assert "(primary)" not in text
    row = cells(next(line for line in text.splitlines() if line.startswith("| rise of held-out loss | nats/token")))
    assert float(row[7].removeprefix("< ")) >= float(row[6].removeprefix("< "))
    assert row[7] != "–"  # corrected as all others


def test_a_measure_that_is_not_known_to_have_been_named_is_not_primary(tmp_path):
    """A table of stages does not say which one was."""
    make_report(tmp_path / "out", runs=write_study(tmp_path / "runs"))
    for primary, role in (("rise of held-out loss", "primary measure"),
                          ("KL on the new task", "chosen for this report")):
        first, *_ = first_lines(make_report(tmp_path / "again", results=tmp_path / "out/stages.csv", primary=primary))
        assert f"{primary} after m2-empd ({role}" in first


def test_a_pair_without_one_of_the_models_is_named(tmp_path):
    runs = write_study(tmp_path / "runs")
    shutil.rmtree(runs / "pair-2/stack")
    text = make_report(tmp_path / "out", runs=runs)
    assert "- pair 2 is left out of stack − llm: stack has no fine-tuned stages in it" in text
    assert "; left out: pair 2, see What is missing." in text


def test_models_that_were_not_fine_tuned_have_a_report(tmp_path):
    runs = write_study(tmp_path / "runs", pairs=(1, 2))
    for stage in runs.glob("pair-*/*/rate-*"):
        shutil.rmtree(stage)
    report.main(ReportConfig(runs=str(runs), out=str(tmp_path / "out")))
    assert "There is no answer by the " in (tmp_path / "out/report.md").read_text()


def test_one_pair_cannot_answer(tmp_path):
    for pairs in ((1,), (0,)):
        runs = write_study(tmp_path / f"runs{pairs[0]}", pairs=pairs, rates=RATES[:1])
        first, second, *_ = first_lines(make_report(tmp_path / "out", runs=runs))
        assert first == ("One pair of models cannot answer whether stack forgets less than llm: pairs differ, and the "
                         "pair is the unit. Intervals are over the items and seeds of this pair, and not corrected for "
                         "their number.")
        assert "at one learning rate (learning not matched), the rise of held-out loss" in second
        assert "n = " not in second


def test_a_pair_that_only_one_model_has_changes_no_comparison(tmp_path):
    runs = write_study(tmp_path / "runs", pairs=(1, 2, 3))
    shutil.rmtree(runs / "pair-3/stack")
    write_losses(runs / "pair-3/llm/m0/eval", "text", "text", losses_of(9.0, "x"), {
        "dtype": "fp32", "limit": None, "data_digest": "d", "tokenizer_digest": "t"})
    text = make_report(tmp_path / "out", runs=runs)
    assert "Data: 2 pairs (pretraining seeds 1, 2)" in text
    assert "Held-out loss before fine-tuning: stack 4.8000, llm 5.0000 nats/token" in text
    assert "| llm | 0.0003 | 3 |" in text
    assert "| stack | 0.0003 | 2 |" in text


def test_a_control_whose_held_out_loss_is_unknown_is_not_used(tmp_path):
    runs = write_study(tmp_path / "runs", pairs=(1, 2), models=("llm", "stack", "llm-level"))
    measure = "KL on the new task"
    assert "m0 of nearly equal loss" in make_report(tmp_path / "out", runs=runs, primary=measure)
    for path in runs.glob("pair-*/llm-level/m0/eval/losses-text.json"):
        path.unlink()
    text = make_report(tmp_path / "out", runs=runs, primary=measure)
    assert "m0 of nearly equal loss" not in text
    assert "- pair 1: llm-level is not used as the control at equal held-out loss, since the held-out loss of its m0" \
        ", or of that of stack, is unknown" in text


def test_other_tokens_are_other_conditions_and_other_files_of_a_tokenizer_are_not(tmp_path):
    """Two programs may write one tokenizer with other side files."""
    runs = write_study(tmp_path / "runs", pairs=(1, 2))
    expected = first_lines(make_report(tmp_path / "out", runs=runs))
    for more, found in ((0, expected), (1, ["There is no answer by the rise of held-out loss"])):
        for path in runs.glob("pair-*/stack/**/losses-text.json"):
            losses = json.loads(path.read_text())
            losses["items"]["bytes"] = [value + more for value in losses["items"]["bytes"]]
            write_losses(path.parent, "text", "text", losses["items"], losses["run"] | {"tokenizer_digest": "other"})
        lines = first_lines(make_report(tmp_path / "out", runs=runs))
        assert [line[:len(start)] for line, start in zip(lines, found)] == found


def test_the_answer_rests_on_one_set_of_pairs(tmp_path):
    """A pair that is not fine-tuned yet changes neither the losses of m0 nor what remains of the control."""
    runs = write_study(tmp_path / "runs", pairs=(1, 2, 3), models=("llm", "stack", "llm-level"))
    expected = first_lines(make_report(tmp_path / "out", runs=runs))
    for model, loss in (("llm", 5.0), ("stack", 5.8), ("llm-level", 5.1)):
        shutil.copytree(runs / "pair-3" / model / "m0", runs / "pair-4" / model / "m0")
        write_losses(runs / "pair-4" / model / "m0/eval", "text", "text", losses_of(loss, "x"), {
            "dtype": "fp32", "limit": None, "data_digest": "d", "tokenizer_digest": "t"})
    found = first_lines(make_report(tmp_path / "out", runs=runs))
    assert [line.replace("; left out: pair 4, see What is missing.", ".") for line in found] == expected


def test_tables_and_captions_name_the_rate_and_the_pairs_of_each_model(tmp_path):
    runs = write_study(tmp_path / "runs", pairs=(1, 2))
    shutil.rmtree(runs / "pair-2/stack")
    text = make_report(tmp_path / "out", runs=runs)
    spread = "95% interval from the standard errors and the spread of the pairs"
    assert "FG at the learning rate 0.001 in percent of the start, mean over the stages; positive is forgetting. " \
        f"In brackets the {spread}." in text
    assert "| category | llm, 2 pairs | stack, 1 pair |" in text
    record = Record([stage for stage in read_runs(runs) if stage.rate in (None, RATES[1])])
    with mock.patch.object(record_figures, "save_figure"):
        captions = record_figures.plot_record(record, tmp_path)
    assert captions["benchmarks"] == f"Each benchmark over the stages at the learning rate 0.001, with the {spread}."


def test_unequal_flops_are_told(tmp_path):
    runs = write_study(tmp_path / "runs", pairs=(1, 2), rates=RATES[:1])
    for flops, said in ((2.0e15, True), (1.01e15, False)):
        for model, value in (("llm", 1.0e15), ("stack", flops)):
            for path in runs.glob(f"pair-*/{model}/m0/run.json"):
                path.write_text(json.dumps(read_json(path) | {"lineage": {"flops": value}}))
        lines = pair_answer.answer(Study(read_runs(runs), "stack", "llm"), "rise of held-out loss", 0.05)
        assert ("The FLOPs before fine-tuning are not equal: stack 2e+15, llm 1e+15." in lines) == said
        assert ("at equal FLOPs and one learning rate" in lines[0]) == (not said)


def test_a_mean_over_fewer_pairs_says_so(tmp_path):
    runs = write_study(tmp_path / "runs", pairs=(1, 2, 3), rates=RATES[:1])
    (runs / "pair-2/llm/m2-empd/eval/losses-text.json").unlink()
    text = section(make_report(tmp_path / "out", runs=runs), "Forgetting and learning by model")
    head, llm, stack = (cells(line) for line in text.splitlines() if line.startswith("| ") and "---" not in line)
    rise, learned = head.index("rise of held-out loss"), head.index("new-task loss")
    assert (llm[2], llm[rise].split(maxsplit=1)[1]) == ("3", "(of 2)")
    assert "(of" not in llm[learned] + stack[rise]


def test_runs_that_were_not_fine_tuned_alike_are_named(tmp_path):
    """The answer says "one learning rate" only if the runs had one."""
    runs = write_study(tmp_path / "runs", pairs=(1, 2, 3), rates=RATES[:1])
    first, *others = first_lines(make_report(tmp_path / "alike", runs=runs))
    assert "at one learning rate (learning not matched)" in first
    assert not any("alike" in line for line in others)
    first, *_ = first_lines(make_report(tmp_path / "table", results=tmp_path / "alike/stages.csv"))
    assert "unknown learning rates (learning not matched)" in first
    for path in runs.glob("*/*/m1-simp/run.json"):
        run, is_other = read_json(path), "stack" in path.parts and "pair-3" not in path.parts
        if is_other:
            run["settings"] |= {"learning_rate": 0.01, "num_train_epochs": 3.0, "weight_decay": 0.1}
        path.write_text(json.dumps(run | {"data_digest": "b" if is_other else "a"}))
    first, *others = first_lines(text := make_report(tmp_path / "out", runs=runs))
    assert "at learning rates from 0.0003 to 0.01 (learning not matched)" in first
    assert any(line.startswith("Not all of these runs were fine-tuned alike") for line in others)
    run = read_json(path := runs / "pair-3/stack/m2-empd/run.json")
    path.write_text(json.dumps(run | {"settings": run["settings"] | {"adam_beta2": 0.5, "seed": 42, "zero": 3}}))
    path = runs / "pair-1/llm/m2-empd/run.json"
    path.write_text(json.dumps(run | {"settings": run["settings"] | {"adam_beta2": 0.9, "zero": 1}}))
    study = Study(read_runs(runs), "stack", "llm")
    assert "pair 3, stack, m2-empd: not trained as pair 1, llm, m2-empd: adam_beta2 0.5 and 0.9" in \
        study.trained_otherwise
    assert ("- pair 1, stack, m1-simp; pair 2, stack, m1-simp: not trained as pair 1, llm, m1-simp: data b and a, "
            "learning_rate 0.01 and 0.0003, num_train_epochs 3.0 and 1.0\n") in text


def section(text, title):
    """A section of a report."""
    return text.split(f"## {title}\n")[1].split("## ")[0]


def test_models_and_pairs_without_results_change_no_table(tmp_path):
    """A model trained by `make train` beside the pairs, and a pair whose training goes on."""
    runs = write_study(tmp_path / "runs", pairs=(1, 2), rates=RATES[:1])
    expected = make_report(tmp_path / "out", runs=runs)
    for stage in ("m0", "m1-simp"):
        shutil.copytree(runs / f"pair-1/stack/{stage}", runs / f"stack/{stage}",
                        ignore=shutil.ignore_patterns("eval"))
    for model in ("llm", "stack"):
        shutil.copytree(runs / f"pair-1/{model}/m0", runs / f"pair-3/{model}/m0")
    text = make_report(tmp_path / "out", runs=runs)
    for title in ("Forgetting by category", "Benchmarks by stage: stack", "Differences between the models"):
        assert section(text, title) == section(expected, title), title
    assert "– |" not in section(text, "Benchmarks by stage: stack")
    assert "- stack has no results\n" in section(text, "What is missing")
    assert "- stack, pair 3, seed 42: the stage m1-simp is missing\n" in section(text, "What is missing")


def test_stages_of_another_m0_or_another_stage_before_them_are_not_used(tmp_path):
    """As when m0 or a stage is trained again and the later stages stay."""
    runs = write_study(tmp_path / "runs", pairs=(1, 2), rates=RATES[:1])
    for path in runs.glob("pair-*/*/m?-*/run.json"):
        m0, m1 = (path.parents[1] / name for name in ("m0", "m1-simp"))
        before = m0 if path.parent == m1 else m1
        write = {"lineage": {"start": {"init": "m0", "digest": digest_of(m0)}}, "parent_digest": digest_of(before)}
        path.write_text(json.dumps(read_json(path) | write))
    text = make_report(tmp_path / "out", runs=runs)
    assert "is not used: it was not trained" not in text
    for model, change in (("llm", {"lineage": {"start": {"init": "m0", "digest": "other"}}}),
                          ("stack", {"parent_digest": "other"})):
        path = runs / f"pair-2/{model}/m2-empd/run.json"
        path.write_text(json.dumps(read_json(path) | change))
    text = make_report(tmp_path / "out", runs=runs)
    for model in ("llm", "stack"):
        assert (f"- {runs}/pair-2/{model}/m2-empd is not used: it was not trained from the checkpoint that now lies "
                "before it in its chain\n") in section(text, "What is missing")
    assert "Data: 1 pair (pretraining seeds 1)" in text


def test_a_pair_without_a_common_range_is_named(tmp_path):
    runs = write_study(tmp_path / "runs")
    for rate in RATES[1:]:
        shutil.rmtree(runs / f"pair-2/llm/rate-{rate}")
    text = make_report(tmp_path / "out", runs=runs)
    assert "Data: 3 pairs (pretraining seeds 1, 3, 4)" in text
    assert "left out: pair 2, see What is missing." in text
    missing = text.split("## What is missing")[1]
    assert ("pair 2 is left out of stack − llm after m2-empd: the models reach no common new-task loss "
            "(stack 2.2500 to 2.6500, llm 2.8000 to 2.8000 nats per token)") in missing
    assert "| stack − llm | new-task loss | 3 of 4 |" in text


def test_a_study_without_the_primary_measure_gives_no_answer(tmp_path):
    runs = write_study(tmp_path / "runs", rates=RATES[:1])
    for path in runs.rglob("losses-text.json"):
        path.unlink()
    text = make_report(tmp_path / "out", runs=runs)
    assert first_lines(text)[0] == ("There is no answer by the rise of held-out loss after m2-empd (primary measure): "
                                    "no pair has it for both models.")
    assert "| rise of earlier tasks' losses | nats/token | stack − llm | not matched | 4 |" in text
    text = make_report(tmp_path / "out", runs=runs, primary="KL on the new task")
    assert "the KL on the new task after m2-empd (chosen for this report, and not known to have been named" in text


@pytest.mark.parametrize(("options", "message"), [
    ({"primary": "accuracy"}, "unknown measure 'accuracy' of forgetting, expected one of rise of held-out loss, "),
    ({"primary": "new-task loss"}, "unknown measure 'new-task loss' of forgetting"),
    ({"rate": 0.5}, "unknown rate 0.5, expected one of 0.0003, 0.001, 0.003")])
def test_unknown_settings_are_refused(tmp_path, options, message):
    runs = write_study(tmp_path / "runs", pairs=(1, 2))
    with pytest.raises(UserError, match=message):
        report.main(ReportConfig(runs=str(runs), out=str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


def test_one_pair_of_any_lm_eval_results(tmp_path):
    for model, values in (("llm", (0.6, 0.5)), ("stack", (0.62, 0.58))):
        for number, value in enumerate(values):
            folder = tmp_path / f"results/{model}/m{number}"
            folder.mkdir(parents=True)
            results = {"piqa": {"acc,none": value, "acc_stderr,none": 0.01},
                       "boolq": {"acc,none": 0.5, "acc_stderr,none": 0.02}}
            (folder / "results_1.json").write_text(json.dumps({"results": results}))
    text = make_report(tmp_path / "out", results=tmp_path / "results")
    assert "- boolq: its forgetting is noise, since it is 0.5 for all models and stages" in text
    assert "piqa: its" not in text
    assert "One pair of models cannot answer" in first_lines(text)[0]


def test_categories_that_are_left_out_have_no_measures(tmp_path):
    runs = write_study(tmp_path / "runs")
    for path in list(runs.rglob("results_1.json")):
        results = read_json(path)
        suite = [results["run"]["suite"][0] | {"name": "puzzle", "category": "RC"}]
        path.with_name("results_2.json").write_text(json.dumps({
            "run": {"suite": suite}, "results": {"puzzle": results["results"]["quiz"]}}))
        shutil.copy(path.with_name("samples_quiz_1.jsonl"), path.with_name("samples_puzzle_2.jsonl"))
    for settings, expected in (({}, {"DK", "RC"}), ({"categories": ("DK",)}, {"DK"})):
        text = make_report(tmp_path / "out", runs=runs, **settings)
        assert set(re.findall(r"loss of accuracy, (\w+)", text)) == expected
    write_primary(primary_file(runs), "loss of accuracy, RC")
    with pytest.raises(UserError, match="do not have loss of accuracy, RC, the primary measure that the experiment"):
        make_report(tmp_path / "out", runs=runs, categories=("DK",))
