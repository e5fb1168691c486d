"""The environment of make is installed once, and two processes that need it do not disturb each other."""
import subprocess
import sys

import pytest

from common.files import UserError
from pipeline import environment
from tests.conftest import ROOT
from tests.pipeline.test_targets import ENVIRON

# Stand-ins for the module venv, and for the Python of the environment that it makes: they record what is called.
VENV = """
import os
from pathlib import Path
def create(folder, **options):
    python = Path(folder, "bin/python")
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(os.environ["STAND_IN"])
    python.chmod(0o755)
"""
PYTHON = """#!/bin/sh
echo "begin $*" >> "$CALLS"
while [ "$2" = pip ] && [ ! -e "$GO" ]; do sleep 0.02; done
[ -z "$FAILS" ] || exit 3
echo "end $*" >> "$CALLS"
"""
INSTALL = "-m pip install -q --disable-pip-version-check -r requirements.txt"


def start_make(tmp_path, *words, **variables):
    """Starts make with the stand-ins, in a folder where the project has no environment yet."""
    (tmp_path / "modules").mkdir(exist_ok=True)
    (tmp_path / "modules/venv.py").write_text(VENV)
    for name in ("Makefile", "requirements.txt", "common", "configs", "pipeline"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return subprocess.Popen(
        ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words], cwd=tmp_path,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRON | {
            "PYTHONPATH": f"{tmp_path}/modules", "CALLS": f"{tmp_path}/calls", "GO": f"{tmp_path}/go",
            "STAND_IN": PYTHON} | variables)


def calls(tmp_path):
    """The lines that the stand-ins have recorded."""
    return (tmp_path / "calls").read_text().splitlines()


def test_two_at_once_install_the_packages_once(tmp_path):
    first = start_make(tmp_path, "train", "MODEL=stack")
    assert first.stdout.readline().startswith("installing the packages of requirements.txt into")
    second = start_make(tmp_path, "train", "MODEL=llm")
    assert second.stdout.readline() == "waiting for another process, which installs packages\n"
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=60)[0] for process in (first, second)] == ["", ""]
    recorded = calls(tmp_path)
    assert recorded[:2] == [f"begin {INSTALL}", f"end {INSTALL}"]
    assert sorted(recorded[2:]) == ["begin -m pipeline.targets train"] * 2 + ["end -m pipeline.targets train"] * 2


def test_a_failed_installation_is_repeated_and_a_finished_one_is_not(tmp_path):
    (tmp_path / "go").touch()
    assert start_make(tmp_path, "data", FAILS="1").wait(60) == 2
    assert calls(tmp_path) == [f"begin {INSTALL}"]
    for installs in (1, 0):
        before = len(calls(tmp_path))
        assert start_make(tmp_path, "data").wait(60) == 0
        assert calls(tmp_path)[before:].count(f"end {INSTALL}") == installs


def test_an_environment_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    def create(*args, **options):
        raise subprocess.CalledProcessError(1, [], b"Traceback\n/usr/bin/python3: No module named ensurepip\n")

    monkeypatch.setattr(environment.venv, "create", create)
    with pytest.raises(UserError, match=r"\.venv cannot be made: .*No module named ensurepip; on Debian"):
        environment.install(tmp_path / ".venv/user", ROOT / "requirements.txt")
    with pytest.raises(UserError, match="cannot write .*: a part of that path is a file"):
        environment.install(ROOT / "Makefile/x/user", ROOT / "requirements.txt")


def test_an_environment_on_another_disk(tmp_path, monkeypatch):
    """.venv may be a link to a folder, which the module venv refuses."""
    (tmp_path / "disk").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "disk")
    create = environment.venv.create
    monkeypatch.setattr(environment.venv, "create", lambda folder, **options: create(folder))  # pip takes seconds
    monkeypatch.setattr(environment, "run_command", lambda command: None)
    environment.install(tmp_path / ".venv/user", ROOT / "requirements.txt")
    assert (tmp_path / "disk/bin/python").exists()
    assert (tmp_path / "disk/user").exists()
