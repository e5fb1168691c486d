"""Atomic writes, and errors in one line."""
import errno
import hashlib
import multiprocessing
import os
import re
import stat

import pytest

from common.files import UserError, digest, parse_json, parsing, read_json, read_json_lines
from common.writing import (
    ExistsError,
    explain_os_errors,
    lock,
    new_directory,
    require_file_name,
    write_json,
    write_text,
)

fork = multiprocessing.get_context("fork")


def test_a_directory_appears_atomically(tmp_path):
    with new_directory(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new/file").read_text() == "x"


def test_a_directory_is_removed_after_an_error(tmp_path):
    def fail():
        with new_directory(tmp_path / "new") as folder:
            assert not list(folder.iterdir())
            (folder / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="old exists already"), new_directory(tmp_path / "old"):
        pass
    assert (tmp_path / "old").exists()


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied"),
                                                (errno.EROFS, "the file system is read-only")])
def test_os_errors_become_one_line(tmp_path, number, reason):
    with pytest.raises(UserError, match=f"write here: {reason}"), explain_os_errors("here"):
        raise OSError(number, "x")
    with pytest.raises(UserError, match="write here: x$"), explain_os_errors("here"):
        raise OSError(errno.EIO, "x")


def test_atomic_writes_say_that_nothing_has_changed(tmp_path):
    (tmp_path / "file").touch()
    for write in (lambda path: write_text(path, "x"), lambda path: new_directory(path).__enter__()):
        with pytest.raises(UserError, match=r"cannot write .*/file/new.*; existing files are unchanged$"):
            write(tmp_path / "file/new")


def test_json(tmp_path):
    write_json(tmp_path / "a/b.json", {"é": [1]})
    assert read_json(tmp_path / "a/b.json") == {"é": [1]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    (tmp_path / "bad.json").write_text('{"a": 1,\n  oops}')
    with pytest.raises(UserError, match=r"bad\.json is not JSON: .* at line 2, column 3"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"é": 1}\n\n{"b": [2]}')
    assert read_json_lines(path) == [{"é": 1}, {"b": [2]}]
    path.write_text('{"é": 1}\n{oops}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        read_json_lines(path)


def test_digest_covers_names_and_contents_in_any_order(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"")
    expected = hashlib.sha256(b"a 3\none" + b"b 0\n").hexdigest()
    assert digest([tmp_path / "b", tmp_path / "a"]) == expected
    (tmp_path / "b").write_bytes(b"x")
    assert digest([tmp_path / "b", tmp_path / "a"]) != expected


def test_what_killed_processes_left_is_removed_and_what_live_ones_write_is_not(tmp_path):
    left, live, other = (tmp_path / f".{name}.0a.writing" for name in ("n[1]", "n[1]", "n1"))
    live = live.with_name(".n[1].0b.writing")
    for folder in (left, live, other):
        folder.mkdir()
        (folder / "file").touch()
    descriptor = lock(live)
    with new_directory(tmp_path / "n[1]") as folder:
        assert not list(folder.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"n[1]", live.name, other.name}
    os.close(descriptor)
    write_text(live.with_name("n1"), "x")
    assert {path.name for path in tmp_path.iterdir()} == {"n[1]", live.name, "n1"}


def test_the_loser_of_a_race_is_told_so_and_the_winner_is_whole(tmp_path):
    def lose():
        with new_directory(tmp_path / "new") as slow:
            with new_directory(tmp_path / "new") as fast:
                assert fast != slow
                (fast / "file").write_text("fast")
            (slow / "file").write_text("slow")

    with pytest.raises(ExistsError, match="another process has made it"):
        lose()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new/file").read_text() == "fast"


def write_often(path, text, status):
    for _ in range(50):
        write_text(path, text)
    status.put(0)


def test_two_processes_that_write_one_file_do_not_disturb_each_other(tmp_path):
    texts, status = {"a" * 200_000, "b" * 300_000}, fork.SimpleQueue()
    path = tmp_path / "file"
    write_text(path, "a" * 200_000)
    writers = [fork.Process(target=write_often, args=(path, text, status)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_files_and_directories_have_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "x")
        with new_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")] == [0o644, 0o755]


@pytest.mark.parametrize("name", ["/", ".", "..", "a/..", "a\0b", ""])
def test_paths_without_a_name_are_not_written(name):
    with pytest.raises(UserError, match="expected the name of a new file or folder"):
        require_file_name(name)
    with pytest.raises(UserError, match="expected the name"):
        write_text(name, "x")


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder: it is a folder, expected the name of a file"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(UserError, match="cannot write .*: File name too long"):
        write_text(tmp_path / ("x" * 300), "x")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ExistsError, match="link exists already"), new_directory(tmp_path / "link"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "link"}


@pytest.mark.parametrize(("text", "message"), [
    ('{"a": NaN}', "x is not JSON: NaN is not a finite number"), ("[-Infinity]", "-Infinity is not a finite number"),
    ("1e999", "1e999 is not a finite number"), ("[" * 100_000, "nested too deeply"),
    ("9" * 5000, f"x is not JSON: {'9' * 40} is not a finite number"),
    (r'["\ud800"]', "half of a surrogate pair"),
    (r'{"\udc00": 1}', "half of a surrogate pair"), ("", "x is not JSON: Expecting value")])
def test_json_that_is_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_json(text, "x")
    assert parse_json(r'["\ud83d\ude00", 1e308, -9223372036854775807]', "x") == ["😀", 1e308, 1 - 2 ** 63]
    assert repr(parse_json("1000000000000000019884624838656", "x")) == "1e+30"  # in tokenizer_config.json


def test_errors_of_a_format_name_the_file():
    with pytest.raises(UserError, match=r"a\.json is damaged or not a list of names \(KeyError: 'x'\)"), \
            parsing("a.json", "a list of names"):
        {}["x"]
    with pytest.raises(UserError, match="^own$"), parsing("a.json", "a list"):
        raise UserError("own")
    with pytest.raises(AssertionError), parsing("a.json", "a list"):
        raise AssertionError


def test_a_json_value_of_another_type_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == [1]
    with pytest.raises(UserError, match=r"a\.json: expected an object, found a list"):
        read_json(tmp_path / "a.json", dict)
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(UserError, match="is not a path: embedded null byte"):
        read_json("a\0b")
