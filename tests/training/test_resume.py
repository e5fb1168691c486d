"""Runs that are stopped, killed or hang, and what goes on from them: beside runs that nothing happened to."""
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.distributed import free_port
from common.files import UserError
from common.metrics_log import StepLog
from model.parameter_files import ParameterFiles
from tests.conftest import ROOT, error_line, run_script
from train import main
from training.data import compare_digests
from training.train_config import TrainConfig

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
FLAGS = ["--task", "simp", "--global_batch_size", "8", "--max_steps", "9", "--learning_rate", "5e-3",
         "--warmup_steps", "2", "--lr_scheduler_type", "cosine", "--weight_decay", "0.1", "--max_eval_samples", "6",
         "--eval_steps", "3", "--max_source_length", "128", "--max_target_length", "64", "--save_minutes", "0"]


@pytest.fixture(scope="module")
def train(checkpoint, simp_file):
    """A function that runs train.py, or with `interrupted=(step, signal, rank)` until something happens to it."""
    def call(out, *flags, interrupted=None, launcher=(), check=True):
        script = ["tests/interrupted.py", *interrupted, "train.py"] if interrupted else ["train.py"]
        return run_script(*script, "--init", checkpoint, "--data", simp_file, "--out", out, *FLAGS, *flags,
                          launcher=launcher, check=check and not interrupted)
    return call


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """A run in fp32 that nothing happens to."""
    out = tmp_path_factory.mktemp("runs") / "m1"
    train(out, "--dtype", "fp32")
    return out


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """The directory of a run in fp32 that was killed in its fifth step."""
    out = tmp_path_factory.mktemp("killed") / "m1"
    assert train(out, "--dtype", "fp32", interrupted=(5, "SIGKILL", "all")).returncode == -9
    return out


def losses(out):
    """The loss of each step, and each eval loss, by the step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], "loss" if "loss" in line else "eval_loss") for line in lines]
    assert len(set(logged)) == len(logged)
    return {(step, kind): line[kind] for (step, kind), line in zip(logged, lines)}


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy_of(killed, tmp_path):
    """A copy of a killed run's directory; returns what --out has to be."""
    shutil.copytree(killed.with_name("m1.partial"), tmp_path / "m1.partial")
    return tmp_path / "m1"


@pytest.mark.parametrize("flags", [("--zero", "1", "--dtype", "bf16"), ("--zero", "3", "--dtype", "bf16")],
                         ids=["ZeRO 1", "ZeRO 3"])
def test_a_killed_run_goes_on_bit_for_bit(train, tmp_path, flags):
    train(tmp_path / "whole", *flags, launcher=TORCHRUN)
    train(tmp_path / "cut", *flags, launcher=TORCHRUN, interrupted=(5, "SIGKILL", 1))
    assert not (tmp_path / "cut").exists()
    assert "going on after step 4" in train(tmp_path / "cut", *flags, launcher=TORCHRUN).stdout
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert not (tmp_path / "cut/resume").exists()
    resumed = json.loads((tmp_path / "cut/run.json").read_text())["resumed"]
    assert [(one["after_step"], one["processes"]) for one in resumed] == [(4, 2)]


def test_a_run_goes_on_with_other_processes_under_another_stage(train, uninterrupted, tmp_path):
    """Two processes, then three, whose slices of a tensor are padded, then one, then two."""
    out, flags = tmp_path / "m1", ("--dtype", "fp32", "--zero")
    train(out, *flags, "2", "--offload", launcher=TORCHRUN, interrupted=(3, "SIGKILL", 0))
    train(out, *flags, "3", launcher=[*TORCHRUN[:-1], "3"], interrupted=(3, "SIGKILL", 2))
    train(out, *flags, "0", interrupted=(3, "SIGKILL", 0))
    assert "going on after step 6" in train(out, *flags, "3", launcher=TORCHRUN).stdout
    found, expected = losses(out), losses(uninterrupted)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-6)


def test_a_signal_lets_the_step_end_and_saves(train, uninterrupted, tmp_path):
    out = tmp_path / "m1"
    result = train(out, "--dtype", "fp32", "--save_minutes", "99", interrupted=(4, "SIGTERM", "all"))
    assert result.returncode == 75
    assert "stopped by a signal after step 4 of 9: the same command goes on from there" in result.stdout
    assert "Traceback" not in result.stderr
    assert "going on after step 4" in train(out, "--dtype", "fp32").stdout
    assert losses(out) == losses(uninterrupted)
    assert same_weights(out, uninterrupted)


