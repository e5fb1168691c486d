"""The report script."""
import json
import re
import shutil
import sys
from dataclasses import replace
from unittest import mock

import pytest

import report
from analysis.estimates import Estimate
from analysis.pages import write_pages
from analysis.results import read_runs
from analysis.stage_table import stage_table
from analysis.stages import Stage
from common import settings
from common.files import UserError
from pipeline.experiment_config import ExperimentConfig
from report import ReportConfig, shared_rates
from tests.analysis.conftest import VALUES, write_stage
from tests.analysis.studies import RATES, write_study
from tests.conftest import run_script


def make_report(out, **options):
    """The text of report.md, without figures, which take long."""
    with mock.patch("report.plot_record", return_value={}), mock.patch("report.plot_pairs", return_value={}):
        report.main(ReportConfig(out=str(out), **{name: value if isinstance(value, bool | tuple) else str(value)
                                                   for name, value in options.items()}))
    return (out / "report.md").read_text()


def cells(line):
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_models_are_compared_over_the_stages_that_both_have(runs, tmp_path):
    (runs / "stack/m2-empd").rename(runs / "gone")
    text = make_report(tmp_path / "out", runs=runs)
    assert "FG, DK: in this pair stack forgot less than llm (-20.0 points" in text
    assert re.search(r"\| DK \| 20\.0 \[\S+ \S+ \| 0\.0 \[\S+ \S+ \| -20\.0 \[\S+ \S+ \(part\) \|", text)
    assert "- stack: the stage m2-empd is missing" in text.split("## What is missing")[1]
    assert "Backward transfer: not compared" in text
    assert "| average performance | 40.00 [38.61, 41.39] | – | – |" in text  # after m2: simp 30, empd 50


def test_no_forgetting_is_claimed_of_benchmarks_that_start_at_chance(tmp_path):
    for model, ends in (("llm", (0.20, 0.50)), ("stack", (0.30, 0.60))):
        for stage, values in (("m0", (0.25, 0.70)), ("m1-simp", ends)):
            (tmp_path / model / stage).mkdir(parents=True)
            (tmp_path / model / stage / "results_1.json").write_text(json.dumps({"results": {
                name: {"acc,none": value, "acc_stderr,none": 0.01}
                for name, value in zip(("mmlu_stem", "race"), values)}}))
    text = make_report(tmp_path / "out", results=tmp_path)
    assert "FG, DK: the difference is -40.0 points" in text
    assert "but 1 of its 1 benchmarks cannot show forgetting (see Metrics whose forgetting is noise)." in text
    assert "FG, RC: in this pair stack forgot less than llm (-14.3 points" in text


def test_commands_are_listed_in_the_order_of_the_stages(runs, tmp_path):
    for name in ("llm-m1-simp-eval", "llm-m1-simp", "llm-m0-eval", "llm-m0", "llm-m9-left-over"):
        path = runs / f"experiment/{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"command": ["train.py", "--made", name]}))
    text = make_report(tmp_path / "out", runs=runs)
    assert re.findall(r"--made (\S+)", text) == ["llm-m0", "llm-m0-eval", "llm-m1-simp", "llm-m1-simp-eval"]
    assert "python train.py --task empd" in text  # a stage without a recorded command


def test_a_single_model_is_reported_but_not_compared(tmp_path):
    for number, value in enumerate((0.5, 0.4)):
        (tmp_path / f"runs/stack/m{number}").mkdir(parents=True)
        (tmp_path / f"runs/stack/m{number}/results_1.json").write_text(json.dumps(
            {"results": {"piqa": {"acc,none": value, "acc_stderr,none": 0.1}}}))
    with pytest.raises(UserError, match="unknown model llm2, expected some of stack"):
        make_report(tmp_path / "out", results=tmp_path / "runs", grown="stack", reference="llm2")
    text = make_report(tmp_path / "out", results=tmp_path / "runs")
    assert "- The models are stack." in text
    assert "| Rs | 20.0 [" in text


