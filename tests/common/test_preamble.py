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


def test_closed_streams_are_opened_for_a_script_and_its_children():
    """Without it, the file that is opened next is number 1, and gets what is printed."""
    code = ("import common.preamble, os, subprocess, sys; print('seen by nobody'); print('x', file=sys.stderr)\n"
            "assert os.open('README.md', os.O_RDONLY) > 2\n"
            "assert subprocess.run([sys.executable, '-c', 'import os; os.fstat(1)']).returncode == 0")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert result.returncode == 0


def test_a_notebook_and_a_user_change_no_figure(tmp_path):
    """Their backend may be missing here, and their style is not that of the figures."""
    code = ("import common.preamble, sys; from analysis.figures import make_panels, save_figure, styled\n"
            "@styled\ndef plot(path):\n"
            "    figure, (panel,) = make_panels(1, 2, 2)\n    panel.plot([1, 2])\n    save_figure(figure, path)\n"
            "plot(sys.argv[1])")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/matplotlibrc").write_text("lines.linewidth: 9\naxes.facecolor: black\ntext.usetex: True\n")
    own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path / "own")}
    for name, variables in (("plain", {}), ("other", own)):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT, check=True,
                       env=os.environ | variables)
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_other_errors_are_shown_as_usual():
    code = "import common.preamble, sys\nsys.stdout.write('x')\nraise ValueError('seen') from ValueError('cause')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "x")
    assert result.stderr.endswith("ValueError: seen\n")


def test_an_interactive_session_goes_on():
    code = ("import code, common.preamble, sys\nsys.ps1 = '> '\n"
            "sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)\nprint('still here')")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "still here\n")
