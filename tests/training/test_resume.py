"""Runs that were interrupted: after they are resumed, they equal uninterrupted runs."""
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.distributed import free_port
from common.files import UserError, read_json
from common.provenance import differences
from model.checkpoint import checkpoint_digest
from model.parameter_files import ParameterFiles
from tests.conftest import ROOT, TORCHRUN, error_line, losses, read_metrics
from train import main
from training import resume, run_directory
from training.batches import GlobalBatch
from training.checks import source_digests
from training.deepspeed_config import deepspeed_config
from training.resume import read_state, write_state
from training.run_directory import claim
from training.train_config import TrainConfig
from training.train_state import StepResult, TrainState

FLAGS = ["--max_steps", "9", "--warmup_steps", "2", "--lr_scheduler_type", "cosine", "--weight_decay", "0.1",
         "--eval_steps", "3", "--save_minutes", "0"]


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """The directory of a run that is not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "m1"
    train(out)
    return out


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """The working directory of a run that was killed in its fifth step."""
    out = tmp_path_factory.mktemp("killed") / "m1"
    assert train(out, interrupted=(5, "SIGKILL", "all")).returncode == -9
    return out.with_name("m1.partial")


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def killed_copy(killed, tmp_path):
    """(--out, working directory) of a copy of the killed run."""
    return tmp_path / "m1", shutil.copytree(killed, tmp_path / "m1.partial")


@pytest.mark.parametrize("zero", ["1", "3"])
def test_a_killed_run_resumes_bit_for_bit(train, tmp_path, zero):
    flags = "--zero", zero, "--dtype", "bf16"
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train(uninterrupted, *flags, launcher=2)
    train(resumed, *flags, launcher=2, interrupted=(5, "SIGKILL", 1))
    assert not resumed.exists()
    assert "resuming after step 4" in train(resumed, *flags, launcher=2).stdout
    assert losses(resumed) == losses(uninterrupted)
    assert same_weights(resumed, uninterrupted)
    assert not (resumed / "resume").exists()
    records = json.loads((resumed / "run.json").read_text())["resumed"]
    assert [(record["after_step"], record["processes"]) for record in records] == [(4, 2)]


def test_a_run_resumes_with_another_world_size_and_zero_stage(train, uninterrupted, tmp_path):
    """Two processes, then three (slices of tensors are padded), then one, then two."""
    out = tmp_path / "m1"
    train(out, "--zero", "2", "--offload", launcher=2, interrupted=(3, "SIGKILL", 0))
    train(out, "--zero", "3", launcher=3, interrupted=(3, "SIGKILL", 2))
    train(out, "--zero", "0", interrupted=(3, "SIGKILL", 0))
    assert "resuming after step 6" in train(out, "--zero", "3", launcher=2).stdout
    assert losses(out) == pytest.approx(losses(uninterrupted), rel=2e-6)


def test_a_signal_saves_the_state_after_the_step(train, uninterrupted, tmp_path):
    out = tmp_path / "m1"
    result = train(out, "--save_minutes", "99", interrupted=(4, "SIGTERM", "all"))
    assert result.returncode == 75
    assert "stopped by a signal after step 4 of 9: the same command resumes from there" in result.stdout
    assert "Traceback" not in result.stderr
    assert "resuming after step 4" in train(out).stdout
    assert losses(out) == losses(uninterrupted)
    assert same_weights(out, uninterrupted)


def test_an_unexpected_error_names_its_rank_in_one_line(train, tmp_path):
    patch = ("import os; train_step = train.train_step\n"
             "train.train_step = lambda *args: 1 / 0 if os.environ['RANK'] == '1' else train_step(*args)")
    result = train(tmp_path / "m1", launcher=2, patch=patch, check=False)
    assert result.returncode
    assert "error on rank 1: ZeroDivisionError: division by zero" in result.stderr.splitlines()


def test_a_state_with_missing_values_is_refused(tmp_path):
    save_file({"master/w@0": torch.arange(4.0), "master/w@6": torch.arange(6.0, 8.0)}, tmp_path / "rank-0.safetensors")
    saved = ParameterFiles([tmp_path / "rank-0.safetensors"], "the saved state")
    into = torch.empty(2)
    saved.read("master", "w", 2, into)
    assert into.tolist() == [2, 3]
    with pytest.raises(UserError, match="the saved state has 4 of the 6 values of master of w"):
        saved.read("master", "w", 2, torch.empty(6))


def test_a_damaged_state_is_refused(train, killed_copy):
    out, directory = killed_copy
    file = directory / "resume/step-4/rank-0.safetensors"
    content = file.read_bytes()
    flipped = content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]
    for damaged in (flipped, content[:-100]):
        file.write_bytes(damaged)
        line = error_line(train(out, check=False))
        assert f"{file} is damaged" in line
        assert f"remove {file.parent} to train again" in line
    file.unlink()
    assert "is incomplete, rank-0.safetensors is missing" in error_line(train(out, check=False))
    assert [path.name for path in (directory / "resume").iterdir()] == ["step-4"]


def test_the_state_of_another_run_is_refused(train, killed_copy):
    out, directory = killed_copy
    folder = directory / "resume/step-4"
    write_state(folder, read_state(folder) | {"run": "0" * 64})
    assert "step-4 is the state of a run other than" in error_line(train(out, check=False))
    assert "seed is 42 there and 1 here" in error_line(train(out, "--seed", "1", check=False))


def test_another_tokenizer_is_refused(train, killed_copy, checkpoint, tmp_path):
    """The weights and the data are the same, but the ids of the texts are not."""
    out, _ = killed_copy
    renamed = shutil.copytree(checkpoint, tmp_path / "renamed")
    content = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (renamed / "tokenizer.json").write_text(json.dumps(content))
    assert "different: the tokenizer files (" in error_line(train(out, init=renamed, check=False))


def test_a_setting_that_a_record_lacks_had_its_default():
    record = {"settings": {"tau": 1.0}, "data_digest": "d", "tokenizer_digest": "t"}
    assert differences(record, record | {"settings": {}}, {"tau": 1.0}) == []
    assert differences(record, record | {"settings": {}}, {"tau": 0.5}) == ["tau is 0.5 there and 1.0 here"]
    assert differences(record, record | {"tokenizer_digest": "u"}, {}) == [
        "different: the tokenizer files (u there, t here)"]


def test_the_saved_state_is_safetensors_with_each_value_once(killed, checkpoint):
    folder = killed / "resume/step-4"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.safetensors", "state.json"]
    with safe_open(folder / "rank-0.safetensors", "pt") as file:
        kinds = [key.partition("/")[0] for key in file.keys()]  # noqa: SIM118
        values = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert set(kinds) == {"master", "exp_avg", "exp_avg_sq"}
    assert values == 3 * sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_ranks_with_different_data_are_refused(train, simp_file, tmp_path):
    """Each process opens the same relative path in its own folder, as on nodes with local disks."""
    splits = json.loads(simp_file.read_text())
    splits["train"].pop()
    shutil.copytree(simp_file.parent, tmp_path / "0")
    (tmp_path / "1").mkdir()
    (tmp_path / "1/simp.json").write_text(json.dumps(splits))
    result = train(tmp_path / "m1", data="simp.json", launcher=2, check=False,
                   patch=f"import os; os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
                         "os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "not the same on all nodes: simp.json (digest " in lines[0]
    assert "on rank 1): copy the files there again, or use a shared folder" in lines[0]


def test_nodes_without_a_shared_folder_are_refused(train, tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "0/m1.partial").mkdir()
    (tmp_path / "0/m1.partial/shared-1.writing").touch()  # of a process that was killed
    patch = (f"import os; os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
             "os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')\n"
             "from training import run_directory; run_directory.SHARED_SECONDS = 0.1")
    result = train("m1", launcher=2, check=False, patch=patch)
    line, = (line for line in result.stderr.splitlines() if line.startswith("error"))
    assert "m1.partial is not the same folder on all nodes: choose an --out on a file system that they share" in line
    assert "(on rank 1)" in line
    assert not list(tmp_path.rglob("m1*/*"))


def test_nodes_with_different_checkpoints_are_refused(train, checkpoint, tmp_path):
    """Two processes with one device each, as on two nodes."""
    for rank in "01":
        shutil.copytree(checkpoint, tmp_path / rank / "m0")
    tokenizer = tmp_path / "1/m0/tokenizer_config.json"
    tokenizer.write_text(json.dumps(read_json(tokenizer) | {"model_max_length": 7}))
    patch = (f"import os; os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
             "os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')")
    result = train(tmp_path / "m1", init="m0", launcher=2, check=False, patch=patch)
    line, = (line for line in result.stderr.splitlines() if line.startswith("error"))
    assert "not the same on all nodes: the tokenizer files of m0 (digest " in line
    assert "on rank 1): copy the files there again, or use a shared folder" in line


@contextlib.contextmanager
def changed_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    yield
    path.write_bytes(content)


def test_all_that_a_run_reads_from_a_checkpoint_is_compared(checkpoint, tmp_path):
    m0, m1 = (shutil.copytree(checkpoint, tmp_path / name) for name in ("m0", "m1"))
    fisher = m1 / "fisher-00001-of-00001.safetensors"
    fisher.write_bytes(b"Fisher")
    cfg = TrainConfig(init=str(m1), ewc_strength=1.0, input_kl=1.0)
    lineage = {"tasks": [{"task": "simp"}], "start": {"init": str(m0), "digest": checkpoint_digest(m0)}}
    digests = source_digests(cfg, m1, lineage)
    for path, name in ((m1 / "model.safetensors", "parent_digest"), (m1 / "tokenizer.json", "tokenizer_digest"),
                       (fisher, "side_digest")):
        with changed_last_byte(path):
            changed = source_digests(cfg, m1, lineage)
        assert {key for key in digests if changed[key] != digests[key]} == {name}
    with changed_last_byte(m0 / "model.safetensors"), pytest.raises(UserError, match="started from, has changed"):
        source_digests(cfg, m1, lineage)


SPIKES = "--max_steps", "16", "--skip_loss_above", "0.98", "--learning_rate", "1e-3"


@pytest.fixture(scope="module")
def with_spikes(train, tmp_path_factory):
    """The directory of a run with loss spikes: a loss above 0.98 times the mean of the last steps counts as one."""
    out = tmp_path_factory.mktemp("spikes") / "m1"
    train(out, *SPIKES)
    return out


def test_the_same_loss_spikes_are_skipped_under_every_zero_stage(train, with_spikes, tmp_path):
    entries = read_metrics(with_spikes)[0]
    skipped = [entry for entry in entries if "skipped_samples" in entry]
    assert skipped
    assert all(entry["step"] > 10 and len(entry["skipped_samples"]) == 8 for entry in skipped)
    for spike in skipped:
        earlier = [entry["loss"] for entry in entries if entry["step"] < spike["step"] and entry not in skipped]
        assert spike["loss"] > 0.98 * sum(earlier) / len(earlier)
    for zero, extra, rel in (("1", [], 2e-6), ("2", ["--dtype", "bf16", "--offload"], 2e-3),
                             ("3", ["--offload"], 2e-6)):
        train(tmp_path / zero, *SPIKES, "--save_minutes", "99", "--zero", zero, *extra, launcher=2)
        assert [entry["loss"] for entry in read_metrics(tmp_path / zero)[0]] == \
            pytest.approx([entry["loss"] for entry in entries], rel=rel)


def test_the_directory_is_locked_from_the_checks_on(train, checkpoint, simp_file, tmp_path):
    """The second run starts while the first one still builds its model."""
    patch = (f"import pathlib, time; build = train.build_model; built = pathlib.Path({str(tmp_path)!r}, 'go')\n"
             "def slow(run):\n"
             "    while not built.exists(): time.sleep(0.01)\n"
             "    return build(run)\n"
             "train.build_model = slow")
    out, partial = tmp_path / "m1", tmp_path / "m1.partial"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(train, out, patch=patch)
        while not partial.exists() and not first.done():
            time.sleep(0.01)
        second = train(out, check=False, launcher=[sys.executable])  # the process that forks waits for the first run
        assert f"another process is using {partial}" in error_line(second)
        (tmp_path / "go").touch()
        assert first.result().returncode == 0
    assert "is finished already" in train(out).stdout
    assert not partial.exists()


def test_a_run_that_is_killed_while_it_is_prepared_starts_again(train, tmp_path):
    partial = tmp_path / "m1.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"settings": {}}')
    (partial / "model.safetensors").touch()
    removed = []
    with mock.patch.object(run_directory, "remove", removed.append):
        run_directory.start_run(partial, {})
    assert removed[-1].name == "run.json"
    (partial / "run.json").unlink()
    (partial / "model.safetensors").unlink()
    (partial / ".run.json.0123abcd.writing").touch()
    assert "step 1/" in train(tmp_path / "m1", "--max_steps", "1").stdout


def test_a_directory_that_is_not_that_of_a_run_is_left_alone(train, tmp_path):
    partial = tmp_path / "m1.partial"
    partial.mkdir()
    (partial / "checkpoint-notes.txt").write_text("mine")
    assert f"{partial} exists and is not that of a run" in error_line(train(tmp_path / "m1", check=False))
    assert (partial / "checkpoint-notes.txt").read_text() == "mine"


def test_a_file_system_without_locks_is_reported(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with claim(tmp_path / "m1"):
        assert (tmp_path / "m1.partial").is_dir()
    assert "m1.partial cannot be locked (No locks available): do not start" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_settings_replace_a_run_without_anything_to_keep(train, killed_copy):
    out, directory = killed_copy
    assert "seed is 42 there and 1 here" in error_line(train(out, "--seed", "1", check=False))
    shutil.rmtree(directory / "resume")
    assert "starting from the beginning" in train(out, "--seed", "1", "--max_steps", "1").stdout


def test_a_kill_within_an_epochs_checkpoint_does_not_hinder_the_next_start(train, tmp_path):
    """The second epoch's checkpoint is half-written when the process is killed."""
    flags = "--max_steps", "6", "--max_train_samples", "16", "--eval_steps", "9"
    patch = ("import os, signal, training.engine as engine\n"
             "write = engine.write_checkpoint\n"
             "def killed(folder, *args):\n"
             "    write(folder, *args)\n"
             "    if 'checkpoint-4' in folder.name: os.kill(os.getpid(), signal.SIGKILL)\n"
             "engine.write_checkpoint = killed")
    assert train(tmp_path / "m1", *flags, patch=patch, check=False).returncode == -9
    (left,) = (tmp_path / "m1.partial").glob(".*")
    assert (left / "model.safetensors").exists()
    assert "resuming after step 3" in train(tmp_path / "m1", *flags).stdout
    assert not left.exists()
    train(tmp_path / "whole", *flags)
    assert same_weights(tmp_path / "m1", tmp_path / "whole")


