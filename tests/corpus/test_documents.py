"""Documents from text files, Python sources and datasets."""
import builtins
import os
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch

from common.files import UserError
from corpus import documents
from corpus.documents import load_hub_dataset, read_docstrings, read_documents, read_text_file
from tests.conftest import run_script
from tests.hub import HubStandIn
from tests.hub_datasets import parquet_of

DEEP = "[" * 100_000
BAD_LINES = {
    "null": ('{"text": null}', "expected an object with a text as 'text'"),
    "no text": ('{"txt": "a"}', "with a text as 'text', found the fields txt: data_prep.py text has --text_column"),
    "list": ("[1]", "expected an object with a text as 'text'"),
    "number": ('{"text": 5}', "expected an object with a text as 'text'"),
    "not JSON": ("no", "is not JSON"),
    "surrogate": (r'{"text": "a\ud800b"}', "half of a surrogate pair"),
    "nested": (DEEP, "nested too deeply"),
    "digits": ('{"text": "a", "n": ' + "1" * 5000 + "}", "is not JSON"),
}


@pytest.mark.parametrize(("bad", "said"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_of_a_jsonl_are_named(tmp_path, bad, said):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_text_file(path, "text")) == ["a", "b"]
    path.write_text('{"text": "a"}\n' + bad + "\n")
    with pytest.raises(UserError, match=rf"t\.jsonl, line 2:? .*{said}"):
        list(read_text_file(path, "text"))


def test_a_long_text_becomes_many_documents(tmp_path):
    lines = [f"Line {n} of a long book.\n" for n in range(3000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    pieces = list(read_text_file(tmp_path / "book.txt", "text"))
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and len(piece) < 11_000 for piece in pieces)
    (tmp_path / "book.txt").write_bytes(b"good\n\xff")
    with pytest.raises(UserError, match=r"book\.txt is not UTF-8"):
        list(read_text_file(tmp_path / "book.txt", "text"))


def test_a_text_without_line_ends_becomes_many_documents_as_well(tmp_path):
    text = " ".join(map(str, range(6000)))
    (tmp_path / "text8.txt").write_text(text)
    found = list(read_documents(str(tmp_path / "text8.txt")))
    assert "".join(found) == text
    assert [len(one) for one in found] == [20_000, len(text) - 20_000]


def test_a_folder_gives_the_files_of_its_subfolders(tmp_path):
    folder, elsewhere = tmp_path / "d[1]", tmp_path / "elsewhere"
    for path in (folder / "b.txt/c.txt", folder / "a.jsonl", folder / ".hidden/x.txt", folder / ".x.txt",
                 folder / "notes.md", elsewhere / "e.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "one"}' if path.suffix == ".jsonl" else f"in {path.name}")
    (folder / "linked").symlink_to(elsewhere)
    for name, other in ("xy", "yx"):
        (folder / name).mkdir()
        (folder / name / "link").symlink_to(folder / other)
    (folder / "again").symlink_to(folder / "b.txt")  # what is in the folder already is read once
    assert list(read_documents(str(folder))) == ["one", "in c.txt", "in e.txt"]


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: (folder / "b.txt").symlink_to("nowhere"), r"b\.txt is a link to something that is not a file"),
    (lambda folder: os.mkfifo(folder / "b.txt"), r"b\.txt is not a file"),
    (lambda folder: (folder / "loop").symlink_to("."), "loop is a link to a folder that contains it"),
    (lambda folder: (folder / "above").symlink_to(folder.parent), "above is a link to a folder that contains it")],
    ids=["dangling", "fifo", "loop", "above"])
def test_what_cannot_be_read_in_a_folder_is_named(tmp_path, spoil, said):
    (tmp_path / "a.txt").write_text("A text.")
    assert list(read_documents(str(tmp_path))) == ["A text."]
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        list(read_documents(str(tmp_path)))