def test_pages_and_figures(runs, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.md").write_text("# Forgetting: earlier\n\n![Of pairs](by-start.png)\n\n![Losses](losses.png)\n")
    for name in ("by-start.png", "by-start.svg", "mine.png"):
        (out / name).write_text("")
    printed = run_script("report.py", "--runs", runs, "--out", out).stdout
    assert re.search("FG, Rs: (stack and llm cannot be told apart|in this pair stack forgot less)", printed)
    text, page = ((out / f"report.{ending}").read_text() for ending in ("md", "html"))
    assert re.search(r"\| DK \| 30\.0 \[\S+ \S+ \| 0\.0 \[\S+ \S+ \| -30\.0 \[", text)
    assert "FG, DK: in this pair stack forgot less than llm (-30.0 points" in text
    assert "Backward transfer: in this pair stack forgot less than llm (+8.0 points" in text
    assert "c0ffee" in text
    assert "python train.py --task simp" in text
    (out / "mine.png").unlink()  # while what was in the earlier report alone is gone
    names = {"benchmarks", "forgetting", "bias", "tasks", "losses", "calibration"}
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.svg")} == names
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)  # the page loads nothing
    assert "<table>" in page
    assert "| " not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda runs: (runs / "llm/m1-simp/eval/results_2.json").write_text(json.dumps(
        {"results": {"terms": {"acc,none": 0.41}}})),
     r"llm m1-simp has two results for terms that disagree: .*results_1.*results_2"),
    (lambda runs: [(runs / f"other/m0/eval/results_{name}.json").write_text(json.dumps(
        {"results": {"terms": {"acc,none": 0.5}}, "config": {"model_dtype": dtype}}))
        for name, dtype in (("1", "torch.bfloat16"), ("2", "torch.float32"))
        if (runs / "other/m0/eval").mkdir(parents=True, exist_ok=True) is None],
     r"that disagree: 0.5 in .*results_1.json, 0.5 in .*results_2.json, dtype bf16 and fp32. Remove one of the files"),
    (lambda runs: [path.unlink() for path in runs.rglob("eval/*")], "holds no evaluated runs"),
    (lambda runs: (runs / "loop").symlink_to(runs), "loop is a link to a folder that contains it: remove it"),
    (lambda runs: [(runs / "llm/m0/eval" / name).write_text(text) for name, text in (
        ("metrics-simp.json", '{"task": "simp", "samples": 2, "metrics": {}, "run": {}}'),
        ("predictions-simp.jsonl", '{"scores": {}}\n'))],
     r"predictions-simp.jsonl has 1 samples and .*metrics-simp.json is of 2: remove both, and evaluate the checkpoint"),
    (lambda runs: write_stage(runs / "other/llm", 0, VALUES["llm"][0], (1, 1)), "there are two stages 0 of llm"),
    (lambda runs: (runs / "llm/m0/eval/results_1.json").write_text("{}"), "is not a results file of lm-eval"),
    (lambda runs: None, "unknown category XX, expected some of DK, Rs, Bias")])
def test_errors(runs, tmp_path, spoil, message):
    spoil(runs)
    with pytest.raises(UserError, match=message):
        report.main(ReportConfig(runs=str(runs), out=str(tmp_path / "out"), categories=("XX",)))
    assert not (tmp_path / "out").exists()


