"""The experiment: its jobs, and that it runs those that are missing and none twice."""
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest

import experiment
import report
from common.files import UserError
from common.settings import load
from common.writing import write_json
from corpus.shards import write_shards
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from pipeline import experiment_jobs
from pipeline.costs import Pace
from pipeline.experiment_config import ExperimentConfig
from pipeline.experiment_jobs import arms, pair_jobs
from pipeline.jobs import Job
from pipeline.ledger import Ledger, ledger_entry
from tests.conftest import ROOT
from training.train_config import TrainConfig


def settings(checkpoint, tasks, out, **given):
    return ExperimentConfig(**{"data": str(tasks), "out": str(out), "init_llm": str(checkpoint),
                               "init_stack": str(checkpoint), "order": ("simp", "empd", "simp")} | given)


def jobs_of(cfg):
    return [job for pair in cfg.pairs or (None,) for job in pair_jobs(cfg, pair)]


def test_the_jobs_in_order(checkpoint, tasks, tmp_path):
    jobs = jobs_of(settings(checkpoint, tasks, tmp_path, seeds=(42, 7), models=("stack",)))
    place = tmp_path / "stack"
    chain = [f"{folder}{name}{end}" for folder in ("", "seed-7/") for name in ("m1-simp", "m2-empd", "m3-simp")
             for end in ("", "/eval")]
    assert [str(job.out.relative_to(place)) for job in jobs] == ["m0/eval", *chain]
    words = [job.argv for job in jobs]
    init = [command[command.index("--init") + 1] for command in words if "--init" in command]
    assert init == [str(checkpoint), f"{place}/m1-simp", f"{place}/m2-empd", str(checkpoint),
                    f"{place}/seed-7/m1-simp", f"{place}/seed-7/m2-empd"]
    assert [command[command.index("--seed") + 1] for command in words if "--seed" in command] == ["42"] * 3 + ["7"] * 3
    assert all(command[command.index("--tasks") + 1] == "simp,empd" for command in words if "--tasks" in command)
    assert all(job.flops > 0 for job in jobs)


def test_a_chain_for_each_method(checkpoint, tasks, tmp_path):
    methods = ("finetune", "rehearsal:rehearsal=0.1", "vcl:tau=0.5:learning_rate=0.2")
    jobs = jobs_of(settings(checkpoint, tasks, tmp_path, models=("llm",), order=("simp", "empd"), methods=methods,
                             train_args="--learning_rate 1e-4"))
    folders = ["finetune", "rehearsal-rehearsal=0.1", "vcl-tau=0.5-learning_rate=0.2"]
    assert [str(job.out.relative_to(tmp_path / "llm")) for job in jobs] == ["m0/eval"] + [
        f"{folder}/{name}{end}" for folder in folders for name in ("m1-simp", "m2-empd") for end in ("", "/eval")]
    words = [" ".join(job.argv) for job in jobs]
    assert words[1].endswith("--learning_rate 1e-4 --method finetune")
    assert all(text.endswith("--method rehearsal --rehearsal 0.1") for text in (words[5], words[7]))
    assert words[9].endswith("--learning_rate 1e-4 --method vcl --tau 0.5 --learning_rate 0.2")
    assert [f"--init {checkpoint}" in text for text in words[1::2]] == [True, False] * 3
    assert ["--posterior_samples 4" in text for text in words[::2]] == [False] * 5 + [True] * 2
    cosine = jobs_of(settings(checkpoint, tasks, tmp_path, models=("llm",), order=("simp",), methods=(
        "finetune:lr_scheduler_type=cosine:weight_decay=0.01",)))[1]
    assert cosine.argv[-6:] == ["--method", "finetune", "--lr_scheduler_type", "cosine", "--weight_decay", "0.01"]
    assert cosine.out == tmp_path / "llm/finetune-lr_scheduler_type=cosine-weight_decay=0.01/m1-simp"
    assert any("method/rehearsal.toml" in str(path) for path in jobs[7].inputs)


def test_the_text_that_is_replayed(checkpoint, tasks, tmp_path):
    """That of the experiment, unless train_args names another one, which then counts as an input of the stage."""
    given = {"models": ("llm",), "order": ("simp",), "methods": ("replay",), "text": "my/text"}
    for train_args, text in (("", "my/text"), ("--replay_text my/other", "my/other")):
        stage = jobs_of(settings(checkpoint, tasks, tmp_path, train_args=train_args, **given))[1]
        assert stage.argv[-2:] == ["--replay_text", text]
        assert Path(text) in stage.inputs
        assert Path("my/text") in stage.inputs or text == "my/other"
    ds = jobs_of(settings(checkpoint, tasks, tmp_path, **given | {"methods": ()}, train_args="--deepspeed my.json"))[1]
    assert Path("my.json") in ds.inputs


