"""The layout: packages import in one direction, scripts import no script, and names are unique."""
import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What each package may import, besides itself.
ALLOWED = {
    "common": set(),
    "model": {"common"},
    "corpus": {"common", "model"},
    "training": {"common", "model", "corpus"},
    "evaluation": {"common", "model", "corpus"},
    "analysis": {"common", "evaluation"},
    "pipeline": {"common", "model", "corpus", "training", "evaluation", "analysis"},
}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
MODULES = sorted(path.relative_to(ROOT) for folder in (*ALLOWED, "bench") for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> set[str]:
    """The top-level names of all modules that a source file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_in_one_direction(package):
    forbidden = {*ALLOWED, *SCRIPTS, "bench", "tests"} - ALLOWED[package] - {package}
    for path in (ROOT / package).rglob("*.py"):
        assert not imported(path.read_text()) & forbidden, f"{path.relative_to(ROOT)} breaks the import order"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_other_script(script):
    assert not imported((ROOT / f"{script}.py").read_text()) & {*SCRIPTS, "bench", "tests"}


def test_the_top_level_has_entry_scripts_only():
    assert SCRIPTS == ["data_prep", "evaluate", "experiment", "pretrain", "report", "stack", "train"]
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text()
        assert f"\n    python {script}.py" in ast.get_docstring(ast.parse(source), clean=False), script
        assert 'if __name__ == "__main__":' in source


@pytest.mark.parametrize("package", ALLOWED)
def test_each_package_says_what_it_may_import(package):
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    said = re.search(r"(?:[Mm]ay import|Imports) ([^.]*)\.", docstring)[1]
    names = set() if said == "no other package" else set(re.split(", | and ", said))
    assert names == ALLOWED[package]


def test_modules_and_public_classes_have_unique_names():
    names = Counter(path.stem for path in [*MODULES, *map(Path, SCRIPTS)] if path.stem != "__init__")
    assert not {name for name, count in names.items() if count > 1}
    classes = Counter(node.name for path in [*MODULES, *(Path(f"{script}.py") for script in SCRIPTS)]
                      for node in ast.parse((ROOT / path).read_text()).body
                      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    assert not {name for name, count in classes.items() if count > 1}
