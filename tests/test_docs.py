"""The commands in README and docs work, and the flags, settings, files and functions that they name exist.

Code blocks are `sh`, `python`, `text`, `toml` or `json`. Blocks of `sh` and `python` are run in a temporary folder in
which `my/base` is a small checkpoint. An HTML comment on the line before a block says otherwise: after
`<!-- checked: reason -->` commands are only parsed (make prints the commands that it would run, and these and other
scripts print their settings), after `<!-- not run: reason -->` nothing is done.
"""
import ast
import functools
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from analysis.difference_text import signed, with_interval
from analysis.item_table import with_items
from analysis.measures import DECREASE, LEARNING, PRIMARY
from analysis.method_interaction import interaction_section
from analysis.method_plane import (
    compared_at,
    gap_of,
    method_study,
    pareto_front,
    points_of,
    start_point,
)
from analysis.pair_answer import answer
from analysis.pairs import Study
from analysis.stage_table import read_stage_table
from common import scripts
from common.files import read_json
from pipeline.growth_report import compared_text, conclusion, final_loss_difference, study_table
from report import ReportConfig
from tests.conftest import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for path in ROOT.glob("**/*") if path.suffix in (".py", ".toml", ".sbatch")
           and path.relative_to(ROOT).parts[0] not in (".venv", "runs", "data", "tests")]
BLOCK = re.compile(r"(?:^<!-- (not run|checked): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PACKAGES = "common", "model", "corpus", "training", "evaluation", "analysis", "pipeline"

# Flags of torchrun, deepspeed and sbatch.
LAUNCHERS = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown-timeout", "signals-to-handle",
             "gpu-bind", "num_gpus", "nodes"}