@pytest.mark.parametrize("change", [
    lambda state: state | {"files": ["rank-0.safetensors"]}, lambda state: state | {"progress": 3},
    lambda state: state | {"files": {"../../../etc/passwd": "0"}},
    lambda state: state | {"progress": state["progress"] | {"step": "4"}},
    lambda state: state | {"progress": state["progress"] | {"losses": [None]}},
    lambda state: state | {"progress": state["progress"] | {"unknown": 1}},
])
def test_a_damaged_record_of_the_state_is_refused(train, killed_copy, change):
    out, directory = killed_copy
    folder = directory / "resume/step-4"
    write_state(folder, change(read_state(folder)))
    assert f"{folder}/state.json" in error_line(train(out, check=False))


@pytest.mark.parametrize("change", [
    lambda state: [], lambda state: state | {"optimizer_step": 0}, lambda state: state | {"optimizer_step": 3},
    lambda state: state | {"progress": state["progress"] | {"tokens": 1}}])
def test_a_record_of_the_state_that_was_changed_is_refused(train, killed_copy, change):
    out, directory = killed_copy
    file = directory / "resume/step-4/state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert str(file) in error_line(train(out, check=False))


def test_two_processes_do_not_work_in_one_directory(train, killed_copy):
    out, directory = killed_copy
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a run that works there
    assert f"another process is using {directory}" in error_line(train(out, check=False))
    os.close(descriptor)
    assert "resuming after step 4" in train(out).stdout


