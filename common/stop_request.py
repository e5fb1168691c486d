"""Signals that ask a run to stop."""
import os
import signal
import socket
import stat
import threading
import time

STOPPED = 75  # exit status of a stopped run that resumes when started again (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """A context manager that turns SIGTERM, SIGINT and SIGHUP into a request to stop; `signal` is the signal's name or
    None. SIGHUP says that the terminal is gone. It stays ignored under nohup, unless torchrun forwards it.

    Once `defers` is set, the loop honours the first signal after its step. Before that a signal ends the process at
    once, and afterwards a second one, unless it comes within two seconds: launchers forward a signal that the terminal
    has sent to every process already. A thread listens for signals, since Python runs its own handlers only after the
    current call returns, and that call may hang.
    """

    def __enter__(self) -> "StopRequest":
        self.signal: str | None = None
        self.defers = False
        self.since = 0.0
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        self.handlers = {number: signal.signal(number, lambda *_: None)
                         for number in (signal.SIGTERM, signal.SIGINT, *hangup)}
        self.lost_with_terminal = [number for number in (1, 2) if os.isatty(number)
                                   or stat.S_ISFIFO(os.fstat(number).st_mode)]  # such as one to tee
        self.wakeup_fd = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        self.ended = False
        os.register_at_fork(after_in_child=self.forget)
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def forget(self) -> None:
        """In a forked process, such as a worker of a pool: a signal to it has its usual effect, and is not written into
        the socket of its parent."""
        if not self.ended:
            signal.set_wakeup_fd(-1)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self.ended = True
        signal.set_wakeup_fd(self.wakeup_fd)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.sender.close()

    def listen(self) -> None:
        """Receives signal numbers until the sender is closed."""
        while received := self.receiver.recv(1):
            if received[0] not in self.handlers:
                continue
            name = signal.Signals(received[0]).name
            if received[0] == signal.SIGHUP:  # a write to what is gone would end the run
                with open(os.devnull, "w") as nowhere:
                    for number in self.lost_with_terminal:
                        os.dup2(nowhere.fileno(), number)
            if not self.defers or self.signal and time.monotonic() - self.since > 2:
                write_stderr_rank0(f"ended by {name}")
                os._exit(128 + received[0] if self.defers else STOPPED)
            if not self.signal:
                self.signal, self.since = name, time.monotonic()
                write_stderr_rank0(f"{name}: stopping after this step, or at the end; a second signal ends the run at "
                                   "once")


def write_stderr_rank0(line: str) -> None:
    """Writes a line to stderr, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{line}\n".encode())