def test_a_second_signal_ends_a_process_at_once():
    code = ("import os, signal, time; from distributed import StopRequest\n"
            "with StopRequest() as request:\n"
            "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5)\n"
            "    print(request.signal, flush=True)  # a launcher's copy of the first does not count\n"
            "    request.since -= 3\n"
            "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still here')")
    result = run_script("-c", code, check=False)
    assert (result.returncode, result.stdout) == (128 + 15, "SIGINT\n")


def test_an_unexpected_error_names_its_rank_in_one_line(checkpoint, simp_file, tmp_path):
    code = ("import os, sys, train\n"
            "train_step = train.train_step\n"
            "def broken(*args): return 1 / 0 if os.environ['RANK'] == '1' else train_step(*args)\n"
            "train.train_step = broken; train.settings.run((train.TrainConfig, train.main), '')")
    (tmp_path / "broken.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    result = run_script(tmp_path / "broken.py", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "m1",
                        *FLAGS, launcher=TORCHRUN, check=False)
    assert result.returncode == 1
    assert "error on rank 1: ZeroDivisionError: division by zero" in result.stderr.splitlines()


def test_a_state_without_some_values_is_refused(tmp_path):
    save_file({"master/w@0": torch.arange(4.0), "master/w@6": torch.arange(6.0, 8.0)}, tmp_path / "rank-0.safetensors")
    saved = ParameterFiles([tmp_path / "rank-0.safetensors"], "the saved state")
    into = torch.empty(2)
    saved.read("master", "w", 2, into)
    assert into.tolist() == [2, 3]
    with pytest.raises(UserError, match="the saved state has 4 of the 6 values of master of w"):
        saved.read("master", "w", 2, torch.empty(6))


def test_a_damaged_state_is_refused(train, killed, tmp_path):
    out = copy_of(killed, tmp_path)
    file = out.with_name("m1.partial") / "resume/step-4/rank-0.safetensors"
    content = bytearray(file.read_bytes())
    for damage in ("flipped byte", "truncated"):
        if damage == "truncated":
            file.write_bytes(content[:-100])
        else:
            content[-1000] ^= 1
            file.write_bytes(content)
            content[-1000] ^= 1
        line = error_line(train(out, "--dtype", "fp32", check=False))
        assert f"{file} is damaged" in line
        assert f"remove {file.parent} to train anew" in line
    file.unlink()
    assert "is incomplete, rank-0.safetensors is missing" in error_line(train(out, "--dtype", "fp32", check=False))
    assert "resume/step-4" in str(next(file.parent.parent.iterdir()))


def test_the_state_of_another_run_is_refused(train, killed, tmp_path):
    out = copy_of(killed, tmp_path)
    state = out.with_name("m1.partial") / "resume/step-4/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"run": "0" * 64}))
    line = error_line(train(out, "--dtype", "fp32", check=False))
    assert "step-4 is the state of another run than" in line
    line = error_line(train(out, "--dtype", "fp32", "--seed", "1", check=False))
    assert "seed is 42 there and 1 here" in line


