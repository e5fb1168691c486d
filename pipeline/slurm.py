"""The steps of an experiment as jobs of a Slurm cluster, each waiting for those that it needs."""
import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

from common.files import UserError, write_text
from common.settings import ROOT


def submit(cfg, steps, name_of):
    """Submits a job for each step, after those that make the weights it starts from, and one for the report at the end.

    A job runs experiment.py again for its step alone, so that what is recorded is the same. name_of: a step's name.
    """
    template, jobs = read_template(cfg.slurm_file), {}
    flags = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name != "slurm_file"
             and getattr(cfg, field.name) != field.default}
    flags["launcher"] = f"bash {shlex.quote(str(ROOT / 'configs/slurm/launch.sh'))}"
    same = [f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in flags.items()]
    for step in steps:
        parent = jobs.get(str(step.inputs[0])) if step.inputs else None
        command = [sys.executable, str(ROOT / "experiment.py"), *same, "--only", str(step.out)]
        jobs[str(step.out)] = send(cfg, template, name_of(step), command, parent and f"afterok:{parent}")
    send(cfg, template, "report", [sys.executable, str(ROOT / "report.py"), "--runs", cfg.out, "--out", cfg.report],
         "afterany:" + ":".join(jobs.values()) if jobs else None)
    print(f"{len(jobs) + 1} jobs submitted; their scripts and logs: {Path(cfg.out) / 'slurm'}")


def read_template(path):
    """The text of a job script with places to fill in."""
    file = Path(path) if Path(path).exists() else ROOT / path
    if not file.is_file() or "@COMMAND@" not in (text := file.read_text(encoding="utf-8")):
        raise UserError(f"{path} is no job script: expected a file with @COMMAND@ in it, as configs/slurm/step.sbatch")
    return text


def send(cfg, template, name, command, dependency):
    """Writes a job script and submits it; returns the job's number."""
    script = Path(cfg.out) / "slurm" / f"{name}.sh"
    values = {"NAME": name, "LOG": str(script.with_suffix(".log").absolute()), "GPUS": str(cfg.gpus),
              "LOGS": shlex.quote(str(script.parent.absolute())), "FOLDER": shlex.quote(str(Path.cwd())),
              "COMMAND": f"PYTHON={shlex.quote(sys.executable)} {shlex.join(command)}"}
    for key, value in values.items():
        template = template.replace(f"@{key}@", value)
    write_text(script, template)
    words = ["sbatch", "--parsable", *([f"--dependency={dependency}"] if dependency else []), str(script)]
    try:
        result = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"sbatch cannot be started ({error.strerror}): submit from a machine of the cluster") from None
    if result.returncode:
        raise UserError(f"{shlex.join(words)} failed: {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]