@dataclass(frozen=True)
class Block:
    mark: str | None  # "not run", "checked" or None
    language: str
    text: str

    @property
    def commands(self):
        """The command lines, with continued lines joined, each as a list of words without its comment."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(doc, language):
    """The code blocks of a document in one language, in order."""
    found = [Block(mark or None, name, text) for mark, _, name, text in BLOCK.findall(doc.read_text())]
    return [block for block in found if block.language == language]


@pytest.fixture
def folder(tmp_path, checkpoint, monkeypatch):
    """A working directory with the project's files, an environment, and a checkpoint of two layers in my/base."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("data", "runs", "report"):
            (tmp_path / entry.name).symlink_to(entry)
    for name, target in (("data/sample", ROOT / "data/sample"), ("my/base", checkpoint)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for name in ("user", "dev"):
        (tmp_path / ".venv" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_make(words, environment, checked):
    """Runs make, or with `checked` lets it print its commands. Returns its output."""
    environment = os.environ | {"PYTHON": sys.executable} | environment | ({"DRY_RUN": "1"} if checked else {})
    result = subprocess.run(["make", *words], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def script_of(words):
    """The words of a command from its script or `-m` on; None if it does not call a script or module with settings."""
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return words[index:]
        if word == "-m":
            return words[index:] if words[index + 1].startswith("pipeline.") else None
    return None


def run_python(words, monkeypatch, checked):
    """Runs a script or module in this process, or with `checked` lets it print its settings."""
    monkeypatch.setattr(scripts, "run", scripts.dispatch)  # which does not end the process
    is_module = words[0] == "-m"
    name, *flags = words[is_module:]
    monkeypatch.setattr(sys, "argv", [name, *flags, *(["--show_settings"] if checked else [])])
    status = None
    monkeypatch.delitem(sys.modules, name, raising=False)  # imported by other tests: runpy would warn
    try:
        (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
    except SystemExit as error:
        status = error.code
    assert status in (0, None), words
    if name == "report.py" and not checked:  # drawing takes seconds: of a document only the first report draws
        for draw in ("record_figures.plot_record", "pair_figures.plot_pairs", "method_figures.plot_planes"):
            monkeypatch.setattr(f"analysis.{draw}", lambda *_, **__: {})


def run_command(words, monkeypatch, checked):
    """Runs or checks one command line of a document."""
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *words = words
    if program == "make":
        printed = run_make(words, environment, checked)
        scripts = [script_of(shlex.split(line)) for line in printed.splitlines() if checked]
        for script in filter(None, scripts):
            run_python(script, monkeypatch, checked)
    else:
        assert program == "python" or (checked and program in ("torchrun", "deepspeed")), \
            f"{program} cannot be run: mark the block `not run`"
        run_python(script_of(words), monkeypatch, checked)


@pytest.mark.parametrize("doc", [doc for doc in DOCS if any(block.mark != "not run" for block in blocks(doc, "sh"))],
                         ids=lambda path: path.name)
def test_commands(doc, folder, monkeypatch):
    for block in blocks(doc, "sh"):
        for words in block.commands if block.mark != "not run" else ():
            run_command(words, monkeypatch, block.mark == "checked")


@pytest.mark.parametrize("doc", [doc for doc in DOCS if blocks(doc, "python")], ids=lambda path: path.name)
def test_python(doc, folder, capsys):
    """A block of text directly after one of Python is what that prints."""
    names = {}
    for block in blocks(doc, "python"):
        exec(compile(block.text, str(doc), "exec"), names)
        printed = capsys.readouterr().out
        said = re.search(re.escape(block.text) + r"```\n\n```text\n(.*?)```", doc.read_text(), re.DOTALL)
        assert said is None or said[1] == printed


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_blocks_name_their_language(doc):
    fences = re.findall(r"^```(.*)$", doc.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"sh", "python", "text", "toml", "json"}
    assert set(fences[1::2]) <= {""}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_links_and_files_exist(doc):
    text = doc.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
    assert [link for link in links if not (doc.parent / link).exists()] == []
    parts = {path.name for path in ROOT.iterdir()} - {"data", "runs", "report"}
    paths = [path for path in re.findall(r"(?:`|python |\s)([\w.-]+(?:/[\w.-]+)*/?)(?=[\s`])", text)
             if path.endswith(".py") or ("/" in path and Path(path).parts[0] in parts)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_flags_settings_and_targets_exist(doc):
    text = doc.read_text()
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert flags - setting_names() - LAUNCHERS == set()
    identifiers = set(re.findall(r"`([a-z]\w*_\w+)(?:\(\))?`", text))
    assert identifiers - source_words() == set()
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    known = re.search(r"^\.PHONY:((.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert targets - set(known.split()) == set()


@functools.cache
def setting_names():
    """The names of all fields made by `setting`, and of the flags that every script has."""
    trees = [ast.parse(path.read_text()) for path in SOURCES if path.suffix == ".py"]
    return {"config", "show_settings", "help"} | {
        node.target.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "setting"}


@functools.cache
def source_words():
    """All words of the source and configuration files, and their names."""
    return set(re.findall(r"\w+", "".join(f"{path.stem} {path.read_text()}" for path in SOURCES)))


def test_the_layout_lists_every_module():
    text = (ROOT / "docs/reference.md").read_text()
    modules = [str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.py")
               if path.parent.name in PACKAGES and path.name != "__init__.py"]
    assert [module for module in modules if f"| `{module}` |" not in text] == []
    assert sorted(re.findall(r"^\| `(\w+/\w+\.py)` \|", text, re.MULTILINE)) == sorted(modules)


def test_functions_in_the_reading_guide_are_in_the_files_it_names():
    """A paragraph of docs/reading.md that begins with a file names functions and classes of this file."""
    text = (ROOT / "docs/reading.md").read_text()
    found = re.findall(r"^\*\*`([\w/]+\.py)`\*\*(.*?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(found) > 10
    missing = [(file, name) for file, paragraph in found for name in re.findall(r"`(?:\w+\.)?(\w+)\(\)`", paragraph)
               if not re.search(rf"^ *(?:def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE)]
    assert missing == []


@pytest.mark.parametrize("table", ["stages.csv", "larger.csv"])
def test_the_answer_is_that_of_its_table(table):
    study = Study(read_stage_table(ROOT / "docs/answer" / table), "stack", "llm")
    text = " ".join((ROOT / "docs/answer.md").read_text().split())
    lines = answer(study, PRIMARY, ReportConfig().effect)
    assert len(lines) == 6
    assert [line for line in lines if f"- {line}" not in text] == []


def table_rows(text):
    """The cells of the first table in a text, without its header."""
    table = re.search(r"^\|.*(?:\n\|.*)*", text, re.MULTILINE)[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def written(difference):
    """A difference as docs/answer.md gives it."""
    estimate = difference.estimate
    return f"{estimate.mean:+.2f} [{estimate.interval[0]:+.2f}, {estimate.interval[1]:+.2f}]"


@pytest.mark.parametrize(("table", "title"), [("stages.csv", "## Pairs 1 to "),
                                              ("larger.csv", "## Models of 0.96M parameters")])
def test_the_differences_in_the_answer_are_those_of_its_table(table, title):
    study = Study(read_stage_table(ROOT / "docs/answer" / table), "stack", "llm")
    text = (ROOT / "docs/answer.md").read_text().split(title)[1]
    plain, level = study.contrasts
    rows = table_rows(text)
    assert rows.pop(1)[:2] == ["the same, m0 at nearly equal held-out loss",
                               written(study.difference(level, PRIMARY, 3))]
    assert len(rows) == 4
    for name, *cells in rows:
        found = [study.difference(plain, name.removesuffix(" (primary)"), 3, rate) for rate in (LEARNING, "0.001")]
        assert cells == [cell for one in found for cell in (written(one), f"{one.estimate.smallest_detectable:.2f}")]


def test_the_results_in_the_readme_are_those_of_their_tables():
    """A comparison is of m0 as it is (0) or at equal held-out loss (1), after a stage, at a setting."""
    rows = table_rows((ROOT / "README.md").read_text().split("## Results")[1])
    comparisons = (0, 3, LEARNING), (0, 3, DECREASE), (0, 3, "0.001"), (1, 3, "0.001"), (0, 1, LEARNING)
    for place, (table, pairs) in enumerate((("stages.csv", 16), ("larger.csv", 6)), 1):
        study = Study(read_stage_table(ROOT / "docs/answer" / table), "stack", "llm")
        for row, (contrast, number, setting) in zip(rows, comparisons, strict=True):
            found = study.difference(study.contrasts[contrast], PRIMARY, number, setting)
            low, high = found.estimate.interval
            told = f"**{written(found)}**" if low > 0 or high < 0 else written(found)
            assert row[place] == told + (f", {found.estimate.n} pairs" if found.estimate.n < pairs else "")


def test_the_differences_by_stage_are_those_of_their_table():
    study = Study(read_stage_table(ROOT / "docs/answer/stages.csv"), "stack", "llm")
    rows = table_rows((ROOT / "docs/answer.md").read_text().split("## What the difference depends on")[1])
    assert [name for name, *_ in rows] == ["simp", "empd", "inqqg"]
    for number, (_, *cells) in enumerate(rows, 1):
        assert cells == [written(study.difference(study.contrasts[0], PRIMARY, number, setting))
                         for setting in (LEARNING, DECREASE, *study.rates)]


def test_differences_of_grown_models_are_those_of_their_table():
    stages = read_stage_table(ROOT / "docs/answer/growth.csv")
    rows = table_rows((ROOT / "docs/answer.md").read_text().split("## How it was grown")[1])
    assert len(rows) == 4
    studies = [Study(stages, model, "llm") for model in ("stack", "interleave", "base")]
    base = studies[2].difference(studies[2].contrasts[0], PRIMARY, 3, DECREASE).estimate
    low, high = base.interval
    assert f"since m0 it has forgotten less, by {-base.mean:.2f} [{-high:.2f}, {-low:.2f}] of held-out" in \
        " ".join((ROOT / "docs/answer.md").read_text().split())
    for measure, *cells in rows:
        assert cells == [written(study.difference(study.contrasts[0], measure, 3)) for study in studies]


def test_the_growth_in_stages_is_that_of_its_table():
    rows = read_json(ROOT / "docs/growth-small.json")
    text = (ROOT / "docs/growing.md").read_text().split("## Growth in stages")[1].partition("\n## ")[0]
    lines = {line[0]: line for line in table_rows(study_table(rows))}
    found = table_rows(text)
    assert len(found) == len(lines) - 1  # without the base that is grown
    for name, *cells in found:
        of_study = lines["base, trained further" if name.startswith("base ") else name.strip("`")]
        assert cells == [of_study[place] for place in (1, 3, 4, 6)]
    assert f"```text\n{conclusion(rows)}```" in text
    text = " ".join(text.split())
    for one, other, sign in (("midas-copied", "scratch", -1), ("midas-copied", "stack", 1),
                             ("lidas-copied", "scratch", -1), ("lidas-copied", "stack", 1)):
        difference = final_loss_difference(rows, one, other)
        low, high = sorted(sign * end for end in difference.interval)
        assert f"{sign * difference.mean:.3f} [{low:.3f}, {high:.3f}]" in text
    difference = final_loss_difference(rows, "midas-copied", "lidas-copied")
    assert compared_text("", "", difference).split(" nats")[0][len(" − : "):] in text


def test_the_effects_of_methods_on_both_models_are_those_of_their_table():
    stages = read_stage_table(ROOT / "docs/methods/pairs.csv")
    studies = {model: method_study(stages, model, "none") for model in ("stack", "llm")}
    (_, text), = interaction_section(studies, ("stack", "llm"), PRIMARY)
    rows = table_rows((ROOT / "docs/methods.md").read_text().split("## A grown model and one from scratch")[1])
    expected = [[f"`{method.partition('-')[0]}`", *cells] for method, *cells in table_rows(text)]
    assert [row[0] for row in rows] == ["`expansion`", "`lora`"]
    assert rows == expected


def test_methods_at_equal_learning_are_those_of_their_table():
    """The table of stages has no items, so that the intervals are not compared."""
    study = method_study(read_stage_table(ROOT / "docs/methods/stages.csv"), "llm", "finetune")
    points = points_of(study, PRIMARY)
    front = pareto_front([*points, *start_point(study, PRIMARY)])
    rows, of_all = table_rows((ROOT / "docs/methods.md").read_text().split("## At equal learning")[1]), []
    assert sorted(row[0].strip("`") for row in rows) == sorted(study.models)
    for name, *cells in rows:
        method = name.strip("`")
        own, gap = [point for point in points if point.method == method], gap_of(study, method, PRIMARY)
        means = [statistics.fmean(chain[study.last].losses[task].loss for task in ("simp", "empd", "inqqg"))
                 for point in own for chain in study.chains(0, method, point.rate)]
        of_all += [replace(point, loss=mean) for point, mean in zip(own, means)]
        compared = ["–", "–"] if method == "finetune" else [signed(gap.mean), compared_at(study, method, PRIMARY)]
        assert [cells[0].split(" [")[0], *cells[1:]] == [
            *compared, f"{min(means):.3f}", ", ".join(point.rate for point in own if point in front) or "–"]
    gaps = [0.0 if row[1] == "–" else float(row[1].split(" [")[0]) for row in rows]
    assert gaps == sorted(gaps)
    said = ", ".join(f"`{point.method}` {point.rate}" for point in pareto_front(of_all))
    assert f"By this mean, the front is {said}: " in " ".join((ROOT / "docs/methods.md").read_text().split())


def test_differences_to_the_repeated_runs_are_those_of_their_table():
    folder = ROOT / "docs/methods/repeated"
    stages = with_items(read_stage_table(folder / "stages.csv"), folder / "items.jsonl")
    study = method_study(stages, "llm", "finetune")
    rows = re.findall(r"\| `(\w+)` \| ([\d.e-]+(?:, [\d.e-]+)*) \| ([^|]+) \| ([^|]+) \| third \|",
                      (ROOT / "docs/methods.md").read_text())
    assert sorted(method for method, *_ in rows) == sorted(set(study.models) - {"finetune"})
    for method, rates, losses, difference in rows:
        assert study.curve(PRIMARY, 0, method, 3)[2] == rates.split(", ")
        assert compared_at(study, method, PRIMARY) == losses
        assert with_interval(gap_of(study, method, PRIMARY)) == difference
        assert "[" in difference
