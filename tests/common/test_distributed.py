"""Process groups, requests to stop, and the data type of a machine."""
import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from unittest import mock

import pytest
import torch

from common.distributed import Distributed, compare_digests, free_port
from common.dtypes import resolve_dtype
from common.files import UserError
from tests.conftest import ROOT, run_script

COLLECTIVES = """
import sys, time
from pathlib import Path
from common.distributed import Distributed
from common.files import UserError

def fail():
    raise UserError("the disk is full")

with Distributed() as dist:
    path = Path(sys.argv[1])
    assert dist.all_reduce_sum(dist.rank + 1, 0.5) == [3.0, 1.0]
    assert dist.scatter([5, 6] if dist.rank == 0 else None) == 5 + dist.rank
    assert dist.gather(10 * dist.rank) == ([0, 10] if dist.rank == 0 else [])
    assert dist.on_rank0(lambda: dist.rank) == 0
    assert dist.on_all_ranks(lambda: dist.rank) == dist.rank
    assert dist.local_rank0_first(lambda: dist.rank == 0 and (time.sleep(0.2) or path.touch()) or path.exists())
    dist.print0(f"{dist.world_size} processes")
    LAST
"""


@pytest.mark.parametrize(("last", "rank"), [("dist.on_all_ranks(fail if dist.rank == 1 else str)", 1),
                                            ("dist.local_rank0_first(fail)", 0)])
def test_collectives_and_an_error_of_one_rank(tmp_path, last, rank):
    result = run_script("-c", COLLECTIVES.replace("LAST", last), tmp_path / "file", check=False, launcher=2)
    assert (result.stdout, result.returncode) == ("2 processes\n", 1), result.stderr
    assert re.findall("UserError: .*", result.stderr) == [f"UserError: the disk is full (on rank {rank})"]


def test_other_files_on_a_node_are_refused():
    files = {"the data": "aa", "the weights": None}
    compare_digests([files, {}, files, {}])
    for other, found in (({"the data": "bb"}, "the data (digest aa on rank 0, bb on rank 2)"),
                         ({"the weights": "cc"}, "the weights (digest None on rank 0, cc on rank 2)"),
                         ({"a posterior": "dd"}, "a posterior (digest None on rank 0, dd on rank 2)")):
        with pytest.raises(UserError, match=re.escape(f"not the same on all nodes: {found}: copy the files there")):
            compare_digests([files, {}, files | other, {}])


def test_a_download_takes_longer_than_the_timeout():
    code = ("import datetime, time; from common.distributed import Distributed\n"
            "with Distributed(datetime.timedelta(seconds=1)) as dist:\n"
            "    with dist.long_timeout(): dist.on_rank0(lambda: time.sleep(1.5))\n"
            "    dist.print0('downloaded')\n"
            "    dist.on_rank0(lambda: time.sleep(1.5))")
    result = run_script("-c", code, launcher=2, check=False)
    assert result.stdout == "downloaded\n"
    assert "lost the connection to another process" in result.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on a node with 1 GPUs: start one for each GPU"), Distributed():
        pass


@pytest.mark.parametrize(("environment", "message"), [
    ({"RANK": "0"}, "WORLD_SIZE is '', expected a whole number from 1 to"),
    ({"RANK": "abc", "WORLD_SIZE": "1"}, "RANK is 'abc', expected a whole number from 0 to 0"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2', expected a whole number from 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, "MASTER_PORT is 'x', expected a whole number from 0 to"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1234"}, "the environment has RANK, but no MASTER_ADDR"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1234", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "gone0"},
     "cannot meet the other processes at 127.0.0.1:1234"),
])
def test_bad_variables_of_a_launcher_are_refused(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)), Distributed():
        pass


def test_a_busy_port_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"cannot meet the other processes at 127.0.0.1:{port} .*EADDRINUSE"), \
                Distributed():
            pass


def test_omp_num_threads_is_respected():
    code = "import torch; from common.distributed import Distributed\n" \
           "with Distributed(): print(torch.get_num_threads())"
    assert run_script("-c", code, OMP_NUM_THREADS="1").stdout.strip() == "1"


@pytest.mark.parametrize(("given", "processes", "set_to"), [
    ({}, 1, [8]), ({}, 2, [4]), ({}, 16, [1]), ({"OMP_NUM_THREADS": "1"}, 2, [4]), ({"OMP_NUM_THREADS": "1"}, 1, []),
    ({"OMP_NUM_THREADS": "3"}, 2, [])])
