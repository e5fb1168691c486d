"""Setup of a script's process: signals and standard streams. Scripts import this module before anything else.

Ctrl-C ends a script without a traceback, with status 130, also while the script imports its libraries. A
KeyboardInterrupt within the import of an extension module may arrive as the cause of another exception, and in a
callback it cannot be raised at all; the process ends then as well.

Standard streams that the caller has closed are opened on /dev/null: otherwise the next file or socket gets their
number, and libraries write their output to it.
"""
import os
import signal
import sys
from types import TracebackType

previous_excepthook, previous_unraisablehook = sys.excepthook, sys.unraisablehook


def end_if_interrupted(error: BaseException | None) -> None:
    """Ends the process if an exception is a KeyboardInterrupt or was raised because of one."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, KeyboardInterrupt) and not hasattr(sys, "ps1"):  # an interactive session goes on
            os._exit(128 + signal.SIGINT)
        seen.append(error)
        error = error.__cause__ or error.__context__


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Called for an exception that nothing catches."""
    end_if_interrupted(error)
    previous_excepthook(kind, error, trace)


def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
    """Called for an exception that cannot be raised."""
    end_if_interrupted(unraisable.exc_value)
    previous_unraisablehook(unraisable)


def open_closed_streams() -> None:
    """Opens the standard streams that are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # has the lowest free number, which is this one
    sys.stdout, sys.stderr = (stream or os.fdopen(number, "w", closefd=False)
                              for number, stream in ((1, sys.stdout), (2, sys.stderr)))


open_closed_streams()
sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
if not hasattr(sys, "ps1"):
    # A notebook sets a backend for the commands that it starts, too, which this environment may lack. Scripts write
    # figures to files only.
    os.environ["MPLBACKEND"] = "agg"
