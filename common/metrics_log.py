"""metrics.jsonl, the log of a run: one JSON object a step. Writer and reader."""
import importlib
import json
import re
from pathlib import Path

from common.files import UserError, explain_os_errors, write_text


class StepLog:
    """metrics.jsonl of a run: one JSON object a step, written through at once. Other ranks than 0 pass None.

    It is cut back to the `step` that the run goes on from, so that no step stands in it twice.
    """

    def __init__(self, directory, step=0, watchers=()):
        self.file, self.watchers = None, watchers
        if directory is not None:
            path = Path(directory) / "metrics.jsonl"
            write_text(path, "".join(logged_until(path, step)))
            with explain_os_errors(directory):
                self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, **values):
        if self.file:
            with explain_os_errors(self.file.name):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()
            for log, _ in self.watchers:
                log(values)

    def close(self):
        for _, close in self.watchers:
            close()


def watchers(cfg, directory, run):
    """The services that a run is logged to beside metrics.jsonl: pairs of functions (log a step's values, close)."""
    found = []
    if cfg.tensorboard:
        writer = optional("tensorboard", "torch.utils.tensorboard").SummaryWriter(directory / "tensorboard")
        found.append((lambda values: [writer.add_scalar(name, value, values["step"]) for name, value in values.items()
                                      if isinstance(value, int | float)], writer.close))
    if cfg.wandb:
        session = optional("wandb").init(project=cfg.wandb, name=str(cfg.out), config=run["settings"], dir=directory,
                                         id=re.sub(r"\W+", "-", str(cfg.out)), resume="allow")
        found.append((lambda values: session.log(values, step=values["step"]), session.finish))
    return found


def optional(package, module=None):
    """A module of a package that is not among the requirements; a UserError says how to get it."""
    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise UserError(f"--{package} needs the package {package}, which is not installed: pip install {package}") \
            from None


def logged_until(path, step):
    """The lines of a log up to a step; one that was cut short by a crash is left out with what follows it."""
    if not step or not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            logged = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            return
        if logged > step:
            return
        yield line


def read_log(path):
    """The objects of a metrics.jsonl, none where there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