def test_methods_are_compared_with_the_baseline(method_runs, tmp_path):
    text = make_report(tmp_path / "out", runs=method_runs)
    assert text.startswith("# Forgetting: llm; m0 to m2-empd; with the method finetune\n")
    levels, gaps = (part.splitlines() for part in text.split("## Methods: llm")[1].split("## Methods minus finetune"))
    assert cells(next(line for line in gaps if line.startswith("| method"))) == [
        "method", "FG DK", "FG Rs", "FG Bias", "average performance", "backward transfer",
        "forgetting from the best stage"]
    rows = {cells(line)[0]: cells(line) for line in levels if line.startswith("| ")}
    assert rows["averaged over posterior samples"][-3:] == ["0.040", "0.900", "–"]
    finetune, ewc = rows["finetune"], rows["ewc"]
    assert finetune[1].startswith("30.00 [")
    assert ewc[1].startswith("0.00 [")
    assert (finetune[5].split()[0], ewc[5].split()[0]) == ("-10.00", "-2.00")  # simp 40 to 30, 40 to 38
    assert finetune[-3:] == ["0.300", "1.000", "2.0"]  # both stages took a minute
    assert ewc[-1] == "3.0"
    # DK: each FG has the start's 0.02, times what is left of it, and the mean's over two stages, over 0.5
    error = 100 / 0.5 * 0.02 * (2 * 0.5 + 0.7 ** 2 + 1) ** 0.5
    assert cells(next(line for line in gaps if line.startswith("| ewc")))[1] == \
        f"-30.00 [{-30 - 1.96 * error:.2f}, {-30 + 1.96 * error:.2f}]"
    assert "- llm: one run of each method gives no verdict, since runs that differ only in their seed differ, too; " \
        "intervals are not corrected for the number of measures.\n- llm, ewc compared with finetune in one run of " \
        "each: better by FG DK (-30.00 [" in text
    assert "- llm, vcl-tau=0.5 compared with finetune in one run of each: nothing can be told apart from noise." in text


def test_the_method_and_the_baseline_can_be_chosen(method_runs, tmp_path):
    text = make_report(tmp_path / "out", runs=method_runs, method="ewc", baseline="ewc")
    assert text.startswith("# Forgetting: llm; m0 to m2-empd; with the method ewc\n")
    assert "llm, finetune compared with ewc in one run of each: worse by FG DK (+30.00" in text
    assert text.index("| ewc |") < text.index("| finetune |")
    cfg = settings.load(ReportConfig, ["--runs", str(method_runs), "--method", "ewc"], "")
    assert cfg.method == "ewc"  # configs/method/ewc.toml, which has settings of training, is not read
    with pytest.raises(UserError, match="unknown method 'best', expected one of finetune, ewc, vcl-tau=0.5"):
        make_report(tmp_path / "out", runs=method_runs, method="best")
    with pytest.raises(UserError, match="unknown baseline 'finetnue', expected one of ewc, finetune, vcl-tau=0.5"):
        make_report(tmp_path / "out", runs=method_runs, baseline="finetnue")


def test_runs_without_a_method_have_a_name_in_words(method_runs, tmp_path):
    stages = [replace(stage, method=None if stage.method == "finetune" else stage.method)
              for stage in read_runs(method_runs)]
    (tmp_path / "stages.csv").write_text(stage_table(stages))
    text = make_report(tmp_path / "out", results=tmp_path / "stages.csv")
    assert "- llm, ewc compared with fine-tuning without a method in one run of each: " in text
    assert "## Methods minus fine-tuning without a method: llm\n" in text


@pytest.mark.parametrize(("methods", "first"), [
    (("ewc", "finetune", None), "finetune"), (("ewc", None), "none"), (("lora", "ewc"), "ewc")])
def test_the_method_of_the_answer_is_named(tmp_path, methods, first):
    """Of stages with and without a method, none is shown without its name."""
    runs = write_study(tmp_path / "study", pairs=(1, 2), rates=RATES[:1])
    stages = [replace(stage, method=method) for stage in read_runs(runs)
              for method in (methods if stage.number else [None])]
    (tmp_path / "stages.csv").write_text(stage_table(stages))
    names = {str(method or "none") for method in methods}
    for flags, shown in (([], first), (["--method", "none"], "none"))[:1 + (None in methods)]:
        method = settings.load(ReportConfig, ["--runs", "x", *flags]).method
        text = make_report(tmp_path / "out", results=tmp_path / "stages.csv", method=method)
        others = ", ".join(sorted(names - {shown}, key=lambda name: (name != first, name)))
        how = "without a method" if shown == "none" else f"with the method {shown}"
        assert f"- The models were fine-tuned {how}; --method shows the others: {others}.\n- stack and" in text