def test_the_state_of_a_finished_run_is_removed(train, uninterrupted):
    (uninterrupted / "resume").mkdir()
    assert "is finished already" in train(uninterrupted).stdout
    assert not (uninterrupted / "resume").exists()


def test_a_finished_run_is_finished_on_machines_with_another_default_dtype(train, uninterrupted):
    patch = "import torch; torch.cpu.get_capabilities = lambda: {'bf16': True}"
    assert "is finished already" in train(uninterrupted, "--dtype", "auto", patch=patch).stdout


@pytest.mark.parametrize(("content", "message"), [
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
     "bf16.enabled is True there and False by the run's settings"),
    ({"zero_optimization": {"stage": 3}, "gradient_clipping": 5.0},
     "gradient_clipping is 5.0 there and 0.3 by the run's settings"),
    ({"zero_optimization": {"stage": 2}, "train_batch_size": 7}, "train_batch_size is 7 there and 32 by"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
     "zero_optimization.offload_param.device is nvme, expected cpu: weights and moments are saved from memory"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads is set, but"),
    ({"optimizer": {"type": "Adam"}}, "optimizer is set, but train.py has its own"),
    ([], "ds.json: expected an object, found a list"),
    ({"zero_optimization": "stage 2"}, "zero_optimization is 'stage 2', expected an object with a stage from 0 to 3"),
    ({"zero_optimization": {"stage": 7}}, "expected an object with a stage from 0 to 3"),
    ({"zero_optimization": {"stage": 1, "reduce_buckets": 5}}, "DeepSpeed does not accept its configuration: "),
    ({"flops_profiler": {"enabled": []}}, "DeepSpeed does not accept"),
    ({"memory_breakdown": "yes"}, "memory_breakdown is 'yes', expected true or false"),
    ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0 there and 1.0 by the run's settings"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled is True there and False"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
     "zero_optimization.round_robin_gradients is True there and False by the run's settings"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size is 2 there and 1 by"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
     "zero_optimization.offload_optimizer.ratio is 0.5 there and 1.0 by the run's settings"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is set, which train.py does not support"),
    ({"fp16": {"enabled": True}}, "fp16 is set, but train.py has its own"),
])
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(refusal, checkpoint, simp_file, tmp_path,
                                                               content, message):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = "--task", "simp", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "m1", "--dtype", "fp32"
    assert message in refusal((TrainConfig, main), *flags, "--deepspeed", tmp_path / "ds.json")
    if "zero_optimization" in content and " there and " in message:
        assert "zero_optimization.stage is" in refusal((TrainConfig, main), *flags, "--zero", "1",
                                                       "--deepspeed", tmp_path / "ds.json")


