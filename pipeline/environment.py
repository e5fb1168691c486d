"""Installs the packages of a requirements file into the environment of make, once.

    python -m pipeline.environment .venv/user requirements.txt

The first argument is the stamp: an empty file in the environment, made when all packages are installed. If several
processes need them, one installs them and the others wait. Imports no installed package.
"""
import common.preamble

import fcntl
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import UserError
from common.writing import explain_os_errors
from pipeline.jobs import run_command


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is created, and waits for it if another process holds it."""
    with open(path, "w") as file:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another process, which installs packages", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_current(stamp: Path, dependencies: list[Path]) -> bool:
    """Whether a stamp is at least as new as the files that it depends on."""
    return stamp.exists() and all(stamp.stat().st_mtime_ns >= path.stat().st_mtime_ns for path in dependencies)


def install(stamp: Path, requirements: Path, *others: Path) -> None:
    """Installs the packages of a requirements file. Does nothing if the stamp is newer than it and the other files."""
    folder = stamp.parent
    with explain_os_errors(folder), locked(folder.with_name(f"{folder.name}.lock")):
        if is_current(stamp, [requirements, *others]):
            return
        print(f"installing the packages of {requirements} into {folder}, once; this takes some minutes", flush=True)
        try:
            venv.create(folder.resolve(), symlinks=True, with_pip=True)  # which refuses a link to a folder
        except subprocess.CalledProcessError as error:
            output = error.output.decode(errors="replace").strip().splitlines()
            raise UserError(f"{folder} cannot be made: {output[-1] if output else error}; on Debian and Ubuntu install "
                            "python3-venv") from None
        run_command([str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r",
                     str(requirements)])
        stamp.touch()


if __name__ == "__main__":
    try:
        install(*map(Path, sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