def test_pairs_rates_and_controls(tasks, tmp_path):
    cfg = ExperimentConfig(size="tiny", text="some/text", data=str(tasks), out=str(tmp_path), order=("simp", "empd"),
                           pairs=(1, 2), rates=(3e-3, 3e-4, 1e-3), controls=("flops", "loss"),
                           models=("llm", "stack", "base"))
    jobs = {str(job.out.relative_to(tmp_path)): job for job in jobs_of(cfg)}
    assert [name for name in jobs if name.endswith("/m0")] == [
        f"pair-{pair}/{model}/m0" for pair in (1, 2) for model in ("llm", "stack", "base", "llm-level")]
    assert len(jobs) == 2 * 4 * (2 + 3 * 2 * 2)
    stage, evaluation = (jobs[f"pair-2/stack/rate-0.001/m2-empd{end}"].argv for end in ("", "/eval"))
    place = tmp_path / "pair-2/stack"
    assert stage[stage.index("--init") + 1] == f"{place}/rate-0.001/m1-simp"
    assert stage[-2:] == ["--learning_rate", "0.001"]
    assert evaluation[evaluation.index("--reference") + 1] == f"{place}/m0"
    assert evaluation[evaluation.index("--text") + 1] == "some/text"
    assert {name.split("/")[2] for name, job in jobs.items() if "--suite" in job.argv} == {"m0", "rate-0.001"}
    assert all(("--decode" in job.argv) == ("--suite" not in job.argv) for name, job in jobs.items() if "eval" in name)
    pretraining = [jobs[f"pair-2/{model}/m0"].argv for model in ("base", "llm-level")]
    assert all(words[words.index("--seed") + 1] == "2" for words in pretraining)
    assert pretraining[0][pretraining[0].index("--model") + 1] == "base"
    assert pretraining[1][-4:] == ["--init", f"{tmp_path}/pair-2/llm/m0", "--level_with", f"{place}/m0"]
    assert jobs["pair-1/base/rate-0.001/m1-simp"].flops < jobs["pair-1/llm/rate-0.001/m1-simp"].flops


@pytest.mark.parametrize(("llm", "stack", "level"), [
    (4.0, 3.9, "llm-level"), (3.9, 4.0, "stack-level"), (None, 4.0, "llm-level"), (4.0, None, "llm-level"),
    (None, None, "llm-level"), (4.0, 4.0, "llm-level")])
def test_the_model_that_is_behind_is_trained_on(tasks, tmp_path, llm, stack, level):
    cfg = ExperimentConfig(size="tiny", text="x", data=str(tasks), out=str(tmp_path), controls=("flops", "loss"))
    for model, loss in (("llm", llm), ("stack", stack)):
        if loss:
            (tmp_path / model / "m0").mkdir(parents=True)
            (tmp_path / model / "m0/run.json").write_text(json.dumps({"result": {"eval_loss_after": loss}}))
    last = arms(cfg, None)[-1]
    assert (last.folder.name, {last.model, last.level_with}) == (level, {"llm", "stack"})
    assert level == f"{last.model}-level"


def test_test_sets_that_cannot_be_evaluated_are_found_before_the_first_job(checkpoint, tasks, tmp_path, monkeypatch,
                                                                           refusal):
    monkeypatch.setattr(experiment, "run_command", lambda words: pytest.fail(f"{words} was run"))
    monkeypatch.setattr(experiment, "machine_speed", lambda: 1e9)
    splits = json.loads((tasks / "simp.json").read_text())
    splits["test"][0]["src_info"].pop("normal_sentence")
    (tmp_path / "simp.json").write_text(json.dumps(splits))
    flags = ["--init_llm", checkpoint, "--models", "llm", "--order", "simp", "--data", tmp_path, "--suite", "none",
             "--primary", "KL on the new task", "--out", tmp_path / "runs"]
    assert "simp.json: the test item " in refusal((ExperimentConfig, experiment.main), *flags)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/simp.json").write_text(json.dumps(splits | {"test": []}))
    flags += ["--data", tmp_path / "empty", "--evaluate_args", "--decode false"]
    assert "simp.json: the test set is empty" in refusal((ExperimentConfig, experiment.main), *flags)


def test_a_directory_that_no_job_makes(tasks, tmp_path):
    cfg = ExperimentConfig(size="tiny", text="x", data=str(tasks), out=str(tmp_path), order=("simp",), only="m1")
    with pytest.raises(UserError, match=f"makes m1, expected a directory such as {tmp_path}/llm/m0: --dry_run without"):
        experiment.main(cfg)


