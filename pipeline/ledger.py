"""The record of finished jobs, with the command and the inputs of each."""
import functools
from pathlib import Path

from common.configs import below_root
from common.files import UserError, digest, read_json
from common.provenance import data_digest
from common.writing import write_json
from model.checkpoint import checkpoint_digest
from model.hub import fetch_checkpoint
from pipeline.jobs import Job


class Ledger:
    """The finished jobs of an experiment, one JSON file each, since jobs may run at the same time."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def name(self, job: Job) -> str:
        """The name of a job, from its directory below the experiment's folder: llm-m1-simp-eval."""
        return "-".join(job.out.relative_to(self.folder).parts)

    def path(self, job: Job) -> Path:
        """The file of a job, such as experiment/llm-m1-simp.json."""
        return self.folder / "experiment" / f"{self.name(job)}.json"

    def unchanged(self, job: Job) -> bool:
        """Whether a job is finished, was run with the same command and the same inputs, and has all files it made."""
        path = self.path(job)
        if not (job.out.exists() and path.exists()) or None in (entry := ledger_entry(job))["inputs"].values():
            return False
        recorded = read_own_json(path, "the job is then run again")
        made = recorded.pop("made", [])
        return recorded == entry and all((job.out / name).exists() for name in made)

    def add(self, job: Job, entry: dict) -> None:
        """Records a finished job. entry: that of the job before it ran, since its inputs may have changed meanwhile."""
        made = sorted(path.name for path in job.out.glob("[!.]*") if path.is_file())
        write_json(self.path(job), entry | {"made": made})


def read_own_json(path: Path, otherwise: str) -> dict:
    """The object in a JSON file of this program. Raises UserError if it is damaged; `otherwise` says what happens after
    it is removed."""
    try:
        return read_json(path, dict)
    except UserError as error:
        raise UserError(f"{error}; remove it: {otherwise}") from None


def ledger_entry(job: Job) -> dict:
    """The command of a job without its launcher, and the digests of its inputs by path; None for a missing one."""
    return {"command": list(map(below_root, job.script_argv)),
            "inputs": {below_root(path): input_digest(path) for path in job.inputs}}


def input_digest(source: str | Path) -> str | None:
    """The digest of a checkpoint (a directory or a Hub id), of token shards, or of a file; None if it is missing."""
    path = Path(source)
    if not path.exists() and isinstance(source, str):
        path = fetch_checkpoint(source)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return cached_digest(path, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.cache
def cached_digest(path: Path, state: tuple) -> str:
    """The digest of a path, computed once for each state (names, sizes and times) of its files."""
    if (path / "config.json").exists():
        return checkpoint_digest(path)
    return data_digest(path) if path.is_dir() else digest([path])
