"""Running a script: its settings are parsed, errors become one line and an exit status, and the process ends."""
from common.preamble import end_if_interrupted

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.files import UserError, describe_error
from common.settings import load

Commands = tuple[type, Callable[[Any], Any]] | dict[str, tuple[type, Callable[[Any], Any]]]


def run(commands: Commands, description: str | None) -> NoReturn:
    """Runs a script as `dispatch` does, and ends the process.

    A script has written all its output when it returns. The interpreter is not shut down normally: library
    threads still at work then (gloo's, holding the tensors of the last collective; pyarrow's, apache/arrow issue
    45214) sometimes abort it, and a finished run would count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding that lacks a character must not end a run
    try:
        status = exit_status(commands, description or "")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, such as `head`
        os._exit(128 + signal.SIGPIPE)
    sys.stderr.flush()
    os._exit(status)


def exit_status(commands: Commands, description: str) -> int:
    """Runs a script as `dispatch` does, and returns the status to end with; prints the traceback of a bug."""
    try:
        dispatch(commands, description)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else bool(exit.code)
    except BrokenPipeError:
        raise
    except Exception as error:  # a bug
        end_if_interrupted(error)  # or Ctrl-C, wrapped by a library
        traceback.print_exc()
        print(f"error on rank {os.environ.get('RANK', 0)}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def dispatch(commands: Commands, description: str) -> None:
    """Parses the settings, calls the script's function, and turns a UserError into one line and status 2.

    Args:
        commands: a pair (settings dataclass, function), or a mapping from sub-commands to such pairs.
        description: the script's docstring, shown by `--help`.

    An OSError that nothing has translated, such as that of an unreadable file, counts as a UserError. With DEBUG=1 in
    the environment errors keep their traceback.
    """
    argv, prog = sys.argv[1:], Path(sys.argv[0]).name
    cfg = None
    try:
        if isinstance(commands, dict):
            if not argv or argv[0] not in commands:
                if not argv or argv[0] not in ("-h", "--help"):
                    raise UserError((f"unknown command {argv[0]!r}" if argv else "no command given") + ", expected one "
                                    f"of {', '.join(commands)}; `{prog} --help` describes them")
                print(f"{description}\ncommands: {', '.join(commands)}; `{prog} COMMAND --help` lists the settings")
                sys.exit(0)
            prog, (cls, function), argv = f"{prog} {argv[0]}", commands[argv[0]], argv[1:]
        else:
            cls, function = commands
        cfg = load(cls, argv, description, prog)
        function(cfg)
    except BrokenPipeError:
        raise
    except (UserError, OSError, MemoryError) as error:
        if os.environ.get("DEBUG") == "1":
            raise
        launched = "MASTER_ADDR" in os.environ  # otherwise RANK, if there is one, is left over from something else
        rank = os.environ.get("RANK", "0") if launched else "0"
        if rank == "0" or not rank.isdecimal():
            print(f"error: {describe_error(error)}", file=sys.stderr)
        elif cfg is not None:  # invalid flags fail on every rank; later errors may occur on one rank only
            print(f"error on rank {rank}: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