def test_methods_are_compared_only_where_both_were_measured(method_runs, tmp_path):
    shutil.rmtree(method_runs / "llm/ewc/m2-empd")
    (method_runs / "llm/vcl-tau=0.5/m2-empd/eval/metrics-simp.json").unlink()
    text = make_report(tmp_path / "out", runs=method_runs)
    assert ("- llm, ewc compared with finetune in one run of each: better by FG DK (-20.00 [-34.96, -5.04] (part)); "
            "not compared, since they have no results in common: average performance, backward transfer, forgetting "
            "from the best stage."
            ) in text
    assert "- llm, vcl-tau=0.5: m2-empd lacks the test sets simp" in text
    row = next(line for line in text.split("## Methods minus")[1].splitlines() if line.startswith("| vcl"))
    assert cells(row)[1].startswith("+0.00 [")
    assert cells(row)[4:] == ["+0.00 [-2.77, +2.77] (part)", "–", "–"]  # average performance of empd alone


def test_stages_without_a_method_are_one_too(mixed_runs, tmp_path):
    with pytest.raises(UserError, match="unknown method 'x', expected one of finetune, ewc, none, rehearsal, vcl"):
        make_report(tmp_path / "out", runs=mixed_runs, method="x")


def change(name, old, new):
    """A function that replaces a text in a file of a folder of runs."""
    def spoil(runs):
        text = (runs / name).read_text()
        assert old in text
        (runs / name).write_text(text.replace(old, new, 1))
    return spoil


def write(name, text):
    """A function that writes a file into a folder of runs."""
    def spoil(runs):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(text)
    return spoil


RESULTS, METRICS, RUN = "llm/m1-simp/eval/results_1.json", "llm/m1-simp/eval/metrics-simp.json", "llm/m1-simp/run.json"