def test_m0_is_pretrained_or_from_the_hub(tasks, tmp_path, capsys):
    found = jobs_of(ExperimentConfig(size="tiny", text="some/text", data=str(tasks), out=str(tmp_path),
                                     order=("simp",)))
    assert [job.script for job in found] == ["pretrain.py", "evaluate.py", "train.py", "evaluate.py"] * 2
    assert "--size tiny" in " ".join(found[2].argv)
    found = jobs_of(ExperimentConfig(size="7b", data=str(tasks), out=str(tmp_path), order=("simp",), models=("llm",)))
    assert found[0].argv[1:] == ["-m", "model.hub", "--source", "llm-stacking/LLM_7B_300BToken", "--out",
                                 f"{tmp_path}/llm/m0"]
    experiment.main(ExperimentConfig(size="tiny", text="some/text", data=str(tasks), out=str(tmp_path / "out"),
                                     order=("simp",), dry_run=True))
    assert re.search(r"8 jobs, 8 of them to do; about \d+:\d\d:\d\d at 30%", capsys.readouterr().out)
    experiment.main(ExperimentConfig(size="tiny", text="some/text", data=str(tasks), out=str(tmp_path / "out"),
                                     order=("simp",), pairs=(1, 2, 3), dry_run=True))
    *listed, rest, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [str(number) for number in range(1, 9)]
    assert rest.strip() == "and those of the pairs 2, 3"
    assert total.startswith("24 jobs, 24 of them")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="m0 of llm has to be pretrained: give --text, or --init_llm"):
        jobs_of(ExperimentConfig(size="tiny", data=str(tasks), out=str(tmp_path)))


@pytest.mark.parametrize(("models", "compared"), [
    (("stack", "llm"), None), (("llm",), None), (("llm", "interleave"), ("interleave", "llm")),
    (("interleave", "llm"), ("interleave", "llm")), (("stack", "middle"), ("middle", "stack")),
    (("llm", "stack", "base"), None)])
def test_the_report_compares_the_models_of_the_experiment(models, compared):
    cfg = report.ReportConfig(**{key: value for key, value in zip(("grown", "reference"), compared or ())}, runs="runs")
    words = experiment.report_command(ExperimentConfig(models=models, data="d", out="runs"))
    assert load(report.ReportConfig, words[2:]) == replace(cfg, out="report")


def test_a_job_is_repeated_if_its_command_or_its_inputs_changed(checkpoint, tmp_path):
    weights, data, out = tmp_path / "weights", tmp_path / "data.json", tmp_path / "out"
    shutil.copytree(checkpoint, weights)
    data.write_text("{}")

    def make(*command):
        return Job(out, command, inputs=(weights, data))

    ledger, job = Ledger(tmp_path), make("python", "a/train.py", "--seed", "1")
    ledger.add(job, ledger_entry(job))
    assert not ledger.unchanged(job)  # its result is missing
    out.mkdir()
    assert Ledger(tmp_path).unchanged(job)
    assert ledger.unchanged(make("torchrun", "--nproc", "2", "a/train.py", "--seed", "1"))  # the same result
    assert not ledger.unchanged(make("python", "a/train.py", "--seed", "2"))
    data.write_text("{} ")
    assert not ledger.unchanged(job)
    os.utime(data, ns=(1, 1))  # a file of the same size, written again
    data.write_text("[]")
    assert not ledger.unchanged(job)
    data.write_text("{}")
    (weights / "config.json").write_text((weights / "config.json").read_text() + " ")
    assert not ledger.unchanged(job)
    (out / "losses-task-simp.json").touch()
    (out / ".nfs0001").touch()
    ledger.add(job := make("python", "a/train.py"), ledger_entry(job))
    (out / ".nfs0001").unlink()
    assert ledger.unchanged(job)
    (out / "losses-task-simp.json").unlink()  # such as a damaged file, which is to be made again
    assert not ledger.unchanged(job)
    gone = Job(out, ["train.py"], inputs=(tmp_path / "gone",))
    assert ledger_entry(gone)["inputs"] == {str(tmp_path / "gone"): None}
    ledger.add(gone, ledger_entry(gone))
    assert not ledger.unchanged(gone)  # a missing input may have changed


def test_an_input_that_changes_during_a_job_is_a_change(tmp_path, monkeypatch):
    data, out = tmp_path / "data.json", tmp_path / "m1-simp"
    data.write_text("{}")
    job = Job(out, ["train.py"], inputs=(data,))

    def replace_data(words):
        out.mkdir()
        data.write_text("[]")

    monkeypatch.setattr(experiment, "run_command", replace_data)
    experiment.run_unfinished([job], [job], Ledger(tmp_path), SimpleNamespace(
        seconds=lambda jobs: 1.0, add=lambda job, seconds: None))
    assert not Ledger(tmp_path).unchanged(job)
    data.write_text("{}")
    assert Ledger(tmp_path).unchanged(job)


@pytest.mark.parametrize(("flags", "said"), [
    (["--methods", "lora:lora_rank=200"], "error: llm with lora:lora_rank=200: lora_rank is 200, more than the"),
    (["--methods", "expansion:new_layers=100"], "cannot make 108"),
    (["--train_args", "--train model.layers.99.*"], "train: no parameter matches model.layers.99.*")])
