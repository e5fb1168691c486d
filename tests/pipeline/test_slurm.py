"""Jobs of a Slurm cluster, run with replacements of Slurm's commands (tests/slurm)."""
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import experiment
from common.files import UserError
from common.settings import load
from corpus.shards import write_shards
from experiment import ExperimentConfig
from model.tokenizer import Tokenizer
from pipeline.jobs import read_slurm_template, submit_command
from pipeline.ledger import Ledger
from tests.conftest import ROOT, TRAIN_FLAGS, losses, run_script

FLAGS = [*TRAIN_FLAGS, "--max_steps", "9"]


def free_job_id():
    """The number of a job whose port (configs/slurm/launch.sh) is free on this machine."""
    for number in random.sample(range(10_000), 10_000):
        with socket.socket() as one, suppress(OSError):
            one.bind(("", 20_000 + number))
            return number
    raise OSError("no port from 20000 to 29999 is free")


JOB = free_job_id()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The commands of a cluster with one node of two tasks. Returns the file that records their calls. SLURM_NTASKS is
    not set for the job's script, as on some clusters."""
    asked = tmp_path / "asked"
    for name, value in {"PATH": f"{ROOT}/tests/slurm:{os.environ['PATH']}", "ASKED": asked, "SLURM_JOB_ID": JOB,
                        "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": 1, "SLURM_NTASKS_PER_NODE": 2,
                        "PYTHON": sys.executable, "LOGS": tmp_path / "logs", "WAIT": 5}.items():
        monkeypatch.setenv(name, str(value))
    return asked


def batch(script, *words, **environment):
    """Runs a job script as Slurm does, in the project's folder."""
    return run_script(script, *words, launcher=["bash"], check=False, **environment)


def test_the_loss_control_is_submitted_when_it_is_known_which_model_is_behind(tmp_path):
    cfg = ExperimentConfig(size="tiny", text="x", data="x", out=str(tmp_path), controls=("flops", "loss"))
    (tmp_path / "llm/m0").mkdir(parents=True)
    (tmp_path / "llm/m0/run.json").write_text('{"result": {"eval_loss_after": 4.0}}')
    with pytest.raises(UserError, match=r"stack/m0 is not finished: submit with --controls flops, and when"):
        experiment.submit(cfg, [], Ledger(tmp_path))
    assert not (tmp_path / "slurm").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/slurm").iterdir()), ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_a_job_that_runs_out_of_time_is_queued_again_and_continues(cluster, checkpoint, simp_file, tmp_path):
    words = ["--init", checkpoint, "--data", simp_file, *FLAGS]
    run_script("train.py", *words, "--out", tmp_path / "whole", launcher=2)
    out, script = tmp_path / "m1", "configs/slurm/train.sbatch"
    stopped = batch(script, *words, "--out", out, "--save_minutes", "0", TERM_WHEN=f"{out}.partial/resume")
    assert stopped.returncode == 75
    assert cluster.read_text() == f"scontrol requeue {JOB}\n"
    logs = [(tmp_path / f"logs/job-{JOB}-rank{rank}.log").read_text() for rank in (0, 1)]
    assert "of 9: the same command resumes from there" in logs[0]
    assert "Traceback" not in logs[0] + logs[1]
    assert batch(script, *words, "--out", out).returncode == 0
    assert cluster.read_text() == f"scontrol requeue {JOB}\n"
    assert "resuming after step" in (tmp_path / f"logs/job-{JOB}-rank0.log").read_text()
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("script", ["train", "pretrain"])
def test_a_job_is_not_queued_again_for_ever(cluster, tmp_path, monkeypatch, script):
    """As where every start takes longer than the time limit."""
    (tmp_path / "stopped").write_text("#!/bin/sh\nexit 75\n")
    (tmp_path / "stopped").chmod(0o755)
    shutil.copy(tmp_path / "stopped", tmp_path / "srun")
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": tmp_path / "stopped"}.items():
        monkeypatch.setenv(name, str(value))
    for restarts, calls in ((99, 1), (100, 1)):
        assert batch(f"configs/slurm/{script}.sbatch", SLURM_RESTART_COUNT=str(restarts)).returncode == 75
        assert cluster.read_text() == calls * f"scontrol requeue {JOB}\n"


def test_pretraining_in_one_job(cluster, tokenizer_dir, tmp_path):
    text, out = shutil.copytree(tokenizer_dir, tmp_path / "text"), tmp_path / "llm"
    write_shards(text, [f"{n} is a number." for n in range(900)], Tokenizer(tokenizer_dir), {"source": "x"})
    args = "--max_flops none --max_steps 9 --save_minutes 0 --dtype fp32 --seq_length 32"
    stopped = batch("configs/slurm/pretrain.sbatch", "--size", "tiny", "--model", "llm", "--data", text, "--out", out,
                    "--args", args, TERM_WHEN=f"{out}/m0.partial/resume")
    assert stopped.returncode == 75
    assert cluster.read_text() == f"scontrol requeue {JOB}\n"
    log = (tmp_path / f"logs/job-{JOB}-rank0.log").read_text()
    assert "on 2 × cpu" in log
    assert "of 9: the same command resumes from there" in log