@pytest.mark.parametrize(("spoil", "message"), [
    (change(RESULTS, '"acc,none": 0.4', '"acc,none": Infinity'), f"{RESULTS} is not JSON: Infinity is not a finite"),
    (change(RESULTS, '"acc,none": 0.4', '"acc,none": NaN'), f"{RESULTS} is not JSON: NaN is not a finite"),
    (change(RESULTS, '"acc,none": 0.4', '"acc,none": 5.0'),
     f"{RESULTS}: terms: acc,none is 5.0, expected a number from 0 to 1"),
    (change(RESULTS, '"acc,none": 0.4', '"acc,none": true'), f"{RESULTS}: terms: acc,none is true, expected a number"),
    (change(RESULTS, '"acc,none": 0.4', '"acc,none": [0.4]'), f"{RESULTS}: terms: acc,none is [0.4], expected"),
    (change(RESULTS, '"acc_stderr,none": 0.02', '"acc_stderr,none": -1'), "acc_stderr,none is -1, expected at least 0"),
    (change(RESULTS, '"acc_stderr,none": 0.02', '"acc_stderr,none": 1e999'), f"{RESULTS} is not JSON"),
    (change(RESULTS, '"nll,none": 1.0', '"nll,none": -3'), "nll,none is -3, expected at least 0"),
    (write(RESULTS, '{"results": {"terms": [1]}}'), f"{RESULTS}: the result of terms is a list, expected an object"),
    (write(RESULTS, '{"results": {"terms": 1}}'), f"{RESULTS}: the result of terms is a number, expected an object"),
    (write(RESULTS, '{"results": {"terms": {}}, "group_subtasks": {"terms": ["terms"]}}'), f"{RESULTS} is damaged"),
    (write(RESULTS, '{"results": {"terms": {"acc": 1}}, "run": {"suite": [{"name": ["a"]}]}}'), "name is not valid"),
    (write(RESULTS, '{"results": {"terms": {"acc": 1}}, "run": []}'), f"{RESULTS} is damaged"),
    (write("llm/m0/eval/samples_terms_1.jsonl", '{"doc_id": 0, "acc": 1.0}\n{"doc_id": 1, "acc": 7}'),
     "samples_terms_1.jsonl, line 2: acc is 7, expected a number from 0 to 1"),
    (write("llm/m0/eval/samples_terms_1.jsonl", '{"doc_id": 0, "nll": "x"}'),
     'samples_terms_1.jsonl, line 1: nll is "x", expected at least 0'),
    (write(RESULTS, '{"results": {"terms": {"acc": 1}}, "n-samples": {"terms": {"effective": "many"}}}'),
     f"{RESULTS} is damaged"),
    (write(RESULTS, '[]'), f"{RESULTS}: expected an object, found a list"),
    (write(RESULTS, '{"results": '), f"{RESULTS} is not JSON"),
    (change(METRICS, '"mean": 40', '"mean": 400'), f"{METRICS}: the mean of sari is 400, expected a number from"),
    (change(METRICS, '"low": 38.04', '"low": "x"'), f'{METRICS}: the lower bound of sari is "x", expected a number'),
    (change(METRICS, '"low": 38.04', '"low": 70'), f"{METRICS}: the upper bound of sari is 41.96, expected at "),
    (change(METRICS, '"task": "simp"', '"task": "simpler"'), "results of an unknown task 'simpler'"),
    (write(METRICS, '{"task": "simp", "metrics": []}'), f"{METRICS} is damaged"),
    (write(METRICS, '{"metrics": {}}'), f"{METRICS} is damaged"),
    (change(METRICS, '"metrics"', '"run": {"decoding": "greedy"}, "metrics"'), f"{METRICS} is damaged"),
    (write("llm/m1-simp/eval/predictions-simp.jsonl", f'{{"scores": {{"sari": 1{"0" * 400}}}}}\n' * 2),
     "00000 is not a finite number"),
    (write("llm/m1-simp/eval/predictions-simp.jsonl", '{"scores": 5}'), "predictions-simp.jsonl is damaged"),
    (change("llm/m1-simp/metrics.jsonl", '"tokens": 100}', '"tok'), "metrics.jsonl, line 2 is not JSON"),
    (change("llm/m1-simp/metrics.jsonl", '"loss": 4.8', '"loss": "low"'), "metrics.jsonl, entry 2: loss is 'low'"),
    (change(RUN, '"seed": 42', '"seed": [42]'), f"{RUN} is damaged or was not written by this program: its entry 's"),
    (write(RUN, '{"commit": "c0ffee"}'), f"{RUN} is damaged or was not written by this program: its entry 'settings"),
    (write("experiment/llm-m1-simp.json", '{"command": [5]}'), "experiment/llm-m1-simp.json is damaged"),
    (write("experiment/llm-m1-simp.json", '{"command": []}'), "experiment/llm-m1-simp.json is damaged")])
def test_damaged_files_are_refused(runs, tmp_path, refusal, spoil, message):
    spoil(runs)
    line = refusal((ReportConfig, report.main), "--runs", runs, "--out", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["result = 5", "[[result]]\nmodel = 1\nstage = 2\nfile = 3", "[[result]]",
                                  '[[result]]\nmodel = "a"\nstage = "m0"\nfile = "."',
                                  '[[result]]\nmodel = "a"\nstage = "m0"\nfile = "none.json"', "[[[", None])
def test_a_wrong_list_of_results_is_refused(tmp_path, refusal, text):
    path = tmp_path / "map.toml"
    path.mkdir() if text is None else path.write_text(text)
    assert "map.toml" in (line := refusal((ReportConfig, report.main), "--results", path, "--out", tmp_path / "out")) \
        or "none.json does not exist" in line


def test_out_that_is_a_file_is_refused(runs, tmp_path, refusal):
    (tmp_path / "out").write_text("mine")
    assert refusal((ReportConfig, report.main), "--runs", runs, "--out", tmp_path / "out").endswith(
        "out is not a folder: choose another --out")
    assert "a part of that path is a file" in refusal((ReportConfig, report.main), "--runs", runs, "--out",
                                                      tmp_path / "out/in")
    assert (tmp_path / "out").read_text() == "mine"


