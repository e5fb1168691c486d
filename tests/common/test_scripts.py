"""The end of scripts: exit status and messages."""
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from common.files import UserError
from common.scripts import dispatch
from tests.conftest import ROOT


@dataclass(frozen=True)
class NoSettings:
    """Settings of a script that has none."""


def fail(cfg):
    raise UserError("the disk is full")


def test_errors_keep_their_traceback_for_debugging(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        dispatch((NoSettings, fail), "")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full\n"
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(UserError, match="the disk is full"):
        dispatch((NoSettings, fail), "")


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, "error: unknown flag '--colour'"), ({"RANK": "3"}, "error: unknown flag '--colour'"),
    ({"RANK": "3", "MASTER_ADDR": "127.0.0.1"}, "")])
def test_invalid_flags_are_told_by_one_process(monkeypatch, capsys, environment, expected):
    """A RANK without a launcher, left over in a shell, silences nothing."""
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["script.py", "--colour", "red"])
    with pytest.raises(SystemExit) as ended:
        dispatch((NoSettings, fail), "")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(expected)
    assert bool(message) == bool(expected)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_output_ends_a_script_without_a_message(unbuffered):
    """As `head` closes it, whether Python writes each line at once or all at the end."""
    with subprocess.Popen([sys.executable, "data_prep.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