@pytest.mark.parametrize(("owner", "function", "name"), [(os, "scandir", "sub"), (builtins, "open", "a.txt")])
def test_folders_and_files_without_permission_are_named(tmp_path, monkeypatch, owner, function, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("A text.")
    original = getattr(owner, function)

    def refuse(path, *args, **kwargs):  # permissions do not keep root from reading
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(owner, function, refuse)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied"):
        list(read_documents(str(tmp_path)))


def test_docstrings_keep_the_source_order(tmp_path):
    (tmp_path / "m.py").write_text('"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
                                   'async def g():\n    """Four."""\ndef h(): pass\n')
    assert read_docstrings(tmp_path / "m.py") == ["One.", "Two.", "Three.", "Four."]
    (tmp_path / "m.py").write_text('"""a\\ud800b"""')
    assert read_docstrings(tmp_path / "m.py") == ["a?b"]
    (tmp_path / "m.py").write_text("def (")
    assert read_docstrings(tmp_path / "m.py") == []


def test_installed_documentation(tmp_path, monkeypatch):
    """Docstrings of the standard library, then of the packages, without their tests; each is kept once."""
    for path, text in {"lib/b.py": "B.", "lib/a.py": "A.", "lib/test/c.py": "C.", "lib/site-packages/d.py": "D.",
                       "packages/numpy/e.py": "E.", "packages/numpy/tests/f.py": "F.", "packages/numpy/g.py": "A.",
                       "packages/other/h.py": "H."}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'"""{text}"""\n')
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    monkeypatch.setattr(documents, "package_folder", lambda name: tmp_path / "packages" / name)
    found = documents.read_installed_docs.__wrapped__()
    assert [text for text in found if len(text) < 4] == ["A.", "B.", "E.", ""]
    assert len(found) > 50  # and the topics of pydoc


def test_documented_packages_are_found_where_they_are_imported_from():
    assert documents.package_folder("torch") == Path(torch.__file__).parent
    with pytest.raises(UserError, match="the package no_such_package, whose documentation is a part of the"):
        documents.package_folder("no_such_package")


def test_other_errors_of_a_dataset_are_not_taken_for_those_of_a_loading_script(monkeypatch):
    def load_dataset(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="scripts are no longer supported"):
        list(load_hub_dataset("owner/name", "train", ["text"], revision="main"))


def test_rows_of_a_dataset_in_a_folder_whose_name_is_a_pattern(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": f"t{n}", "other": n} for n in range(3)]
    for name in ("d1", "d[1]/sub*"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / "data/train.parquet")
        found = list(load_hub_dataset(str(tmp_path / name), "train", ["text"]))
        assert found == [{"text": f"t{n}"} for n in range(3)]


@pytest.mark.parametrize(("second", "said"), [
    ({"text": None}, "some/name, row 2: expected an object with a text as 'text'"),
    ({"text": "B"}, "cannot read the split 'train' of some/name: lost")])
def test_errors_while_rows_are_read_are_reported(monkeypatch, second, said):
    def rows(columns):
        yield {"text": "A text."}
        yield second
        raise ConnectionError("lost\nmore")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: mock.Mock(select_columns=rows))
    documents = read_documents("some/name")
    assert next(documents) == "A text."
    with pytest.raises(UserError, match=said):
        list(documents)


def test_one_configuration_and_split_of_a_dataset_that_the_hub_has_converted(tmp_path):
    """Its main branch has a loading script; the conversion has a folder for each configuration and split."""
    rows = {f"{config}/{split}/0000.parquet": parquet_of([{"text": f"{config} {split} {n}"} for n in range(3)])
            for config, splits in (("en", ("train", "challenge_train_sample")), ("de", ("train",))) for split in splits}
    code = ("from common.files import UserError\n"
            "from corpus.documents import read_documents\n"
            "print(list(read_documents('owner/texts', dataset_config='en')))\n"
            "try: list(read_documents('owner/texts'))\n"
            "except UserError as error: print(error)")
    with HubStandIn() as hub:
        hub.add("datasets", "owner/texts", {"README.md": b"# Texts", "texts.py": b"import datasets"})
        hub.add("datasets", "owner/texts", rows, branch=documents.CONVERTED)
        texts, error, _ = run_script("-c", code, **hub.environment(tmp_path / "cache")).stdout.split("\n")
    assert texts == "['en train 0', 'en train 1', 'en train 2']"
    assert error.startswith("owner/texts has the configurations de, en: choose one with --dataset_config")