def test_folders_that_are_called_like_results_files(tmp_path):
    """lm-eval has made such folders, with results.json or <model>/results_<date>.json in them."""
    for number, (path, value) in enumerate((("results_Rs.json/results.json", 0.5),
                                            ("results_Rs.json/llm-stacking__LLM_7B/results_2025-05-10.json", 0.4))):
        path = tmp_path / f"results/llm/m{number}" / path
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"results": {"piqa": {"acc,none": value, "acc_stderr,none": 0.01}}}))
    assert "| Rs | 20.0 [" in make_report(tmp_path / "out", results=tmp_path / "results")
    (tmp_path / "map.toml").write_text("".join(
        f'[[result]]\nmodel = "llm"\nstage = "m{number}"\nfile = "results/llm/m{number}/results_Rs.json"\n'
        for number in range(2)))
    assert "| Rs | 20.0 [" in make_report(tmp_path / "out", results=tmp_path / "map.toml")


def test_the_report_shows_the_rate_with_benchmarks_where_rates_were_added_later():
    given = {"1e-4": {}, "3e-4": {}, "1e-3": {"benchmarks": {"next": Estimate(0.5, 0.1)}}, "3e-3": {}}
    stages = [Stage("llm", 42, 1, "m1", rate=rate, **results) for rate, results in given.items()]
    assert shared_rates(stages, ReportConfig()) == {"none": "1e-3"}


def test_names_with_bars_do_not_break_the_tables(runs, tmp_path):
    for path in runs.rglob("results_1.json"):
        change(path.relative_to(runs), '"label": "age"', '"label": "a|b"')(runs)
    text = make_report(tmp_path / "out", runs=runs)
    assert "| a\\|b | 0.0 [" in text
    assert "<td>a|b</td>" in (tmp_path / "out/report.html").read_text()


def test_the_report_does_not_import_lm_eval():
    """It takes seconds."""
    assert run_script("-c", "import report, sys; print('lm_eval' in sys.modules)",
                      launcher=[sys.executable]).stdout == "False\n"


@pytest.mark.parametrize("rates", [(1e-3,), (1e-3, 3e-4), (1e-3, 3e-4, 1e-4), (1e-3, 3e-4, 1e-4, 2e-5)])
def test_the_report_shows_the_rate_whose_stages_are_evaluated(rates):
    stages = [Stage("llm", 42, 1, "m1", rate=f"{rate:g}") for rate in rates]
    shared = sorted(rates)[(len(rates) - 1) // 2]
    assert ExperimentConfig(rates=rates).shared_rate == shared
    assert {method: float(rate) for method, rate in shared_rates(stages, ReportConfig()).items()} == {"none": shared}


def test_each_method_is_shown_at_its_own_middle_rate():
    stages = [Stage("llm", 42, 1, "m1", method=method, rate=rate)
              for method, rates in (("finetune", ("3e-05", "0.0001", "0.0003")), ("lora", ("0.0003", "0.001", "0.003")),
                                    ("vcl", ("0.0002",))) for rate in rates]
    assert shared_rates(stages, ReportConfig()) == {"finetune": "0.0001", "lora": "0.001", "vcl": "0.0002"}
    assert shared_rates(stages, ReportConfig(rate=3e-4)) == {
        "finetune": "0.0003", "lora": "0.0003", "vcl": "0.0002"}
    assert shared_rates([Stage("llm", 42, 0, "m0")], ReportConfig()) == {"none": ""}


def test_images_of_another_programs_page_are_kept(tmp_path):
    (tmp_path / "report.md").write_text("# Notes: mine\n\n![A photo](photo.png)\n")
    (tmp_path / "photo.png").touch()
    write_pages(tmp_path, "# Forgetting: llm\n")
    assert (tmp_path / "photo.png").exists()
