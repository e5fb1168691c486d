"""Atomic writes of files and folders, locks, and errors in one line.

Whatever is written appears atomically under its name: it is made as a uniquely named, locked sibling and then renamed.
Two processes that write the same path do not disturb each other. A killed process leaves its sibling behind, unlocked;
the next writer of the same path removes it.
"""
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.files import UserError, first_line

WRITING = ".writing"  # the end of the names of temporary siblings
UNCHANGED = "; existing files are unchanged"  # of atomic writes alone: appending and renaming may change files


class ExistsError(UserError):
    """The path to be made exists already."""


def lock(path: str | Path) -> int:
    """Locks a file or directory until the returned descriptor is closed or this process ends.

    Raises BlockingIOError if another process has locked it, and another OSError on file systems without locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def temporary_sibling(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Yields a unique, locked sibling of a path, made by `create`, and removes it at the end unless it was renamed.

    Siblings of the same path that killed processes have left behind are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*{WRITING}"):
        with suppress(OSError):  # another process is writing it, or there are no locks here
            descriptor = lock(old)
            remove(old)
            os.close(descriptor)
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{WRITING}")
        held: int | None = None
        create(partial)
        try:
            held = lock(partial)
        except (BlockingIOError, FileNotFoundError):  # another process takes it for an old one
            continue
        except OSError:  # the file system has no locks
            pass
        if partial.exists():
            break
    try:
        yield partial
    finally:
        remove(partial)
        if held is not None:
            os.close(held)


def remove(path: Path) -> None:
    """Removes a file, or a directory with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically, as write_bytes does."""
    write_bytes(path, text.encode(errors="replace"))  # lone surrogates cannot be encoded


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: readers see either the old or the new content."""
    path = require_file_name(path)
    with explain_os_errors(path, UNCHANGED), \
            temporary_sibling(path, lambda partial: partial.touch(exist_ok=False)) as partial:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)


def sync(path: str | Path) -> None:
    """Flushes a file, or the entries of a directory, to disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically. A number that is not finite is a bug of the caller."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def explain_os_errors(path: str | Path, note: str = "") -> Iterator[None]:
    """Turns a full disk, a missing permission or another failure to write into a UserError that names `path` and ends
    with `note`."""
    reasons = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again",
        errno.EFBIG: "the file is larger than allowed here (see ulimit -f)",
        errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "permission denied: choose a folder that you may write to",
        errno.ENOTDIR: "a part of that path is a file, not a folder",
        errno.EISDIR: "it is a folder, expected the name of a file",
        errno.EEXIST: "it is a file, expected a folder",
    }
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and not is_part(error.filename, path) else ""
        reason = reasons.get(error.errno or 0, error.strerror or first_line(error))
        final = re.sub(rf"\.([^/]+)\.[0-9a-f]{{8}}{re.escape(WRITING)}", r"\1", str(path))  # not the temporary sibling
        raise UserError(f"cannot write {final}{where}: {reason}{note}") from None


@contextmanager
def sole_use(folder: str | Path) -> Iterator[None]:
    """Makes a folder and locks it for this process within the block. What was made and is still empty is removed at the
    end. Raises UserError if another process has locked it."""
    folder = Path(folder)
    with explain_os_errors(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    descriptor: int | None = None
    try:
        descriptor = lock(folder)
    except BlockingIOError:
        raise UserError(f"another process is using {folder}: wait until it ends, or stop it") from None
    except FileNotFoundError:  # the other process has just renamed it
        pass
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): do not start this twice at the same time",
              file=sys.stderr)
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # fails if it is not empty
        if descriptor is not None:
            os.close(descriptor)


def check_writable(folder: str | Path) -> None:
    """Raises UserError if a folder cannot be made, or cannot be written to. Leaves nothing behind."""
    with explain_os_errors(folder):
        path = Path(folder).absolute()
        for existing in (path, *path.parents):
            with suppress(FileNotFoundError):
                existing.lstat()
                break
        for name in path.relative_to(existing).parts:
            with suppress(FileNotFoundError):
                (existing / name).lstat()  # the name may be too long
        with tempfile.TemporaryFile(dir=existing):
            pass


def is_part(name: str | Path, path: str | Path) -> bool:
    """Whether a file is `path`, lies in it, or is named after it."""
    siblings = f".{Path(path).name}.", f"{Path(path).name}."  # a temporary file, and a file with an ending
    return Path(name).is_relative_to(path) or \
        Path(name).parent == Path(path).parent and Path(name).name.startswith(siblings)


def require_file_name(path: str | Path) -> Path:
    """A path to write to. Raises UserError if it does not end in a name, like "/" and ".."."""
    if Path(path).name in ("", "..") or "\0" in str(path):
        raise UserError(f"cannot write {str(path)!r}: expected the name of a new file or folder")
    return Path(path)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Makes a directory atomically.

    Yields an empty sibling to write to. It is renamed to `path` when the block ends without an error, and removed
    otherwise. Raises ExistsError if `path` exists, at the start or, made by another process, at the end.
    """
    path = require_file_name(path)
    if os.path.lexists(path):
        raise ExistsError(f"{path} exists already: remove it or choose another name")
    with explain_os_errors(path, UNCHANGED), temporary_sibling(path, Path.mkdir) as partial:
        yield partial
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ExistsError(f"{path} exists already: another process has made it in the meantime") from None