def test_the_stage_of_a_deepspeed_file_is_checked_against_the_settings(refusal, checkpoint, simp_file, tmp_path):
    flags = "--task", "simp", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "m1"
    folder = ROOT / "configs/deepspeed"
    assert "zero0.json: ZeRO 0 keeps no fp32 master weights of a bf16 model" in refusal(
        (TrainConfig, main), *flags, "--deepspeed", folder / "zero0.json", "--dtype", "bf16")
    assert "--compile needs --zero 0, 1 or 2" in refusal(
        (TrainConfig, main), *flags, "--deepspeed", folder / "zero3.json", "--dtype", "fp32", "--compile")


@pytest.mark.parametrize("zero", [0, 1])
def test_the_clipping_in_a_deepspeed_file_may_be_that_of_the_settings(zero, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": zero}, "gradient_clipping": 0.3}))
    cfg = TrainConfig(deepspeed=str(tmp_path / "ds.json"), zero=zero, dtype="fp32", max_grad_norm=0.3)
    assert deepspeed_config(cfg)["gradient_clipping"] == (0.3 if zero else 0.0)  # without ZeRO train.py clips
    with pytest.raises(UserError, match="gradient_clipping is 0.3 there and 0.5 by the run's settings"):
        deepspeed_config(dataclasses.replace(cfg, max_grad_norm=0.5))


def test_your_own_deepspeed_file(train, uninterrupted, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({
        "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "steps_per_print": {},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto",
                              "round_robin_gradients": False}}))
    train(tmp_path / "m1", "--deepspeed", tmp_path / "ds.json", launcher=2)
    assert json.loads((tmp_path / "m1/run.json").read_text())["settings"]["zero"] == 2
    assert losses(tmp_path / "m1") == pytest.approx(losses(uninterrupted), rel=2e-6)


