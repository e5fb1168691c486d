"""Reading files and folders, digests, and errors in one line."""
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
              type(None): "null"}


class UserError(Exception):
    """An error that the user can fix. Scripts print it as one line, `error: …`, and exit with status 2."""


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


def json_lines(items: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSONL file with some objects, which `read_json_lines` reads."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


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


def digest(paths: Iterable[str | Path]) -> str:
    """SHA-256, in hexadecimal, of the names and contents of files, in order of their names."""
    total = hashlib.sha256()
    for path in sorted(map(Path, paths), key=lambda path: path.name):
        with open(path, "rb") as file:
            total.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