def test_parameters_to_train_are_checked_before_m0_is_pretrained(tasks, refusal, tmp_path, flags, said):
    words = ["--size", "tiny", "--models", "llm", "--order", "simp", "--text", "x", "--data", tasks]
    assert said in refusal((ExperimentConfig, experiment.main), *words, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_runs_go_on_where_the_project_lies_elsewhere(tmp_path, monkeypatch):
    def job_of(project):
        (tmp_path / project).mkdir()
        (tmp_path / project / "size.toml").write_text("")
        return Job(tmp_path / "out", ["python", tmp_path / project / "train.py"],
                   inputs=(tmp_path / project / "size.toml",))

    (tmp_path / "out").mkdir()
    ledger, there, here = Ledger(tmp_path), job_of("there"), job_of("here")
    monkeypatch.setattr("common.configs.ROOT", tmp_path / "here")
    ledger.add(here, ledger_entry(here))
    assert not ledger.unchanged(there)
    monkeypatch.setattr("common.configs.ROOT", tmp_path / "there")
    assert ledger.unchanged(there)


def test_costs_follow_the_settings_of_the_jobs(checkpoint, tasks, suite_file, tmp_path):
    def flops(**given):
        cfg = settings(checkpoint, tasks, tmp_path, models=("llm",), order=("simp",), suite=str(suite_file), **given)
        return [job.flops for job in jobs_of(cfg)]

    def close(*values):
        return pytest.approx(values, rel=1e-6)

    evaluation, training, after = flops()
    assert flops(train_args="--num_train_epochs 6") == close(evaluation, 2 * training, after)
    assert flops(methods=("finetune:num_train_epochs=1.5",)) == close(evaluation, training / 2, after)
    six, three = (flops(train_args=f"--max_steps {steps} --global_batch_size 4") for steps in (6, 3))
    assert six == close(evaluation, 2 * three[1], after)
    assert flops(train_args="--max_steps 3 --global_batch_size 8") == close(*six)
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    with_text = flops(text=str(text), evaluate_args="--text_tokens 3000")
    of_a_token = ModelConfig.read(checkpoint / "config.json").flops(1) / 3
    assert with_text == close(evaluation + 3000 * of_a_token, training, after + 2 * 3000 * of_a_token)
    few = flops(train_args="--max_train_samples 2", evaluate_args="--limit=1")
    assert all(0 < less < all_items / 9 for less, all_items in zip(few, flops()))


def test_an_experiment_without_benchmarks(checkpoint, tasks, tmp_path):
    jobs = jobs_of(settings(checkpoint, tasks, tmp_path, models=("llm",), order=("simp",), suite=None, rates=(1, 2, 3)))
    evaluations = {str(job.out.relative_to(tmp_path / "llm")): job.argv for job in jobs if "evaluate.py" in job.script}
    assert not any("--suite" in argv for argv in evaluations.values())
    assert [name for name, argv in evaluations.items() if "--decode" not in argv] == [
        "m0/eval", "rate-2/m1-simp/eval"]


def test_a_plan_downloads_no_weights(checkpoint, tasks, suite_file, tmp_path, monkeypatch, capsys):
    """It notes lengths that fine-tuning and evaluation do not share."""
    monkeypatch.setattr("model.hub.download", lambda name: pytest.fail(f"{name} was downloaded"))
    monkeypatch.setattr(experiment_jobs, "source_config", lambda name: ModelConfig.read(checkpoint / "config.json"))
    monkeypatch.setattr(experiment, "machine_speed", lambda: 1e9)
    cfg = ExperimentConfig(init_llm="owner/name", models=("llm",), order=("simp",), data=str(tasks), out=str(tmp_path),
                           suite=str(suite_file), dry_run=True)
    experiment.main(cfg)
    assert "note: " not in capsys.readouterr().out
    experiment.main(replace(cfg, train_args="--max_source_length 64"))
    assert "note: the stages are trained with max_source_length 64, and evaluated with 1024: the losses are those of " \
        "texts that are cut otherwise\n" in capsys.readouterr().out


def test_a_changed_recipe_repeats_a_job(checkpoint, tasks, tmp_path):
    jobs = jobs_of(ExperimentConfig(size="tiny", data=str(tasks), out=str(tmp_path), order=("simp",), models=("llm",),
                                   init_llm=str(checkpoint)))
    names = [[str(path).rpartition("configs/")[2] for path in job.inputs if "configs/" in str(path)] for job in jobs]
    assert names == [["task/simp.toml", "eval/sample.toml"], ["train/finetune.toml", "size/tiny.toml"],
                     ["task/simp.toml", "eval/sample.toml"]]


def test_a_changed_file_of_further_flags_repeats_a_job(checkpoint, tasks, tmp_path):
    train, stage, evaluate = (tmp_path / f"{name}.toml" for name in ("train", "stage", "evaluate"))
    for path, text in ((train, "max_steps = 3"), (stage, "weight_decay = 0.1"), (evaluate, "limit = 2")):
        path.write_text(text)
    m0_eval, first, first_eval, second, _ = jobs_of(settings(
        checkpoint, tasks, tmp_path, models=("llm",), order=("simp", "empd"), train_args=f"--config={train}",
        stage_args=("", f"--config '{stage}'"), evaluate_args=f"--config {evaluate}"))
    assert train in first.inputs
    assert stage not in first.inputs
    assert {train, stage} <= set(second.inputs)
    assert all(evaluate in job.inputs for job in (m0_eval, first_eval))
    assert evaluate not in first.inputs


def test_the_time_left_follows_each_scripts_measured_speed():
    pace, train = Pace(100.0), Job(None, ["train.py"], 1000.0)
    assert pace.seconds([train, train]) == 20  # at the speed given
    pace.add(train, 50)
    assert pace.seconds([train, Job(None, ["evaluate.py"], 300.0)]) == 50 + 3


def test_from_nothing_to_the_report_and_continuing_where_it_stopped(checkpoint, tasks, suite_file, tmp_path, capfd,
                                                                   monkeypatch, request):
    words = ["--init_llm", checkpoint, "--models", "llm", "--order", "simp", "--data", tasks, "--out",
             tmp_path / "runs", "--report", tmp_path / "report", "--suite", suite_file, "--train_args",
             "--max_steps 2 --max_train_samples 8 --max_eval_samples 2 --dtype fp32", "--evaluate_args",
             "--limit 2 --dtype fp32"]
    cfg = load(ExperimentConfig, map(str, words))
    with pytest.raises(SystemExit) as failed:
        experiment.main(replace(cfg, launcher="false"))  # a command that fails
    assert failed.value.code == 1
    assert re.search(r"3 jobs, 3 of them to do; about \d+:\d\d:\d\d", capfd.readouterr().out)
    assert not (tmp_path / "runs/llm").exists()
    more = suite_file.with_name("more.toml")  # with a benchmark whose dataset needs a network
    more.write_text(suite_file.read_text() + '[[benchmark]]\nname = "piqa"\ncategory = "Rs"\n')
    monkeypatch.setenv("LM_EVAL_TASKS", str(Path(lm_eval.__file__).parent / "tasks/piqa"))
    request.getfixturevalue("forked_jobs")
    with pytest.raises(UserError, match="2 evaluations are incomplete"):
        experiment.main(replace(cfg, suite=str(more)))
    capfd.readouterr()
    experiment.main(cfg)
    assert "3 jobs, 2 of them to do" in capfd.readouterr().out
    page = (tmp_path / "report/report.html").read_bytes()
    assert b"m1-simp" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    experiment.main(cfg)
    assert "3 jobs, 0 of them to do" in capfd.readouterr().out
    assert (tmp_path / "report/report.html").read_bytes() == page
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
    assert {path.name for path in (tmp_path / "runs/experiment").iterdir()} == {
        "llm-m0-eval.json", "llm-m1-simp.json", "llm-m1-simp-eval.json", "primary.json"}
    with pytest.raises(UserError, match="is 'rise of held-out loss', as named before its first run, not 'KL on held"):
        experiment.main(replace(cfg, primary="KL on held-out text"))


def test_a_missing_file_of_the_suite_is_found_before_anything_runs(checkpoint, tasks, tmp_path, refusal):
    line = refusal((ExperimentConfig, experiment.main), "--init_llm", checkpoint, "--models", "llm", "--data", tasks,
                   "--out", tmp_path / "runs", "--suite", "paper", "--suite_files", tmp_path, "--order", "simp",
                   "--train_args", "--max_source_length 128", "--report", tmp_path / "report")
    assert f"{tmp_path}/mutual.jsonl, the items of mutual_text, does not exist: get the published files" in line
    assert not (tmp_path / "runs").exists()


def test_invalid_items_of_the_suite_are_found_before_anything_runs(checkpoint, tasks, suite_file, tmp_path, refusal):
    suite = shutil.copytree(suite_file.parent, tmp_path / "suite")
    (suite / "items.jsonl").write_text('{"text": "a", "choices": ["b", "c"], "label": 2}\n')
    line = refusal((ExperimentConfig, experiment.main), "--init_llm", checkpoint, "--models", "llm", "--data", tasks,
                   "--out", tmp_path / "runs", "--suite", suite / "suite.toml", "--order", "simp", "--train_args",
                   "--max_source_length 128", "--report", tmp_path / "report")
    assert "items.jsonl: next is not a valid task" in line
    assert not (tmp_path / "runs").exists()


def test_a_stage_of_another_order_is_refused_before_anything_runs(checkpoint, tasks, suite_file, tmp_path, refusal):
    words = ["--init_llm", checkpoint, "--models", "llm", "--data", tasks, "--out", tmp_path / "runs", "--suite",
             suite_file, "--report", tmp_path / "report", "--train_args", "--max_source_length 128"]
    (tmp_path / "runs/llm/m1-simp").mkdir(parents=True)
    line = refusal((ExperimentConfig, experiment.main), *words, "--order", "empd")
    assert f"{tmp_path}/runs/llm/m1-simp is a stage of another order of tasks than empd: choose another --out" in line
    assert not (tmp_path / "runs/experiment").exists()


def test_the_published_experiment(checkpoint, tasks, tmp_path, refusal):
    """Three stages, each with a recipe of its own, as far as the sources say."""
    file = str(ROOT / "configs/experiment/published.toml")
    for task in ("simp", "empd", "inqqg"):
        shutil.copy(tasks / "simp.json", tmp_path / f"{task}.json")
    words = ["--data", str(tmp_path), "--out", str(tmp_path), "--init_llm", str(checkpoint), "--models", "llm",
             "--size", "7b"]
    cfg = load(ExperimentConfig, ["--config", file, *words])
    stages = [load(TrainConfig, list(map(str, job.argv[2:]))) for job in jobs_of(cfg) if job.script == "train.py"]
    assert [(one.task, one.global_batch_size, one.lr_scheduler_type, one.warmup_steps, one.weight_decay,
             one.max_train_samples) for one in stages] == [
        ("simp", 48, "constant", 0, 0.0, None), ("empd", 48, "constant", 0, 0.0, None),
        ("inqqg", 256, "cosine", 100, 0.01, 100_000)]
    for one in stages:
        assert (one.num_train_epochs, one.learning_rate, one.max_grad_norm, one.eval_steps, one.seed,
                one.max_source_length, one.max_target_length) == (3, 2e-5, 0.3, 300, 42, 1024, 256)
    line = refusal((ExperimentConfig, experiment.main), "--config", file, *words, "--order", "simp,empd")
    assert "stage_args has 3 texts for 2 stages" in line


@pytest.mark.parametrize(("flags", "said"), [
    (["--stage_args", "--max_steps 1,--seed 3"], "stage_args: seed cannot be given here"),
    (["--order", "simp,smp"], "unknown task 'smp'"), (["--models", "big"], "unknown models 'big'"),
    (["--methods", "ewk"], "the method 'ewk': unknown method 'ewk', expected one of ewc"),
    (["--methods", "ewc:seed=3"], "the method 'ewc:seed=3': 'seed=3' is not name=value of a setting"),
    (["--methods", "finetune:deepspeed=../x"], "the method 'finetune:deepspeed=../x' names a folder"),
    (["--methods", "vcl:tau=2"], "the method 'vcl:tau=2': tau is 2.0, expected a number above 0 and at most 1"),
    (["--posterior_samples", "-1"], "posterior_samples is -1, expected at least 0"),
    (["--methods", "ewc:strength=3"], "the method 'ewc:strength=3': unknown flag '--strength' (did"),
    (["--methods", "vcl", "--train_args", "--weight_decay 1"], "train_args and the method 'vcl': weight_decay is 1.0"),
    (["--size", "tiny", "--text", "x", "--train_args", "--template chat"], "are trained with the template chat"),
    (["--size", "tiny", "--text", "x", "--stage_args", "--template chat,,"], "with the template alpaca and chat"),
    (["--size", "tiny", "--text", "x", "--train_args", "--template chat", "--evaluate_args", "--template chat"],
     "--template chat needs m0s with a chat template: give --init_llm and --init_stack"),
    (["--train_args", "--learning_rat 1"], "train_args: unknown flag '--learning_rat'"),
    (["--train_args", "--max_train_samples nan"], "train_args: max_train_samples is 'nan', expected a whole number"),
    (["--train_args", "--num_train_epochs inf"], "train_args: num_train_epochs is inf, expected a finite number"),
    (["--train_args", "--num_train_epochs 1e308"], "num_train_epochs is 1e+308, expected a number above 0"),
    (["--train_args", "--max_steps 5 --max_flops 3"], "train_args: max_steps and max_flops each set the length"),
    (["--train_args", "--seed 3 --out=x"], "train_args: out, seed cannot be given here"),
    (["--train_args", "--max_steps 5 --show_settings"], "train_args: show_settings cannot be given here"),
    (["--train_args", "--config gone.toml"], "train_args: gone.toml does not exist"),
    (["--train_args", "'x"], "train_args: \"'x\" is not a command line"),
    (["--evaluate_args", "--limt 2"], "evaluate_args: unknown flag '--limt'"),
    (["--evaluate_args", "--limit inf"], "evaluate_args: limit is 'inf', expected a whole number"),
    (["--evaluate_args", "--suite paper"], "evaluate_args: suite cannot be given here"),
    (["--evaluate_args", "--text x --reference y"], "evaluate_args: reference, text cannot be given here"),
    (["--suite", "none", "--suite_files", "x"], "suite_files is for benchmarks: give --suite"),
    (["--train_args", "--seq_length 0", "--evaluate_args", "--bertscore_layer 0"], "bertscore_layer is 0"),
    (["--seeds=-1"], "seeds is -1, expected at least 0"),
    (["--seeds", str(2 ** 64)], "seeds is 18446744073709551616, expected a whole number below 2**63"),
    (["--gpus", "9" * 30], "expected a whole number below 2**63"),
    (["--size", "tiny", "--text", "x", "--gpus", "4"], "gpus would change nothing, since launcher is not set (default"),
    (["--methods", "ewc,ewc"], "methods has a value twice"),
    (["--seeds", "1,1"], "seeds has a value twice"), (["--rates", "1e-3,0.001"], "rates has a value twice"),
    (["--rates", "1e-3", "--train_args", "--learning_rate 1e-4"], "rates replaces the learning_rate of train_args"),
    (["--rates", "1e-3", "--methods", "vcl:learning_rate=0.2"], "rates replaces the learning_rate of the method 'vcl:"),
    (["--rates", "0"], "rates is 0.0, expected a number above 0"), (["--pairs=-1"], "pairs is -1, expected at least 1"),
    (["--controls", "loss"], "controls lacks flops"),
    (["--models", "llm,base", "--controls", "flops,loss"], "which needs the models llm and stack"),
    (["--size", "tiny", "--text", "x", "--models", "llm,solar"],
     "a base of 2 layers cannot be grown by the factor 4: solar joins two copies of at most 2 layers"),
    (["--size", "tiny", "--text", "x", "--models", "stack,interleave,middle"],
     "middle repeats the layers of the base as stack does: leave one of these models out"),
    (["--size", "tiny", "--text", "x", "--models", "stack,big"], "unknown models 'big'"),
    (["--pairs", "1", "--init_llm", "x"], "pairs and the loss control pretrain m0: leave out --init_llm"),
    (["--size", "tiny", "--text", "x", "--primary", "rise of loss"], "unknown primary measure 'rise of loss'"),
    (["--size", "tiny", "--text", "x", "--primary", "loss of accuracy, RD"], "; loss of accuracy, DK; loss "),
    (["--size", "tiny", "--text", "x", "--primary", "loss of accuracy, Bias"], "unknown primary measure 'loss of acc"),
    (["--size", "tiny", "--text", "x", "--order", "simp", "--primary", "rise of earlier tasks' losses"],
     "needs another task before the last one"),
    (["--size", "tiny", "--text", "x", "--rates", "1e-3,3e-3", "--primary", "loss of accuracy, DK"],
     "is of benchmarks, which run at one of the rates only"),
    (["--size", "7b"], "the primary measure, rise of held-out loss, needs a held-out text: give --text, or another "),
    (["--size", "7b", "--text", "x", "--pairs", "1"], "the m0 of the size 7b is published, so that there is one pair "),
    ([], "--size is missing, by which llm is pretrained: give it, or --init_llm"),
    (["--size", "tiny", "--text", "x", "--suite", "smple"], "unknown suite 'smple', expected one of local, paper"),
    (["--size", "tiny", "--text", "x", "--data", "gone"], "gone/simp.json does not exist: make it")])
def test_invalid_experiments(refusal, tmp_path, flags, said):
    words = ["--data", tmp_path, "--out", tmp_path / "out", *flags]
    assert said in refusal((ExperimentConfig, experiment.main), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1]", "null", '{"command": ', "\0", '{"command": NaN}', "[" * 100_000])
def test_a_damaged_record_of_a_job_is_named(tmp_path, content):
    job, record = Job(tmp_path / "llm/m0", ["train.py"]), tmp_path / "experiment/llm-m0.json"
    for folder in (record.parent, job.out):
        folder.mkdir(parents=True)
    record.write_text(content)
    with pytest.raises(UserError) as error:
        Ledger(tmp_path).unchanged(job)
    assert str(error.value).startswith(f"{record}")
    assert str(error.value).endswith("; remove it: the job is then run again")


def test_a_damaged_file_of_a_task_is_found_when_the_jobs_are_planned(checkpoint, tasks, tmp_path, refusal):
    task = json.loads((tasks / "simp.json").read_text())
    task["test"][0]["src_info"]["normal_sentence"] = 3
    (tmp_path / "simp.json").write_text(json.dumps(task))
    line = refusal((ExperimentConfig, experiment.main), "--init_llm", checkpoint, "--models", "llm", "--order", "simp",
                   "--data", tmp_path, "--out", tmp_path / "runs", "--dry_run")
    assert "simp.json: test[0] is not an item whose 'src_info' has a text as 'normal_sentence'" in line


def test_a_suite_whose_file_is_not_text_is_found_when_the_jobs_are_planned(checkpoint, tasks, tmp_path, refusal):
    (tmp_path / "suite.toml").write_text('[[benchmark]]\nname = "x"\ncategory = "DK"\nfile = ["items.jsonl"]\n')
    line = refusal((ExperimentConfig, experiment.main), "--init_llm", checkpoint, "--models", "llm", "--order", "simp",
                   "--data", tasks, "--out", tmp_path / "runs", "--suite", tmp_path / "suite.toml", "--dry_run")
    assert "suite.toml: the file of a [[benchmark]] is not text" in line


@pytest.mark.parametrize(("flags", "said"), [
    (["--out", "FOLDER/file/runs"], "cannot write FOLDER/file/runs: a part of that path is a file"),
    (["--report", "FOLDER/file"], "cannot write FOLDER/file: a part of that path is a file"),
    (["--report", "FOLDER/link"], "cannot write FOLDER/link: "), (["--report", "/proc/x"], "cannot write /proc/x "),
    (["--out", "x" * 300], "File name too long"),
    (["--methods", "ewc:ewc_strength=1" + "0" * 300], "File name too long"),
    (["--suite", "FOLDER/suite.toml"], "items.jsonl does not exist"),
    (["--train_args", "--wandb x"], "--wandb needs the package wandb"),
    (["--train_args", "--deepspeed gone.json"], "gone.json does not exist"),
    (["--train_args", "--max_source_length 1800"], "samples may have 2056 tokens, more than the model's max_position_"),
    (["--evaluate_args", "--max_source_length 2000"], "samples may have 2256 tokens, more than the model's"),
    (["--evaluate_args", "--max_target_length 1500"], "samples may have 2524 tokens, more than the model's"),
    (["--text", "FOLDER/file", "--evaluate_args", "--text_length 3000"], "samples may have 3000 tokens, more than"),
    (["--text", "FOLDER", "--evaluate_args", "--text_tokens 99"], "text_tokens in evaluate_args is 99, less than a w"),
    (["--methods", "replay", "--text", "FOLDER/file"], "file is not a directory of token shards, from which"),
    (["--methods", "replay", "--train_args", "--replay_text FOLDER/none"], "none is not a directory of token shards"),
    (["--evaluate_args", "--bertscore_model ENCODER --bertscore_layer 2"], "pip install bert-score")])
def test_what_would_fail_after_hours_fails_before_the_first_job(checkpoint, tasks, suite_file, tmp_path, monkeypatch,
                                                                refusal, flags, said):
    monkeypatch.setattr(experiment, "run_command", lambda words: pytest.fail(f"{words} was run"))
    monkeypatch.setattr(experiment, "machine_speed", lambda: 1e9)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone")
    shutil.copy(suite_file, tmp_path)  # without its items
    words = ["--init_llm", checkpoint, "--models", "llm", "--order", "simp", "--data", tasks, "--suite", suite_file,
             "--out", tmp_path / "runs", "--report", tmp_path / "report",
             *(word.replace("FOLDER", str(tmp_path)).replace("ENCODER", str(checkpoint)) for word in flags)]
    assert said.replace("FOLDER", str(tmp_path)) in refusal((ExperimentConfig, experiment.main), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link", "suite.toml"}


def test_a_held_out_text_without_a_window_is_found_before_the_first_job(checkpoint, tasks, tokenizer_dir, tmp_path,
                                                                         monkeypatch, refusal):
    monkeypatch.setattr(experiment, "run_command", lambda words: pytest.fail(f"{words} was run"))
    monkeypatch.setattr(experiment, "machine_speed", lambda: 1e9)
    (tmp_path / "text").mkdir()
    write_shards(tmp_path / "text", [f"{number} words" for number in range(400)], Tokenizer(tokenizer_dir), {})
    assert "the shards val-*.npy have at most " in refusal(
        (ExperimentConfig, experiment.main), "--init_llm", checkpoint, "--models", "llm", "--order", "simp", "--data",
        tasks, "--suite", "none", "--text", tmp_path / "text", "--out", tmp_path / "runs")


def test_a_failure_is_not_an_incomplete_evaluation(tmp_path, monkeypatch):
    """missing.json of an earlier run does not excuse this one."""
    def fail(words):
        raise SystemExit(1)

    monkeypatch.setattr(experiment, "run_command", fail)
    job = Job(tmp_path / "llm/m0/eval", ["evaluate.py"], 1.0)
    job.out.mkdir(parents=True)
    (job.out / "missing.json").write_text("{}")
    os.utime(job.out / "missing.json", (1, 1))
    with pytest.raises(SystemExit):
        experiment.run_unfinished([job], [job], Ledger(tmp_path), SimpleNamespace(seconds=lambda jobs: 1.0))


def test_the_loss_control_trains_the_model_that_is_behind(tasks, suite_file, tmp_path, monkeypatch):
    """The commands are replaced: stack ends its pretraining at a loss of 4.0, llm at 3.9."""
    made, text = [], tmp_path / "text"

    def run(words):
        out = Path(words[words.index("--out") + 1])
        out = out / "m0" if words[1].endswith("pretrain.py") else out
        out.mkdir(parents=True, exist_ok=True)
        (out / "meta.json").write_text("{}")
        loss = 4.0 if "stack" in str(out) else 3.9
        write_json(out / "run.json", {"settings": {}, "result": {"eval_loss_after": loss}})
        made.append(str(out))

    for name, replacement in (("run_command", run), ("machine_speed", lambda: 1e9),
                              ("check_before_running", lambda *_: None)):
        monkeypatch.setattr(experiment, name, replacement)
    text.mkdir()
    (text / "meta.json").write_text("{}")
    experiment.main(ExperimentConfig(size="tiny", text=str(text), data=str(tasks), suite=str(suite_file),
                                     out=str(tmp_path / "runs"), order=("simp",), controls=("flops", "loss"),
                                     models=("llm", "stack", "base")))
    assert {name for name in ("llm-level", "stack-level", "base-level") if any(name in out for out in made)} == {
        "stack-level"}
