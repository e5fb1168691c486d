"""Ctrl-C while a script imports its libraries."""
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT, accept_interrupts

# A stand-in for torch that is interrupted while it is imported, and what arrives then.
TORCH = """
import os
import time
print("importing", flush=True)
class Held:
    def __del__(self):
        time.sleep(60)
if os.environ["ARRIVES"] == "unraisable":
    Held()
    time.sleep(60)
try:
    time.sleep(60)
except KeyboardInterrupt as error:
    if os.environ["ARRIVES"] == "itself":
        raise
    if os.environ["ARRIVES"] == "as a cause":
        raise ImportError("initialization failed") from error
    raise ImportError("initialization failed")
"""


@pytest.mark.parametrize(("arrives", "words"), [
    *(("itself", [path.name]) for path in sorted(ROOT.glob("*.py"))),
    *(("itself", ["-m", name]) for name in ("pipeline.plan", "pipeline.growth_study", "model.hub")),
    ("as a cause", ["train.py"]), ("as a context", ["train.py"]), ("unraisable", ["train.py"])])
def test_an_interrupted_import_ends_without_a_traceback(tmp_path, arrives, words):
    (tmp_path / "torch.py").write_text(TORCH)
    for name in ("matplotlib", "numpy", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("import torch\n")
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=accept_interrupts,
                               env=os.environ | {"PYTHONPATH": str(tmp_path), "ARRIVES": arrives})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_other_errors_are_shown_as_usual():
    code = "import common.interrupts, sys\nsys.stdout.write('x')\nraise ValueError('seen') from ValueError('cause')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "x")
    assert result.stderr.endswith("ValueError: seen\n")


def test_an_interactive_session_goes_on():
    code = ("import code, common.interrupts, sys\nsys.ps1 = '> '\n"
            "sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)\nprint('still here')")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "still here\n")
