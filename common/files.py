"""Files read and written so that an error is one line and nothing is ever left half-written."""
import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend. The scripts print it as one line, `error: …`, and exit with status 2."""


def read_json(path):
    """The JSON value in a file; a UserError names the file, and the place where it is not JSON."""
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


def read_json_lines(path):
    """The objects of a JSONL file, one a line; a UserError names the line that is none."""
    items = []
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


def write_text(path, text):
    """Writes a text file whole: readers see the old file or the new one, whatever happens in between."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    with explain_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "w", encoding="utf-8", errors="replace") as file:  # lone surrogates have no UTF-8
                file.write(text)
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def sync(path):
    """Waits until a file, or a directory's list of files, is on the disk: a loss of power leaves it as it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Writes a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def explain_os_errors(path):
    """Turns a full disk, a read-only place or a missing permission into a UserError that names `path`."""
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
        raise UserError(f"cannot write {path}{where}: {reasons[error.errno]}; what was there before is untouched") \
            from None


@contextmanager
def new_directory(path):
    """A directory that appears whole or not at all.

    Yields an empty sibling, `<path>.writing`, to write into; it takes its name when the block ends without an
    error and is removed otherwise. Raises UserError if `path` exists.
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


def digest(paths):
    """SHA-256, as hexadecimal digits, over the names and contents of files in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(map(Path, paths), key=lambda path: path.name):
        with open(path, "rb") as file:
            total.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def first_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
