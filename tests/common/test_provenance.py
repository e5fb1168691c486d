"""The provenance of runs."""
import shutil
import subprocess
import sys

import pytest

from common.files import UserError
from common.provenance import read_record, write_record
from tests.conftest import ROOT


def test_the_commit_is_that_of_the_program_itself(tmp_path, monkeypatch):
    """Not that of another repository that contains it, such as one with an unpacked archive."""
    program = tmp_path / "other/program"
    shutil.copytree(ROOT / "common", program / "common")

    def run(*words, folder=program):
        return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    def commit(folder):
        run("git", "init", "-q", folder=folder)
        run("git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", str(folder),
            folder=folder)
        return run("git", "rev-parse", "HEAD", folder=folder)

    code = "from common.provenance import git_commit; print(git_commit())"
    commit(tmp_path / "other")
    assert run(sys.executable, "-c", code) == "None"
    own = commit(program)
    assert run(sys.executable, "-c", code) == own
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))  # as in a git hook
    assert run(sys.executable, "-c", code) == own


TASK = {"task": "simp", "data": "simp.json", "data_digest": "d", "max_train_samples": None}


@pytest.mark.parametrize(("lineage", "entry"), [
    ({"tasks": [{key: value for key, value in TASK.items() if key != "max_train_samples"}]}, "tasks"),
    ({"tasks": [TASK | {"max_train_samples": "80"}]}, "tasks"), ({"tasks": [TASK | {"data": None}]}, "tasks"),
    ({"tasks": [TASK | {"template": "none"}]}, "tasks"), ({"text": {"samples": "80"}}, "text"),
    ({"text": {"samples": None}}, "text"), ({"start": {"init": "m0"}}, "start")])
def test_a_damaged_lineage_is_refused(tmp_path, lineage, entry):
    write_record(tmp_path, {"lineage": {"tasks": [TASK], "text": {"samples": 80}}})
    assert read_record(tmp_path)["lineage"]["tasks"] == [TASK]
    write_record(tmp_path, {"lineage": lineage})
    with pytest.raises(UserError, match=f"its entry '{entry}' is not valid"):
        read_record(tmp_path)
