"""Reading and writing files: errors in one line, and atomic writes."""
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """An error that the user can fix. Scripts print it as one line, `error: …`, and exit with status 2."""


def read_json(path: str | Path) -> Any:
    """The JSON value in a file. Raises UserError with the position of a syntax error."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file. Raises UserError with the number of a line that is not a JSON object."""
    items: list[Any] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except json.JSONDecodeError:
                items.append(None)
            if not isinstance(items[-1], dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
    return items


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically: readers see either the old or the new content."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    with explain_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "w", encoding="utf-8", errors="replace") as file:  # lone surrogates cannot be encoded
                file.write(text)
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Flushes a file, or the entries of a directory, to disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turns a full disk, a read-only file system or a missing permission into a UserError that names `path`."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again",
        errno.EFBIG: "the file is larger than allowed here (see ulimit -f)",
        errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "permission denied: choose a folder that you may write to",
        errno.ENOTDIR: "a part of that path is a file, not a folder",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        where = f" ({error.filename})" if error.filename and not str(error.filename).startswith(str(path)) else ""
        raise UserError(f"cannot write {path}{where}: {reasons[error.errno]}; existing files are unchanged") \
            from None


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Makes a directory atomically.

    Yields an empty sibling, `<path>.writing`, to write to. It is renamed to `path` when the block ends without an
    error, and removed otherwise. Raises UserError if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: remove it or choose another name")
    partial = path.with_name(path.name + ".writing")
    with explain_os_errors(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir(parents=True)
            yield partial
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def digest(paths: Iterable[str | Path]) -> str:
    """SHA-256, in hexadecimal, of the names and contents of files, in order of their names."""
    total = hashlib.sha256()
    for path in sorted(map(Path, paths), key=lambda path: path.name):
        with open(path, "rb") as file:
            total.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the exception's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