def test_two_launchers_form_one_run(train, uninterrupted, tmp_path):
    """Two torchruns on this machine stand for two nodes."""
    launcher = [TORCHRUN[0], "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "1",
                "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(train, tmp_path / "m1", launcher=launcher) for _ in range(2)]
    assert [node.result().returncode for node in nodes] == [0, 0]
    assert losses(tmp_path / "m1") == pytest.approx(losses(uninterrupted), rel=2e-6)


def test_the_line_of_a_skipped_step_has_no_norm():
    state = TrainState()
    for norm, shown in ((0.5, "norm   0.500  "), (math.nan, "norm       –  ")):
        result = StepResult(2.0, norm, 1.0)
        state.add_step(GlobalBatch([0], [(np.array([1, 2]), 1)], [], [], False), result, 1.0, 0.0)
        assert shown in state.progress_line(9, result, 1e-3)


def test_a_skipped_step_names_what_it_read():
    sample, result = (np.array([1, 2]), 1), StepResult(2.0, math.nan, 1.0)
    for batch, numbers, text in (
            (GlobalBatch([7], [sample], [], [], False), {"skipped_samples": [7]}, "samples [7]"),
            (GlobalBatch([7, 3], [sample] * 2, [19], [sample], False),
             {"skipped_samples": [7, 3], "skipped_windows": [19]}, "samples [7, 3], windows [19]")):
        entry = TrainState().log_entry(batch, result, 1e-3, 1.0)
        assert {key: value for key, value in entry.items() if key.startswith("skipped")} == numbers
        assert str(batch) == text


def test_the_limit_of_a_loss_spike_by_hand():
    def limit(steps):
        state, batch = TrainState(), GlobalBatch([0], [(np.array([1, 2]), 1)], [], [], False)
        for loss, norm in steps:
            state.add_step(batch, StepResult(loss, norm, 1.0), 1.0, 0.0)
        return state.max_loss(3.0)
    assert limit([(2.0, 1.0)] * 9) == math.inf
    assert limit([(2.0, 1.0)] * 10 + [(99.0, math.nan)]) == pytest.approx(6.0)  # a skipped step does not count
    assert limit([(9.0, 1.0)] * 50 + [(1.0, 1.0)] * 50) == pytest.approx(3.0)  # of the last 50 steps


def test_losses_that_stay_high_end_the_run(train, tmp_path):
    """The mean that they are compared with never changes."""
    flags = "--max_steps", "99", "--skip_loss_above", "0.5", "--save_minutes", "0"
    line = error_line(train(tmp_path / "m1", *flags, check=False))
    assert "the last 50 steps were skipped, since their losses exceed 0.5 times the mean before them" in line
    assert len(read_metrics(tmp_path / "m1.partial")[0]) == 60


def test_the_state_is_saved_so_many_minutes_after_the_last_save(monkeypatch):
    clock, saved = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(resume, "save_state", lambda *_: saved.append(clock.now))
    dist = SimpleNamespace(rank=0, all_reduce_sum=lambda *values: list(values))
    run = SimpleNamespace(cfg=TrainConfig(save_minutes=15.0), dist=dist, request=SimpleNamespace(signal=None))
    saver = resume.StateSaver(run, None)
    for clock.now in (890.0, 901.0, 902.0, 1790.0, 1802.0):
        saver.save_or_stop(SimpleNamespace(step=1), 9)
    assert saved == [901, 1802]


def test_a_resumed_run_skips_the_same_batches_and_counts_the_updates(train, with_spikes, tmp_path):
    first = next(entry["step"] for entry in read_metrics(with_spikes)[0] if "skipped_samples" in entry)
    assert first < 14
    for steps in (first - 1, 2):  # before the first one that is skipped, and after it
        train(tmp_path / "m1", *SPIKES, interrupted=(steps, "SIGTERM", "all"))
    assert f"resuming after step {first + 1}" in train(tmp_path / "m1", *SPIKES).stdout
    assert losses(tmp_path / "m1") == losses(with_spikes)
