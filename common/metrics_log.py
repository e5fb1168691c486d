"""metrics.jsonl, the log of a training run: one JSON object a line. Writer and reader."""
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from common.files import UserError, is_number, parse_json, read_json_lines
from common.writing import explain_os_errors, write_text

Service = tuple[Callable[[dict[str, Any]], Any], Callable[[], Any]]  # (log the values of a step, close)


class MetricsLog:
    """Writes metrics.jsonl in a run's directory; each line is flushed immediately.

    Args:
        directory: the run's directory; None on ranks other than 0, which log nothing.
        step: the step that the run resumes after: later lines are removed, so that no step is logged twice.
        services: other services to log to.
    """

    def __init__(self, directory: Path | None, step: int = 0, services: Sequence[Service] = ()):
        self.file, self.services = None, services
        if directory is not None:
            path = directory / "metrics.jsonl"
            lines = list(lines_until(path, step))
            if (last := json.loads(lines[-1])["step"] if lines else 0) < step:
                print(f"{path} is damaged or incomplete: of {step} earlier steps those after {last} are lost")
            write_text(path, "".join(lines))
            with explain_os_errors(directory):
                self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **values: Any) -> None:
        """Appends a line."""
        if self.file:
            with explain_os_errors(self.file.name):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()
            for log, _ in self.services:
                log(values)

    def close(self) -> None:
        """Closes the file and the services."""
        if self.file:
            self.file.close()
        for _, close in self.services:
            close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects in a metrics.jsonl; empty if there is no such file. Raises UserError for an invalid line."""
    lines = read_json_lines(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        wrong = [name for name in ("loss", "eval_loss", "tokens", "flops")
                 if not is_number(line.get(name, 0)) and line[name] is not None]
        if type(line.get("step")) is not int:
            wrong = ["step"]
        if wrong:
            raise UserError(f"{path}, entry {number}: {wrong[0]} is {line.get(wrong[0])!r:.80}, expected a "
                            f"{'whole ' if wrong[0] == 'step' else ''}number: restore the file, or remove the line")
    return lines


def lines_until(path: Path, step: int) -> Iterator[str]:
    """The lines of a log up to a step. Stops at the first invalid line, such as one truncated by a crash."""
    if not step or not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if parse_json(line, path)["step"] > step:
                return
        except (UserError, KeyError, TypeError):
            return
        yield line + "\n"


def open_services(cfg: Any, directory: Path, record: dict[str, Any]) -> list[Service]:
    """The additional logging services that the settings enable: TensorBoard, Weights & Biases."""
    services: list[Service] = []
    if cfg.tensorboard:
        writer = optional_module("tensorboard", "torch.utils.tensorboard").SummaryWriter(directory / "tensorboard")
        services.append((lambda values: [writer.add_scalar(name, value, values["step"])
                                         for name, value in values.items() if isinstance(value, int | float)],
                         writer.close))
    if cfg.wandb:
        session = optional_module("wandb").init(project=cfg.wandb, name=str(cfg.out), config=record["settings"],
                                                dir=directory, resume="allow",
                                                id=re.sub(r"\W+", "-", f"{cfg.out}-{record['id'][:12]}"))
        services.append((lambda values: session.log(values, step=values["step"]), session.finish))
    return services


def check_services(tensorboard: bool, wandb: str | None) -> None:
    """Raises UserError if the package of a service is not installed."""
    for package, used in (("tensorboard", tensorboard), ("wandb", wandb)):
        if used:
            optional_module(package)


def optional_module(package: str, module: str | None = None) -> ModuleType:
    """A module of a package that is not in requirements.txt. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise UserError(f"--{package} needs the package {package}, which is not installed: pip install {package}") \
            from None
