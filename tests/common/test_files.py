"""Atomic writes, and errors in one line."""
import errno
import hashlib

import pytest

from common.files import UserError, digest, explain_os_errors, new_directory, read_json, read_json_lines, write_json


def test_a_directory_appears_atomically(tmp_path):
    with new_directory(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new/file").read_text() == "x"


def test_a_directory_is_removed_after_an_error(tmp_path):
    (tmp_path / "new.writing").mkdir()
    (tmp_path / "new.writing/left by a killed process").touch()

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
    with pytest.raises(OSError, match="x"), explain_os_errors("here"):
        raise OSError(errno.EIO, "x")


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