def test_processes_share_the_cores_of_a_node(monkeypatch, given, processes, set_to):
    """Unless OMP_NUM_THREADS is the user's: torchrun sets it to 1 for several processes."""
    found = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # of the tests
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port())}
    with mock.patch.dict(os.environ, launcher | given), Distributed():
        assert found == set_to


def test_a_second_signal_ends_the_process_at_once():
    code = ("import os, signal, time; from common.stop_request import StopRequest\n"
            "with StopRequest() as request:\n"
            "    request.defers = True\n"
            "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5)\n"
            "    print(request.signal, flush=True)  # a launcher's copy of the first signal does not count\n"
            "    request.since -= 3\n"
            "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still running')")
    result = run_script("-c", code, check=False)
    assert (result.returncode, result.stdout) == (128 + 15, "SIGINT\n")
    assert result.stderr.splitlines() == [
        "SIGINT: stopping after this step, or at the end; a second signal ends the run at once", "ended by SIGTERM"]


def test_a_lost_terminal_is_a_request_to_stop():
    """Output printed afterwards is lost, without an error. Under nohup nothing happens."""
    code = ("import os, signal, sys, time; from common.stop_request import StopRequest\n"
            "with StopRequest() as request:\n"
            "    request.defers = True; os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.5)\n"
            "    print('to nobody', flush=True); os.write(int(sys.argv[1]), str(request.signal).encode())")
    controller, terminal = pty.openpty()
    reader, writer = os.pipe()
    log_reader, log = os.pipe()  # of a `tee` that the same signal has ended
    os.close(log_reader)
    process = subprocess.Popen([sys.executable, "-c", code, str(writer)], cwd=ROOT, stdout=log, stderr=terminal,
                               pass_fds=[writer], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    for end in (terminal, writer, log):
        os.close(end)
    assert os.read(reader, 99) == b"SIGHUP"
    assert process.wait(60) == 0
    os.set_blocking(controller, False)
    with contextlib.suppress(OSError):
        assert os.read(controller, 999) == b""
    ignored = subprocess.run(["nohup", sys.executable, "-c", code, "1"], cwd=ROOT, capture_output=True, check=True)
    assert ignored.stdout == b"to nobody\nNone"


def test_a_signal_ends_a_process_that_has_nothing_to_save():
    """With the status on which Slurm scripts queue a job again."""
    code = ("import os, signal, time; from common.stop_request import StopRequest\n"
            "with StopRequest(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still running')")
    result = run_script("-c", code, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (75, "", "ended by SIGTERM\n")


@pytest.mark.parametrize(("gpu", "supported", "dtype"), [
    (False, {}, "fp32"), (False, {"avx512_bf16": False}, "fp32"), (False, {"avx512_bf16": True}, "bf16"),
    (False, {"amx_bf16": True}, "bf16"), (True, False, "fp32"), (True, True, "bf16")])
def test_auto_dtype_is_bf16_if_the_hardware_multiplies_it(monkeypatch, gpu, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: supported)
    assert resolve_dtype("auto") == dtype
    assert (resolve_dtype("bf16"), resolve_dtype("fp32")) == ("bf16", "fp32")


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "expandable_segments:True,pinned_max_round_threshold_mb:1024"),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None")])
def test_the_users_settings_of_the_allocator_are_kept(given, expected, monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)  # of another test's group
    code = ("import os; from common.distributed import Distributed\n"
            "with Distributed(): print(os.environ.get('PYTORCH_ALLOC_CONF'))")
    assert run_script("-c", code, **given).stdout.strip() == expected


def test_a_signal_to_a_forked_process_is_no_request_to_stop():
    """Such as the SIGTERM with which a pool ends its workers; lm-eval opens one for standard errors."""
    code = ("import os, signal, time\n"
            "from common.stop_request import StopRequest\n"
            "def signal_of_a_fork():\n"
            "    if not (child := os.fork()): os.kill(os.getpid(), signal.SIGTERM); time.sleep(9); os._exit(0)\n"
            "    return os.WTERMSIG(os.waitpid(child, 0)[1])\n"
            "with StopRequest() as request:\n"
            "    print(signal_of_a_fork())\n"
            "    time.sleep(0.2)\n"
            "print(signal_of_a_fork(), request.signal)")
    assert run_script("-c", code).stdout == "15\n15 None\n"
