"""Reading and writing files: errors in one line, and atomic writes.

Whatever is written appears atomically under its name: it is made as a uniquely named, locked sibling and then renamed.
Two processes that write the same path do not disturb each other. A killed process leaves its sibling behind, unlocked;
the next writer of the same path removes it.
"""
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

WRITING = ".writing"  # the end of the names of temporary siblings
JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
              type(None): "null"}


class UserError(Exception):
    """An error that the user can fix. Scripts print it as one line, `error: …`, and exit with status 2."""


class ExistsError(UserError):
    """The path to be made exists already."""


@contextmanager
def parsing(path: str | Path, expected: str) -> Iterator[None]:
    """Turns errors in interpreting the content of a file into a UserError that names it and what was expected.

    With DEBUG=1 in the environment the original error is shown as its cause.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or not {expected} ({type(error).__name__}: {first_line(error):.200})") \
            from error


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 text file, without a byte order mark. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # a null byte in the path
        raise UserError(f"{str(path)!r} is not a path: {error}") from None


def parse_json(text: str, where: str | Path) -> Any:
    """The value of a JSON text. Raises UserError, which begins with `where`, for a syntax error.

    Stricter than the json module: NaN, infinities and numbers beyond the range of floats are refused, and so are texts
    with half of a surrogate pair, which cannot be encoded. Integers of more than 64 bits become floats: transformers
    writes 10^30 as the length of a tokenizer without a limit.
    """
    try:
        value = json.loads(text, parse_int=integer_or_float, parse_float=finite_float,
                           parse_constant=finite_float)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # json accepts any surrogate
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg.removesuffix(' at')} at line {error.lineno}, column "
                        f"{error.colno}") from None
    except RecursionError:
        raise UserError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        raise UserError(f"{where} holds the text {character!r}, half of a surrogate pair, which stands for no "
                        "character") from None
    except ValueError as error:  # not finite
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None


def integer_or_float(text: str) -> int | float:
    """The integer that a JSON literal stands for; a float if it does not fit in 64 bits. Raises ValueError if it is
    beyond the range of floats."""
    return finite_float(text) if len(text) > 20 or abs(int(text)) >= 1 << 63 else int(text)


def finite_float(text: str) -> float:
    """The number that a JSON literal stands for. Raises ValueError if it is not finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json(path: str | Path, kind: type | None = None) -> Any:
    """The JSON value in a file. Raises UserError for a syntax error, or if the value is not of the type `kind`."""
    value = parse_json(read_text(path), path)
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{path}: expected {JSON_NAMES[kind]}, found {JSON_NAMES[type(value)]}")
    return value


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file. Raises UserError with the number of a line that is not a JSON object."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            items.append(parse_json(line, f"{path}, line {number}"))
            if not isinstance(items[-1], dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {JSON_NAMES[type(items[-1])]}")
    return items


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
    path = named(path)
    with explain_os_errors(path), temporary_sibling(path, lambda partial: partial.touch(exist_ok=False)) as partial:
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
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turns a full disk, a missing permission or another failure to write into a UserError that names `path`."""
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
        raise UserError(f"cannot write {final}{where}: {reason}; existing files are unchanged") from None


def walk(folder: str | Path, hidden: bool = False) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields (path, names of folders, names of files) of a folder and all folders in it, hidden ones only if `hidden`.

    Follows links to folders elsewhere; those to folders in `folder` are left out, since these are read themselves.
    Raises UserError for a folder that cannot be read, or that is a link to a folder that contains it.
    """
    whole = Path(folder).resolve()

    def fail(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if hidden or not name.startswith(".")]
        for path in [Path(root, name) for name in folders if Path(root, name).is_symlink()]:
            if path.resolve() in [parent.resolve() for parent in path.parents]:
                raise UserError(f"{path} is a link to a folder that contains it: remove it")
            if whole in path.resolve().parents:
                folders.remove(path.name)
        yield Path(root), folders, [name for name in names if hidden or not name.startswith(".")]


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


def named(path: str | Path) -> Path:
    """A path to write to. Raises UserError if it has no name of its own, like "/" and ".."."""
    if Path(path).name in ("", "..") or "\0" in str(path):
        raise UserError(f"cannot write {str(path)!r}: expected the name of a new file or folder")
    return Path(path)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Makes a directory atomically.

    Yields an empty sibling to write to. It is renamed to `path` when the block ends without an error, and removed
    otherwise. Raises ExistsError if `path` exists, at the start or, made by another process, at the end.
    """
    path = named(path)
    if os.path.lexists(path):
        raise ExistsError(f"{path} exists already: remove it or choose another name")
    with explain_os_errors(path), temporary_sibling(path, Path.mkdir) as partial:
        yield partial
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ExistsError(f"{path} exists already: another process has made it in the meantime") from None


def digest(paths: Iterable[str | Path]) -> str:
    """SHA-256, in hexadecimal, of the names and contents of files, in order of their names."""
    total = hashlib.sha256()
    for path in sorted(map(Path, paths), key=lambda path: path.name):
        with open(path, "rb") as file:
            total.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def describe_error(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename):.200}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "the memory of this machine is not enough"
    return " ".join(str(error).split("\n"))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the exception's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
