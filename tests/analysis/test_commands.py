"""The commands to reproduce the runs that a report prints."""
import dataclasses
import json
import shlex
import shutil

import pytest

import experiment
import pretrain
from analysis.results import read_runs
from analysis.tables import reproduction_sections
from common.files import digest, read_json
from common.settings import load
from evaluation.evaluate_config import EvaluateConfig
from pipeline.experiment_jobs import pair_jobs
from pipeline.ledger import Ledger
from tests.conftest import run_script
from training.train_config import TrainConfig

LOADERS = {"train.py": TrainConfig, "pretrain.py": pretrain.PretrainConfig, "evaluate.py": EvaluateConfig}


def printed_commands(runs):
    """The words of each command in a report on a folder of runs, without `python`."""
    text = dict(reproduction_sections(read_runs(runs), runs))["Commands to reproduce the runs"]
    commands = [shlex.split(line) for line in text.strip("`\n").splitlines()]
    assert all(command[0] == "python" for command in commands)
    return [command[1:] for command in commands]


def settings_of(words):
    """The settings that a command gives, by its script."""
    script = words[0].rpartition("/")[2]
    return script, load(LOADERS[script], words[1:])


def write_run(folder, settings):
    """Writes what a report reads of a run."""
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/results_1.json").write_text('{"results": {"piqa": {"acc": 0.5}}}')
    (folder / "run.json").write_text(json.dumps({"settings": dataclasses.asdict(settings)}))


@pytest.fixture
def jobs(tmp_path, tasks, suite_file):
    """The jobs of an experiment: two models pretrained, two tasks, two seeds."""
    cfg = load(experiment.ExperimentConfig, [
        "--size", "tiny", "--order", "simp,empd", "--seeds", "42,43", "--text", str(tmp_path / "some text"),
        "--data", str(tasks), "--suite", str(suite_file), "--out", str(tmp_path / "runs"),
        "--train_args", "--max_steps 2 --max_train_samples 9"])
    return pair_jobs(cfg, None)


def test_commands_that_an_experiment_has_recorded(jobs, tmp_path):
    ledger = Ledger(tmp_path / "runs")
    for job in jobs:
        if job.script != "evaluate.py":
            write_run(job.out, TrainConfig())
        ledger.path(job).parent.mkdir(exist_ok=True)
        ledger.path(job).write_text(json.dumps({"command": job.script_argv}))
    printed = list(map(settings_of, printed_commands(tmp_path / "runs")))
    assert len(printed) == 2 * (2 + 2 * 2 * 2)
    assert all(settings in printed for settings in (settings_of(job.script_argv) for job in jobs))


@pytest.mark.parametrize("model", ["llm", "stack"])
def test_commands_of_runs_without_a_record(jobs, tmp_path, model):
    """They are made from the settings in run.json, here of pretraining with two growths and of fine-tuning."""
    pretraining = load(pretrain.PretrainConfig, [
        "--size", "tiny", "--model", model, "--data", "text", "--out", str(tmp_path / "m"),
        *(["--factors", "2,2", "--at_tokens", "100000,200000"] if model == "stack" else [])])
    commands = [job.script_argv for job in jobs if job.script == "train.py"]
    commands += [[str(word) for word in job.command[1:]] for job in pretrain.pretraining_jobs(pretraining)
                 if str(job.command[1]).endswith("train.py")]
    wanted = [settings_of(words)[1] for words in commands]
    wanted.append(dataclasses.replace(wanted[0], data="--odd", wandb="-1"))
    for number, settings in enumerate(wanted):
        write_run(tmp_path / f"runs/{model}/seed-{number:02}/m0", settings)
    assert [settings_of(words) for words in printed_commands(tmp_path / "runs")] == [
        ("train.py", settings) for settings in wanted]


def test_the_command_of_a_pretrained_model_makes_it_again(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} is a number; {n + 1} comes after it."}) + "\n"
                            for n in range(300)))
    run_script("data_prep.py", "text", "--source", text, "--vocab_size", "300", "--output_path", tmp_path / "shards")
    run = tmp_path / "runs/llm/m0"
    run_script("train.py", "--config", "configs/train/pretrain.toml", "--size", "tiny", "--phase", "llm", "--data",
               tmp_path / "shards", "--out", run, "--seq_length", "32", "--max_flops", "none", "--max_tokens", "256",
               "--num_hidden_layers", "1", "--dtype", "fp32", "--max_eval_samples", "1")
    (run / "eval").mkdir()
    (run / "eval/results_1.json").write_text('{"results": {"piqa": {"acc": 0.5}}}')
    command, = printed_commands(tmp_path / "runs")
    recorded = read_json(run / "run.json"), digest([run / "model.safetensors"])
    shutil.rmtree(run)
    run_script(*command)
    assert digest([run / "model.safetensors"]) == recorded[1]
    assert read_json(run / "run.json")["settings"] == recorded[0]["settings"]