def test_the_saved_state_is_no_pickle_and_has_each_value_once(killed, checkpoint):
    folder = killed.with_name("m1.partial") / "resume/step-4"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.safetensors", "state.json"]
    with safe_open(folder / "rank-0.safetensors", "pt") as file:
        kinds = [key.partition("/")[0] for key in file.keys()]  # noqa: SIM118
        values = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert set(kinds) == {"master", "exp_avg", "exp_avg_sq"}
    assert values == 3 * sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_a_log_is_cut_back_to_the_step_it_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n{"step": 3}\n{"st')
    StepLog(tmp_path, 2).write(step=3, loss=1)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n' \
                               '{"step": 3, "loss": 1}\n'
    StepLog(tmp_path)
    assert path.read_text() == ""


def test_a_process_with_other_data_is_named(train, checkpoint, simp_file, tmp_path):
    other = json.loads(simp_file.read_text())
    other["train"].pop()
    (tmp_path / "1").mkdir()
    (tmp_path / "1/simp.json").write_text(json.dumps(other))
    shutil.copytree(simp_file.parent, tmp_path / "0")
    # every process looks for the same relative path, in a folder of its own as on nodes with their own disks
    (tmp_path / "run.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
        "import train; train.settings.run((train.TrainConfig, train.main), '')")
    result = run_script(tmp_path / "run.py", "--init", checkpoint, "--data", "simp.json", "--out", tmp_path / "m1",
                        *FLAGS, launcher=TORCHRUN, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "simp.json is not the same on all nodes: digest" in lines[0]
    assert "on rank 1" in lines[0]
    with pytest.raises(UserError, match="aa on rank 0, bb on rank 2"):
        compare_digests("data", ["aa", "aa", "bb"])


def test_a_spike_is_passed_over_alike_under_every_stage(train, tmp_path):
    """A batch whose loss is above the mean of the last steps times 0.98 counts as a spike here, so that some are."""
    flags = "--max_steps", "16", "--skip_loss_above", "0.98", "--learning_rate", "1e-3", "--save_minutes", "99"
    train(tmp_path / "0", *flags, "--dtype", "fp32")
    lines = [json.loads(line) for line in (tmp_path / "0/metrics.jsonl").read_text().splitlines()]
    taken = [line["loss"] for line in lines if "loss" in line]
    skipped = [line for line in lines if "skipped_samples" in line]
    assert skipped
    assert all(line["step"] > 10 and len(line["skipped_samples"]) == 8 for line in skipped)
    for line in skipped:
        earlier = [one["loss"] for one in lines if "loss" in one and one["step"] < line["step"] and one not in skipped]
        assert line["loss"] > 0.98 * sum(earlier) / len(earlier)
    for name, extra, rel in (("1", ["--zero", "1", "--dtype", "fp32"], 2e-6),
                             ("2", ["--zero", "2", "--dtype", "bf16", "--offload"], 2e-3),
                             ("3", ["--zero", "3", "--dtype", "fp32"], 2e-6)):
        train(tmp_path / name, *flags, *extra, launcher=TORCHRUN)
        assert [value for (_, kind), value in losses(tmp_path / name).items() if kind == "loss"] == \
            pytest.approx(taken, rel=rel)


def test_two_processes_do_not_work_in_one_directory(train, killed, tmp_path):
    out = copy_of(killed, tmp_path)
    descriptor = os.open(out.with_name("m1.partial"), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a run that goes on there does
    assert f"another process works in {out}.partial" in error_line(train(out, "--dtype", "fp32", check=False))
    os.close(descriptor)
    assert "going on after step 4" in train(out, "--dtype", "fp32").stdout


def test_a_finished_run_drops_a_state_that_was_left(train, uninterrupted):
    (uninterrupted / "resume").mkdir()
    assert "is finished already" in train(uninterrupted, "--dtype", "fp32").stdout
    assert not (uninterrupted / "resume").exists()


@pytest.mark.parametrize(("content", "said"), [
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
     "bf16.enabled is True there and False by the run's settings"),
    ({"zero_optimization": {"stage": 3}, "gradient_clipping": 5.0},
     "gradient_clipping is 5.0 there and 0.3 by the run's settings"),
    ({"zero_optimization": {"stage": 2}, "train_batch_size": 7}, "train_batch_size is 7 there and 32 by"),
    ({"optimizer": {"type": "Adam"}}, "optimizer is set, but train.py has its own"),
])
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(refusal, checkpoint, simp_file, tmp_path, content, said):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = "--task", "simp", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "m1", "--dtype", "fp32"
    assert said in refusal((TrainConfig, main), *flags, "--deepspeed", tmp_path / "ds.json")
    if "zero_optimization" in content:
        assert "zero_optimization.stage is" in refusal((TrainConfig, main), *flags, "--zero", "1",
                                                       "--deepspeed", tmp_path / "ds.json")


def test_a_deepspeed_file_of_ones_own(train, uninterrupted, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({
        "train_batch_size": "auto", "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}}))
    train(tmp_path / "m1", "--dtype", "fp32", "--deepspeed", tmp_path / "ds.json", launcher=TORCHRUN)
    assert json.loads((tmp_path / "m1/run.json").read_text())["settings"]["zero"] == 2
    assert list(losses(tmp_path / "m1").values()) == pytest.approx(list(losses(uninterrupted).values()), rel=2e-6)


def test_services_that_are_not_installed_are_named(refusal, checkpoint, simp_file, tmp_path):
    flags = "--task", "simp", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "m1"
    assert "needs the package wandb, which is not installed: pip install wandb" in refusal(
        (TrainConfig, main), *flags, "--wandb", "project")


def test_two_launchers_meet(train, uninterrupted, checkpoint, simp_file, tmp_path):
    """Two nodes, each with a torchrun of its own: here both on this machine."""
    launcher = [TORCHRUN[0], "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "1",
                "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    command = [*launcher, "train.py", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "m1", *FLAGS,
               "--dtype", "fp32"]
    nodes = [subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) for _ in range(2)]
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert list(losses(tmp_path / "m1").values()) == pytest.approx(list(losses(uninterrupted).values()), rel=2e-6)