@pytest.mark.parametrize(("given", "expected"), [({"SLURM_CPUS_PER_TASK": "3"}, "3 3"), ({}, "None None"),
                                                 ({"SLURM_CPUS_PER_TASK": "3", "SRUN_CPUS_PER_TASK": "5"}, "5 5"),
                                                 ({"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "2"}, "3 2")])
def test_each_task_gets_the_cores_of_the_job(cluster, monkeypatch, tmp_path, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # of the tests
    code = "import os; print(*map(os.environ.get, ('SRUN_CPUS_PER_TASK', 'OMP_NUM_THREADS')))"
    assert batch("configs/slurm/launch.sh", "-c", code, **given).returncode == 0
    assert (tmp_path / f"logs/job-{JOB}-rank1.log").read_text() == f"{expected}\n"


def test_a_process_that_hangs_ends_the_job(cluster, checkpoint, simp_file, tmp_path):
    """The other process gives up after its timeout, also in DeepSpeed's collectives, and says so on one line. srun ends
    the rest."""
    result = batch("configs/slurm/launch.sh", "tests/interrupted.py", "3", "SIGSTOP", "1", "train.py", "--init",
                   checkpoint, "--data", simp_file, *FLAGS, "--out", tmp_path / "m1", "--timeout_minutes", "0.15",
                   "--zero", "2", "--max_tokens_per_microbatch", "200", WAIT="1")
    assert result.returncode > 0
    lines = (tmp_path / f"logs/job-{JOB}-rank0.log").read_text().splitlines()
    errors = [line for line in lines if "rror" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: lost the connection to another process, which has died or hangs")


def test_the_jobs_of_an_experiment(cluster, checkpoint, tasks, tmp_path, monkeypatch, capsys):
    cfg = ExperimentConfig(data=str(tasks), out=str(tmp_path / "runs"), init_llm=str(checkpoint), models=("llm",),
                           order=("simp", "empd"), suite=None, report=str(tmp_path / "report"), gpus=2,
                           stage_args=("--train lora --lora_targets q_proj,v_proj", "--max_steps 2"),
                           launcher="slurm", evaluate_args="--limit 2 --dtype fp32")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="sbatch cannot be started"):
            experiment.main(cfg)
    experiment.main(cfg)
    place, kill = tmp_path / "runs/slurm", "--kill-on-invalid-dep=yes"  # else they would wait for ever
    assert f"6 jobs submitted; their scripts and logs: {place}" in capsys.readouterr().out
    assert cluster.read_text().splitlines() == [
        f"sbatch --parsable {place}/llm-m0-eval.sh", f"sbatch --parsable {place}/llm-m1-simp.sh",
        f"sbatch --parsable --dependency=afterok:2 {kill} {place}/llm-m1-simp-eval.sh",
        f"sbatch --parsable --dependency=afterok:2 {kill} {place}/llm-m2-empd.sh",
        f"sbatch --parsable --dependency=afterok:4 {kill} {place}/llm-m2-empd-eval.sh",
        f"sbatch --parsable --dependency=afterany:1:2:3:4:5 {kill} {place}/report.sh"]
    config, = place.glob("settings-*.toml")
    assert replace(load(ExperimentConfig, ["--config", str(config)]), launcher="slurm") == cfg
    for script in place.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        assert "@" not in script.read_text().replace("between @", "").replace("TERM@300", "")
    assert "#SBATCH --gpus-per-node=2" in (place / "llm-m0-eval.sh").read_text()
    assert "#SBATCH --gpus-per-node=1" in (place / "report.sh").read_text()
    result = batch(place / "llm-m0-eval.sh", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", WAIT="60")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/experiment/llm-m0-eval.json").exists()  # the Slurm job has recorded its job
    assert "2 × cpu" in (place / f"job-{JOB}-rank0.log").read_text()
    assert not (tmp_path / "report").exists()


def test_the_log_of_a_job_in_a_folder_with_spaces(cluster, tmp_path):
    """Slurm splits a directive into words as a shell does, and replaces %j by the number of the job."""
    script = tmp_path / "my runs 50%j/m1.sh"
    assert submit_command(["true"], script, read_slurm_template("configs/slurm/step.sbatch"), 1, None) == "1"
    line, = (line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output"))
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--output={tmp_path}/my runs 50%%j/m1.log"]


@pytest.mark.parametrize(("content", "said"), [
    (None, "does not exist"), (b"\xff\x00@COMMAND@", "is not UTF-8 text"), (b"#!/bin/bash\n", "is not a job script"),
    ("folder", "cannot be read: Is a directory")])
def test_a_file_that_is_no_job_script(tmp_path, content, said):
    path = tmp_path / "my.sbatch"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} {said}"):
        read_slurm_template(str(path))
