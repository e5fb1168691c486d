"""The report from files of runs, and from results that lm-eval's own command line wrote."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report
from analysis import method_tables as comparison
from analysis.pages import to_html
from analysis.record import Record
from analysis.results import read_results, read_runs, shipped
from analysis.statistics import Estimate
from analysis.tables import verdict
from common import settings
from common.files import UserError, read_json
from evaluation.lm_eval_files import figure
from report import ReportConfig
from tests.conftest import run_script

SUITE = [("terms", "DK", "acc", None, None), ("continuation", "Rs", "acc", None, None),
         ("passages", "Rs", "acc", "passages", None), ("pairs", "Bias", "pct_stereotype", None, None),
         ("pairs_age", "Bias", "pct_stereotype", "age", "pairs"),
         ("pairs_race", "Bias", "pct_stereotype", "race", "pairs")]
# accuracy of terms, continuation, passages and share of stereotypes at m0, m1, m2
VALUES = {"llm": [(0.5, 0.4, 0.30, 0.6), (0.4, 0.3, 0.30, 0.6), (0.3, 0.2, 0.15, 0.54)],
          "stack": [(0.5, 0.4, 0.30, 0.6), (0.5, 0.4, 0.24, 0.6), (0.5, 0.4, 0.18, 0.6)]}
TASKS = {"llm": [(10, 5), (40, 6), (30, 50)], "stack": [(10, 5), (40, 7), (38, 50)]}


def write_stage(folder, number, values, tasks, seed=42):
    name = "m0" if number == 0 else f"m{number}-{('simp', 'empd')[number - 1]}"
    stage = folder / name
    (stage / "eval").mkdir(parents=True)
    suite = [dict(zip(("name", "category", "metric", "label", "part_of"), entry)) for entry in SUITE]
    figures = {}
    for (title, _, metric, _, _), value in zip(SUITE, [*values, 0.5, 0.5]):
        figures[title] = {f"{metric},none": value, f"{metric}_stderr,none": 0.02}
        if metric == "acc":
            figures[title] |= {"ece,none": 0.1 + number / 10, "nll,none": 1.0, "brier,none": 0.7}
    (stage / "eval/results_1.json").write_text(json.dumps({"results": figures, "run": {"suite": suite}}))
    for task, metric, value in (("simp", "sari", tasks[0]), ("empd", "rougeL", tasks[1])):
        (stage / f"eval/metrics-{task}.json").write_text(json.dumps(
            {"task": task, "metrics": {metric: {"mean": value, "low": value - 1.96, "high": value + 1.96}}}))
    (stage / "run.json").write_text(json.dumps({
        "settings": {"task": ("simp", "empd")[number - 1] if number else None, "seed": seed, "num_train_epochs": 2.0,
                     "out": f"runs/{name}"}, "commit": "c0ffee", "data_digest": "d" * 64, "parent_digest": "a" * 64}))
    lines = [{"step": 0, "eval_loss": 5.0}, *({"step": step, "loss": 5 - step / 5, "tokens": 100 * step}
                                               for step in range(1, 9)), {"step": 8, "eval_loss": 3.5}]
    (stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return stage


@pytest.fixture
def runs(tmp_path):
    for model in VALUES:
        for number in range(3):
            write_stage(tmp_path / "runs" / model, number, VALUES[model][number], TASKS[model][number])
    return tmp_path / "runs"


def test_measures_of_a_record(runs):
    record = Record(*read_runs(runs))
    assert record.stages == ["m0", "m1-simp", "m2-empd"]
    assert record.categories == ["DK", "Rs", "Bias"]
    assert not record.missing
    # (0.5 - 0.4)/0.5 and (0.5 - 0.3)/0.5: 20 and 40; continuation 25 and 50; passages 0 and 50
    assert record.category_fg("llm", "DK").value == pytest.approx(30)
    assert record.category_fg("llm", "Rs").value == pytest.approx((37.5 + 25) / 2)
    assert record.category_fg("stack", "Rs").value == pytest.approx((0 + 30) / 2)
    assert record.category_fg("llm", "Bias").value == pytest.approx(5)  # parts do not count
    assert record.learned == ["simp", "empd"]
    chain = record.chains["llm"][42]
    assert record.matrix(chain)[1, "simp"].value == 40
    assert record.matrix(chain)[1, "simp"].error == pytest.approx(1)


def test_a_stage_and_a_benchmark_that_are_missing_are_named(runs):
    (runs / "llm/m1-simp").rename(runs / "elsewhere")
    path = runs / "stack/m2-empd/eval/results_1.json"
    found = read_json(path)
    del found["results"]["terms"]
    path.write_text(json.dumps(found))
    (runs / "stack/m2-empd/eval/metrics-simp.json").unlink()
    record = Record(*read_runs(runs))
    assert record.missing == ["llm: the stage m1-simp is missing", "stack: m2-empd lacks the benchmarks terms",
                              "stack: m2-empd lacks the test sets simp"]
    assert record.category_fg("llm", "DK").value == pytest.approx(40)  # of the stage that is there
    assert record.category_fg("stack", "DK").value == pytest.approx(0)


def test_models_with_other_stages_are_not_compared(runs, tmp_path):
    (runs / "stack/m2-empd").rename(runs / "gone")
    report.main(ReportConfig(runs=str(runs), out=str(tmp_path / "out")))
    text = (tmp_path / "out/report.md").read_text()
    assert "FG, DK: not compared, the models do not have the same stages and benchmarks" in text
    assert "stack: the stage m2-empd is missing" in text
    assert "| average performance | 40.00 [38.61, 41.39] | – | – |" in text  # after m2: simp 30, empd 50


def test_a_seed_moves_all_benchmarks_of_a_category(runs):
    """The seeds' spread is that of the category's FG, 31.25 and 15 here, and does not shrink with its benchmarks."""
    for number in (1, 2):
        write_stage(runs / "llm/seed-43", number, VALUES["stack"][number], TASKS["llm"][number], seed=43)
    found = Record(*read_runs(runs)).category_fg("llm", "Rs")
    assert found.value == pytest.approx((31.25 + 15) / 2)
    assert found.error == pytest.approx(12.706 / 1.96 * (31.25 - 15) / 2, rel=0.01)


def test_tasks_in_another_order_are_not_compared(runs):
    (runs / "stack/m1-simp").rename(runs / "stack/m1-empd")
    with pytest.raises(UserError, match="stage 1 is m1-simp of llm, but m1-empd of stack"):
        Record(*read_runs(runs))


def test_commands_stand_in_the_order_in_which_they_make_the_runs(runs, tmp_path):
    for name in ("llm-m1-simp-eval", "llm-m1-simp", "llm-m0-eval", "llm-m0", "llm-m9-left-over"):
        path = runs / f"experiment/{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"command": ["train.py", "--made", name]}))
    report.main(ReportConfig(runs=str(runs), out=str(tmp_path / "out")))
    text = (tmp_path / "out/report.md").read_text()
    assert re.findall(r"--made (\S+)", text) == ["llm-m0", "llm-m0-eval", "llm-m1-simp", "llm-m1-simp-eval"]
    assert "python train.py --task empd" in text  # of a stage that nothing is written down about


def test_of_a_group_and_its_parts_those_count_that_a_suite_names(tmp_path):
    value = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    for number, factor in enumerate((1.0, 0.8)):
        figures = {name: value | {"acc,none": 0.5 * factor} for name in
                   ("mmlu", "mmlu_stem", "mmlu_astronomy", "mmlu_other", "boolq", "mine", "mine_a")}
        folder = tmp_path / f"stack/m{number}"
        folder.mkdir(parents=True)
        (folder / "results_1.json").write_text(json.dumps({"results": figures | {"odd": {"f1,none": 1.0}},
            "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["mmlu_astronomy"],
                               "mine": ["mine_a"], "boolq": []}}))
    record = Record(*read_results(tmp_path))
    assert [(b.name, b.category) for b in record.benchmarks] == [
        ("mmlu_stem", "DK"), ("mmlu_other", "DK"), ("boolq", "Rs"), ("mine", "other")]
    assert record.category_fg("stack", "DK").value == pytest.approx(20)
    assert "stack: m0 has results without one of acc, r@1, pct_stereotype, exact_match: odd" in record.missing
    assert shipped()["boolq"].category == "Rs"
    with pytest.raises(UserError, match="unknown model llm2, expected some of stack"):
        report.main(ReportConfig(results=str(tmp_path), out=str(tmp_path / "out"), grown="stack", reference="llm2"))
    report.main(ReportConfig(results=str(tmp_path), out=str(tmp_path / "out")))
    assert "- The models are stack." in (tmp_path / "out/report.md").read_text()


def test_figures_of_old_and_new_results():
    found = {"acc": 0.1, "acc_stderr": 0.2, "r@1,none": 0.3, "r@1_stderr,none": "N/A", "exact_match,strict": 0.4,
             "exact_match_stderr,strict": 0.5}
    assert figure(found, "acc") == (0.1, 0.2)
    assert figure(found, "exact_match,strict") == (0.4, 0.5)
    assert figure(found, "r@1")[0] == 0.3
    assert str(figure(found, "r@1")[1]) == "nan"
    assert figure(found, "pct_stereotype") == (None, None)


def test_stages_that_only_a_list_orders(tmp_path):
    for model, stages in (("llm", ("original", "first", "second")), ("stack", ("original", "second"))):
        for value, stage in enumerate(stages, 4):
            (tmp_path / model / stage).mkdir(parents=True)
            (tmp_path / model / stage / "results_1.json").write_text(json.dumps(
                {"results": {"piqa": {"acc,none": value / 10, "acc_stderr,none": 0.1}}}))
    with pytest.raises(UserError, match="the folder first does not say which stage it is"):
        read_results(tmp_path)
    (tmp_path / "map.toml").write_text("".join(
        f'[[result]]\nmodel = "{model}"\nstage = "{stage}"\nfile = "{model}/{stage}/results_1.json"\n'
        for model in ("llm", "stack") for stage in ("original", "first", "second")
        if (tmp_path / model / stage).exists()))
    record = Record(*read_results(tmp_path / "map.toml"))
    assert record.stages == ["original", "first", "second"]
    assert record.missing == ["stack: the stage first is missing"]
    assert record.value("stack", 2, "piqa").value == 0.5
    (tmp_path / "map.toml").write_text('[result]\nmodel = "llm"\n')
    with pytest.raises(UserError, match=r"expected a list of \[\[result\]\]"):
        read_results(tmp_path / "map.toml")


def test_seeds_are_chains_from_one_start(runs):
    for number in (1, 2):
        write_stage(runs / "llm/seed-43", number, VALUES["stack"][number], TASKS["llm"][number], seed=43)
    record = Record(*read_runs(runs))
    assert set(record.chains["llm"]) == {42, 43}
    found = record.category_fg("llm", "DK")
    assert found.value == pytest.approx((30 + 0) / 2)
    assert found.error == pytest.approx(97.3, abs=0.1)  # two seeds so far apart say little: 12.706/1.96 · 21.2 / √2
    assert record.chains["llm"][43][0].name == "m0"


def test_pages_and_figures(runs, tmp_path):
    out = tmp_path / "report"
    printed = run_script("report.py", "--runs", runs, "--out", out).stdout
    assert "FG, Rs: stack and llm cannot be told apart from noise" in printed or "FG, Rs: stack forgets less" in printed
    text, page = ((out / f"report.{ending}").read_text() for ending in ("md", "html"))
    assert re.search(r"\| DK \| 30\.0 \[\S+ \S+ \| 0\.0 \[\S+ \S+ \| -30\.0 \[", text)
    assert "FG, DK: stack forgets less than llm (-30.0 points" in text
    assert "Backward transfer: stack forgets less than llm (+8.0 points" in text
    assert "c0ffee" in text
    assert "python train.py --task simp" in text
    names = {"benchmarks", "forgetting", "bias", "tasks", "losses", "calibration"}
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.svg")} == names
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    assert "<table>" in page
    assert "| " not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda runs: (runs / "llm/m1-simp/eval/results_2.json").write_text(json.dumps(
        {"results": {"terms": {"acc,none": 0.41}}})),
     r"llm m1-simp has two results for terms that disagree: .*results_1.*results_2"),
    (lambda runs: [path.unlink() for path in runs.rglob("eval/*")], "holds no evaluated runs"),
    (lambda runs: write_stage(runs / "other/llm", 0, VALUES["llm"][0], (1, 1)), "there are two stages 0 of llm"),
    (lambda runs: (runs / "llm/m0/eval/results_1.json").write_text("{}"), "is no results file of lm-eval"),
    (lambda runs: None, "unknown category XX, expected some of DK, Rs, Bias")])
def test_what_cannot_be_reported(runs, tmp_path, spoil, said):
    spoil(runs)
    with pytest.raises(UserError, match=said):
        report.main(ReportConfig(runs=str(runs), out=str(tmp_path / "out"), categories=("XX",)))
    assert not (tmp_path / "out").exists()


def test_results_of_lm_evals_own_command_line(tmp_path):
    (tmp_path / "tasks").mkdir()
    items = [{"text": f"q{n}", "choices": ["a", "b"], "label": n % 2} for n in range(12)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tasks/local.yaml").write_text(json.dumps({
        "task": "local_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}}, "doc_to_text": "text",
        "doc_to_choice": "choices", "doc_to_target": "label", "metric_list": [{"metric": "acc"}]}))
    subprocess.run([Path(sys.executable).parent / "lm_eval", "--model", "dummy", "--tasks", "local_choice",
                    "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "results/llm/m0"], check=True,
                   capture_output=True)
    start, = (tmp_path / "results").rglob("results_*.json")
    values = read_json(start)
    values["results"]["local_choice"] |= {"acc,none": 0.5, "acc_stderr,none": 0.1}
    start.write_text(json.dumps(values))
    old = {"results": {"local_choice": {"acc": 0.4, "acc_stderr": 0.1}}}  # as lm-eval 0.3 wrote them
    (tmp_path / "results/llm/m1-any/deep").mkdir(parents=True)
    (tmp_path / "results/llm/m1-any/deep/results_x.json").write_text(json.dumps(old))
    record = Record(*read_results(tmp_path / "results"))
    assert record.stages == ["m0", "m1-any"]
    assert record.category_fg("llm", "other").value == pytest.approx(20)
    (tmp_path / "map.toml").write_text("".join(
        f'[[result]]\nmodel = "llm"\nstage = "{stage}"\nfile = "{file}"\n' for stage, file in
        (("before", start), ("after", "results/llm/m1-any/deep/results_x.json"))))
    record = Record(*read_results(tmp_path / "map.toml"))
    assert [record.value("llm", number, "local_choice").value for number in range(2)] == [0.5, 0.4]
    report.main(ReportConfig(results=str(tmp_path / "results"), out=str(tmp_path / "report")))
    assert "| other | 20.0 [" in (tmp_path / "report/report.md").read_text()


def test_verdicts():
    assert verdict("FG", "a", "b", Estimate(-5, 1)).startswith("FG: a forgets less than b (-5.0 points, 95% interval")
    assert "a forgets more than b" in verdict("FG", "a", "b", Estimate(5, 1))
    assert "a forgets less than b" in verdict("Backward transfer", "a", "b", Estimate(5, 1), sign=-1)
    assert "cannot be told apart from noise" in verdict("FG", "a", "b", Estimate(5, 3))
    assert "without standard errors" in verdict("FG", "a", "b", Estimate(5))


def test_html():
    text = "A `code` & more\n\n| a | b |\n|---|---|\n| 1 | <2> |\n\n- one\n- two\n\n```\nx | y\n```\n"
    assert to_html(text) == ("<p>A <code>code</code> &amp; more</p>\n<table><tr><th>a</th><th>b</th></tr><tr><td>1</td>"
                             "<td>&lt;2&gt;</td></tr></table>\n<ul><li>one</li><li>two</li></ul>\n<pre>x | y</pre>")


@pytest.fixture
def methods(runs):
    """The chain of llm with three methods: as it is, without forgetting, and over draws of the weights."""
    for method, values, tasks in (("finetune", VALUES["llm"], TASKS["llm"]), ("ewc", VALUES["stack"], TASKS["stack"]),
                                  ("vcl-tau=0.5", VALUES["llm"], TASKS["llm"])):
        for number in (1, 2):
            stage = write_stage(runs / "llm" / method, number, values[number], tasks[number])
            run = read_json(stage / "run.json")
            run["settings"]["method"] = method.partition("-")[0]
            run["result"] = {"seconds": 60.0, "seconds_after": 30.0 * (method == "ewc")}
            (stage / "run.json").write_text(json.dumps(run))
            path = stage / "eval/results_1.json"
            found = read_json(path)
            found["results"]["pairs_age"] |= {"ece,none": 9.0, "nll,none": 9.0}  # a part, which does not count
            if method.startswith("vcl"):
                found["results"]["terms"] |= {"acc,sampled": 0.5, "ece,sampled": 0.04, "nll,sampled": 0.9}
            path.write_text(json.dumps(found))
    for name in ("m1-simp", "m2-empd"):
        shutil.rmtree(runs / "llm" / name)
    shutil.rmtree(runs / "stack")
    return runs


def test_methods_beside_the_constant_rate(methods, tmp_path):
    report.main(ReportConfig(runs=str(methods), out=str(tmp_path / "out")))
    text = (tmp_path / "out/report.md").read_text()
    assert text.startswith("# Forgetting of llm over 3 stages with the method constant\n")
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()
            if line.startswith("| ")}
    assert rows["method"] == ["method", "FG DK", "FG Rs", "FG Bias", "average", "backward transfer",
                              "forgetting from the best"]  # of the differences, the last table with that head
    assert rows["the same, over draws of the weights"][-3:] == ["0.040", "0.900", "–"]
    table = text.split("## Methods less")[0].split("## Methods: llm")[1].splitlines()
    constant, ewc = ([cell.strip() for cell in line.strip("|").split("|")] for line in table
                     if line.startswith(("| constant |", "| ewc |")))
    assert constant[1].startswith("30.00 [")
    assert ewc[1].startswith("0.00 [")
    assert (constant[5].split()[0], ewc[5].split()[0]) == ("-10.00", "-2.00")  # simp 40 to 30, 40 to 38
    assert constant[-3:] == ["0.300", "1.000", "2.0"]  # both stages took a minute
    assert ewc[-1] == "3.0"
    # DK: each FG has the start's 0.02, times what is left of it, and the mean's over two stages, over 0.5
    error = 100 / 0.5 * 0.02 * (2 * 0.5 + 0.7 ** 2 + 1) ** 0.5
    assert rows["ewc"][1] == f"-30.00 [{-30 - 1.96 * error:.2f}, {-30 + 1.96 * error:.2f}]"
    assert "- llm, ewc beside finetune: better by FG DK (-30.00 [" in text
    assert "- llm, vcl-tau=0.5 beside finetune: nothing can be told apart from noise." in text
    report.main(ReportConfig(runs=str(methods), out=str(tmp_path / "ewc"), method="ewc", baseline="ewc"))
    text = (tmp_path / "ewc/report.md").read_text()
    assert "with the method ewc" in text
    assert "llm, constant beside ewc: worse by FG DK (+30.00" in text
    assert text.index("| ewc |") < text.index("| constant |")
    cfg = settings.load(ReportConfig, ["--runs", str(methods), "--method", "ewc"], "")  # whose file says other things
    assert cfg.method == "ewc"
    with pytest.raises(UserError, match="unknown method 'best', expected one of finetune, ewc, vcl-tau=0.5"):
        report.main(ReportConfig(runs=str(methods), out=str(tmp_path / "out"), method="best"))


def test_methods_are_compared_only_where_they_have_the_same(methods, tmp_path):
    shutil.rmtree(methods / "llm/ewc/m2-empd")
    (methods / "llm/vcl-tau=0.5/m2-empd/eval/metrics-simp.json").unlink()
    report.main(ReportConfig(runs=str(methods), out=str(tmp_path / "out")))
    text = (tmp_path / "out/report.md").read_text()
    assert "- llm, ewc beside finetune: not compared, they do not have the same stages or measures." in text
    rows = [line for line in text.split("## Methods less")[1].splitlines() if line.startswith("| vcl")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[1].startswith("+0.00 [")
    assert cells[4:] == ["–"] * 3


def test_of_the_bias_neither_direction_is_better():
    assert comparison.sentence("llm", "ewc", "finetune", {"FG Bias": Estimate(-20, 1), "FG DK": Estimate(5, 1)}) == (
        "llm, ewc beside finetune: worse by FG DK (+5.00 [+3.04, +6.96]); "
        "different by FG Bias (-20.00 [-21.96, -18.04]).")


def test_stages_without_a_method_are_one_too(methods, tmp_path):
    for number in (1, 2):
        write_stage(methods / "llm", number, VALUES["stack"][number], TASKS["stack"][number])
    run = read_json(methods / "llm/m1-simp/run.json")  # whose folder is not the method's
    run["settings"]["method"] = "cosine"
    (methods / "llm/m1-simp/run.json").write_text(json.dumps(run))
    stage, = (stage for stage in read_runs(methods)[0] if stage.directory == methods / "llm/m1-simp")
    assert (stage.model, stage.method) == ("llm", "cosine")
    write_stage(methods / "llm/other", 1, VALUES["stack"][1], TASKS["stack"][1])
    with pytest.raises(UserError, match="unknown method 'x', expected one of constant, cosine, ewc, none, pro"):
        report.main(ReportConfig(runs=str(methods), out=str(tmp_path / "out"), method="x"))


def test_methods_are_compared_item_by_item(methods):
    """Where the items of a test set are known, what two methods make of them is compared in pairs."""
    scores = np.random.default_rng(0).normal(30, 10, 50)
    for method, shift in (("finetune", 0.0), ("ewc", 1.0)):
        folder = methods / "llm" / method / "m2-empd/eval"
        values = scores + shift + np.arange(50) % 2 / 10
        (folder / "predictions-simp.jsonl").write_text(
            "\n".join(json.dumps({"scores": {"sari": value}}) for value in values))
        metrics = read_json(folder / "metrics-simp.json")
        metrics["metrics"]["sari"] = {"mean": float(values.mean()), "low": 20.0, "high": 40.0}
        (folder / "metrics-simp.json").write_text(json.dumps(metrics))
    stages, _ = read_runs(methods)
    one, two = (next(stage.tasks["simp"]["sari"] for stage in stages if (stage.method, stage.number) == (method, 2))
                for method in ("finetune", "ewc"))
    assert (two - one).value == pytest.approx(1.0)
    assert (two - one).error < 1e-6
    assert one.error == pytest.approx((scores + np.arange(50) % 2 / 10).std(ddof=1) / 50 ** 0.5)
