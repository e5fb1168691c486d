"""`make train` measures what is forgotten of the text of m0, and names the commands to continue with."""
import json
import shutil

import pytest

from common.provenance import data_digest
from pipeline import targets
from pipeline.targets import Variables, next_commands, target_commands


def held_out_texts(**variables):
    """The values of --held_out_text in the commands of `make train`; None for a stage without it."""
    commands = [command for command in target_commands("train", variables) if "train.py" in command]
    return [command[command.index("--held_out_text") + 1] if "--held_out_text" in command else None
            for command in commands]


def test_stages_measure_the_text_of_m0_where_it_exists(tmp_path):
    out, text = str(tmp_path / "stack"), tmp_path / "text"
    text.mkdir()
    assert held_out_texts(TASK="empd", OUT=out) == ["data/text/tiny"] * 2  # made before m0
    assert held_out_texts(OUT=out, TEXT=str(text)) == [str(text)]
    assert held_out_texts(OUT=out, SIZE="410m") == [None]  # m0 from the Hub
    assert held_out_texts(OUT=out, SIZE="410m", HUB="") == ["data/text/410m"]
    assert held_out_texts(OUT=out, SIZE="410m", TEXT=str(text)) == [str(text)]
    assert held_out_texts(OUT=out, INIT="some/model") == [None]
    (tmp_path / "stack/m0").mkdir(parents=True)
    assert held_out_texts(OUT=out, SIZE="small", ARGS="--held_out_text none") == ["none"]  # the text was removed


def test_a_text_that_was_removed_or_is_another_one_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "data/text/tiny"
    text.mkdir(parents=True)
    (text / "meta.json").write_text("{}")
    for name in ("m0", "m1-simp"):  # the second one has the lineage of the first, which may be removed
        (tmp_path / name).mkdir()
        for digest, expected in ((data_digest(text), "data/text/tiny"), ("another", None)):
            (tmp_path / name / "run.json").write_text(json.dumps({"lineage": {"text": {"data_digest": digest}}}))
            assert held_out_texts(OUT=".") == [expected]
        shutil.rmtree(tmp_path / name)
    (tmp_path / "m0").mkdir()
    shutil.rmtree(text)
    assert held_out_texts(OUT=".") == [None]


HUB = "make train TASK={} MODEL=stack SIZE=410m  # 410M weights from the Hub, for a GPU"


@pytest.mark.parametrize(("given", "expected"), [
    ({}, ["make train TASK=empd MODEL=stack  # the next task", HUB.format("simp")]),
    ({"TASK": "exp", "MODEL": "llm", "SIZE": "small", "NPROC": "2", "ARGS": "--seed 1"},
     ["make train TASK=hgen MODEL=llm SIZE=small NPROC=2 'ARGS=--seed 1'  # the next task", HUB.format("exp")]),
    ({"TASK": "hgen", "SIZE": "small"}, ["make experiment SIZE=small  # the models compared", HUB.format("hgen")]),
    ({"TASK": "empd", "ORDER": "simp empd simp"},
     ["make train TASK=simp MODEL=stack 'ORDER=simp empd simp'  # the next task", HUB.format("empd")]),
    ({"SIZE": "7b"}, ["make train TASK=empd MODEL=stack SIZE=7b  # the next task"]),
    ({"SIZE": "7b", "TASK": "hgen"}, ["make evaluate TASK=hgen MODEL=stack SIZE=7b  # its results"]),
    ({"SIZE": "7b", "TASK": "hgen", "TEXT": "my/text"},
     ["make experiment SIZE=7b TEXT=my/text  # the models compared"]),
    ({"INIT": "my/model", "TASK": "hgen", "RAW": "my raw"},
     ["make evaluate TASK=hgen MODEL=stack INIT=my/model 'RAW=my raw'  # its results"])])
def test_the_next_commands(given, expected):
    assert next_commands(Variables(given)) == expected


def test_make_prints_the_next_commands_after_the_last_command(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(targets, "run_command", lambda words: ran.append(words))
    for name in ("ARGS", "DRY_RUN", "TASK", "MODEL", "SIZE", "INIT", "TEXT", "ORDER", "METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUT", str(tmp_path))
    targets.main("train")
    assert len(ran) == len(target_commands("train", {"OUT": str(tmp_path)}))
    printed = capsys.readouterr().out
    assert printed.endswith(f"next:\n  make train TASK=empd MODEL=stack OUT={tmp_path}  # the next task\n"
                            f"  {HUB.format('simp')}\n")
    monkeypatch.setenv("DRY_RUN", "1")
    targets.main("train")
    assert "next:" not in capsys.readouterr().out
