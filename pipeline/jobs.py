"""Jobs: commands that each make one directory, run here or submitted to Slurm.

The directories appear atomically, so an interrupted sequence of jobs continues with the job that was interrupted.
Imports no installed package, since make uses this module before they are installed.
"""
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.configs import ROOT
from common.files import UserError, read_text
from common.formatting import format_duration
from common.writing import write_text


@dataclass(frozen=True)
class Job:
    """A command that makes the directory `out`."""
    out: Path
    command: Sequence[object]
    flops: float = 0.0  # the work of the command; the remaining time is estimated from it
    inputs: tuple[str | Path, ...] = ()  # the initial checkpoint, then the files that the result depends on

    @property
    def argv(self) -> list[str]:
        """The command as strings."""
        return [str(word) for word in self.command]

    @property
    def script(self) -> str:
        """The name of the script in the command, or of the module."""
        files = [Path(word).name for word in self.argv if word.endswith(".py")]  # a launcher may be one, too
        return files[-1] if files else self.argv[self.argv.index("-m") + 1]

    @property
    def script_argv(self) -> list[str]:
        """The command from the script on, without the launcher, which does not change the result."""
        start = next(index for index, word in enumerate(self.argv) if word.endswith(self.script))
        end = self.argv.index("--launcher") if "--launcher" in self.argv else None
        return self.argv[start:end]


def run_jobs(jobs: Sequence[Job], dry_run: bool = False) -> None:
    """Runs jobs in order, each in its own process; with `dry_run` only prints the commands.

    Before each job a line says which one it is and how long all remaining jobs will take at the speed so far. If a job
    fails, its own message has said why, and this process exits with the job's status.
    """
    began, done, total = time.monotonic(), 0.0, sum(job.flops for job in jobs)
    for index, job in enumerate(jobs, 1):
        seconds = time.monotonic() - began
        left = f", about {format_duration(seconds / done * (total - done))} left in all" if done and not dry_run else ""
        print(f"[{index}/{len(jobs)}] {job.out}: {job.flops / 1e12:.1f} of the {(total - done) / 1e12:.1f} TFLOP "
              f"to come{left}\n{shlex.join(job.argv)}", flush=True)
        if not dry_run:
            run_command(job.argv)
        done += job.flops


def run_command(command: Sequence[str]) -> None:
    """Runs a command and exits with its status if that is not 0.

    While the command runs, this process forwards SIGTERM and SIGINT to it, then waits, and exits after one of them even
    if the command has ended well. Raises UserError if the command cannot be started or is killed by a signal.
    """
    received = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
    handlers = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status == -signal.SIGINT or -status in received:
        sys.exit(128 - status)
    if status < 0:
        raise UserError(f"{shlex.join(command)} was killed by signal {-status} (9: probably out of memory)")
    if status or received:
        sys.exit(status or 128 + received[0])


def read_slurm_template(path: str) -> str:
    """The text of a job script with placeholders. Raises UserError if @COMMAND@ is missing."""
    if "@COMMAND@" not in (text := read_text(path if Path(path).exists() else ROOT / path)):
        raise UserError(f"{path} is not a job script: expected a file with @COMMAND@ in it, such as "
                        "configs/slurm/step.sbatch")
    return text


def submit_command(command: Sequence[str], script: Path, template: str, gpus: int, dependency: str | None) -> str:
    """Writes the job script of a command and submits it. Returns the number of the Slurm job.

    The log is written next to the script. Raises UserError if the job cannot be submitted.
    """
    log = str(script.with_suffix(".log").absolute()).replace("%", "%%")  # %j is the number of the job
    values = {"NAME": script.stem, "LOG": log, "GPUS": str(gpus),
              "LOGS": shlex.quote(str(script.parent.absolute())), "FOLDER": shlex.quote(str(Path.cwd())),
              "COMMAND": f"PYTHON={shlex.quote(sys.executable)} {shlex.join(command)}"}
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    write_text(script, template)
    after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    words = ["sbatch", "--parsable", *after, str(script)]
    try:
        result = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"sbatch cannot be started ({error.strerror}): submit from a machine of the cluster") from None
    if result.returncode:
        raise UserError(f"{shlex.join(words)} failed: {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]


def split_words(text: str) -> list[str]:
    """The words of a command line. Raises UserError if its quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r} is not a command line: {error}") from None


def optional_flags(**values: object) -> list[str]:
    """The flags `--name value` of the values that are set."""
    return [word for name, value in values.items() if value for word in (f"--{name}", str(value))]


def further_flags(text: str, fixed: Collection[str]) -> list[str]:
    """The words of flags that a setting such as train_args adds to a command. Raises UserError if they repeat `fixed`
    settings, which the command has already, or end the script before it runs."""
    words = split_words(text)
    flags = {word.partition("=")[0].lstrip("-") for word in words if word.startswith("-")}
    if taken := sorted(flags & {*fixed, "h", "help", "show_settings"}):
        raise UserError(f"{', '.join(taken)} cannot be given here")
    return words
