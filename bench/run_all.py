"""Runs the benchmarks that compare this project with other programs, and writes bench/RESULTS.md.

    python bench/run_all.py --data data/prepared/sample/simp.json --folder DIR          or `make bench`
    python bench/run_all.py --data FILE --folder DIR --checkpoint DIR --files DIR     your own weights and data
    python bench/run_all.py … --only startup,scaling --out /tmp/results.md

Runs one script after another and writes the output of each under its command, below a line with the machine, the
versions and the date. The part of the file from the first other heading on is written by hand and is kept.
"""
import datetime
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.workload import SimpBenchConfig, small_checkpoint
from common.configs import ROOT
from common.dtypes import resolve_dtype
from common.files import UserError, read_text
from common.scripts import run
from common.settings import setting
from common.writing import write_text

PACKAGES = ("torch", "deepspeed", "transformers", "lm_eval", "tokenizers")
RESULTS = str(ROOT / "bench/RESULTS.md")
TITLES = {"finetuning": "Fine-tuning", "pretraining_speed": "Pretraining", "decoding": "Decoding",
          "scoring": "Benchmarks", "long_scoring": "Losses of long texts", "scaling": "Growth of cost",
          "startup": "Start-up", "published_steps": "Steps on many GPUs, modelled"}


@dataclass(frozen=True)
class RunAllConfig(SimpBenchConfig):
    """Settings of the run."""
    files: str | None = setting(None, "folder of the JSONL files named in configs/eval/local.toml; none: the sample "
                                      "suite's files")
    only: tuple[str, ...] = setting(tuple(TITLES), "benchmarks to run", names=TITLES)
    out: str = setting(RESULTS, "file of the results")

    def problems(self):
        if self.only != tuple(TITLES) and self.out == RESULTS:
            return ["--only would remove the results of the other benchmarks: give --out"]
        return []


def benchmark_flags(cfg, checkpoint):
    """The flags of each run of each benchmark: fine-tuning and decoding run in all dtypes that the hardware
    multiplies."""
    weights, files = ["--checkpoint", checkpoint], ["--files", cfg.files] if cfg.files else []
    data, bf16 = ["--data", cfg.data, *weights], resolve_dtype("auto") == "bf16"
    in_bf16 = [[*data, "--dtype", "bf16"]] if bf16 else []
    return {"finetuning": [*in_bf16, [*data, "--dtype", "fp32", "--samples", 128]],
            "pretraining_speed": [[]], "scaling": [[]],
            "decoding": [data, *([[*data, "--dtype", "bfloat16"]] if bf16 else [])],
            "scoring": [[*weights, *files]], "long_scoring": [[]],
            "startup": [["--folder", cfg.folder]], "published_steps": [[]]}


def describe_machine():
    """The processors and GPUs of this machine, in one line."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]
    names = names or [platform.machine()]  # where /proc/cpuinfo names no model, as on ARM
    features = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
                if torch.cpu.get_capabilities().get(name)]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} × {names[0]} ({', '.join(features)})" + (f", {', '.join(gpus)}" if gpus else "")


def written_by_hand(text):
    """The part of a file of results from the first heading on that is not of a benchmark."""
    headings = re.finditer("^## (.*)$", text, re.MULTILINE)
    return next((text[found.start():] for found in headings if found[1] not in TITLES.values()), "")


def run_script(command):
    """Runs a benchmark and shows its output. Returns the output and whether the benchmark succeeded."""
    print(shlex.join(command), flush=True)
    text = ""
    with subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            text += line
    return text + (f"ended with status {process.returncode}\n" if process.returncode else ""), not process.returncode


def main(cfg):
    """Runs the benchmarks and writes the file."""
    flags = benchmark_flags(cfg, cfg.checkpoint or small_checkpoint(cfg.folder))
    pages = [f"# Results\n\n{describe_machine()}; Python {platform.python_version()}, "
             + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
             + f"; {datetime.date.today()}. Written by `bench/run_all.py` (`make bench`).\n"]
    failed, out = [], Path(cfg.out)
    partial = out.with_name(f"{out.name}.partial")  # an interrupted run leaves the results so far
    for name in cfg.only:
        pages.append(f"\n## {TITLES[name]}\n")
        for arguments in flags[name]:
            command = ["python", f"bench/{name}.py", *map(str, arguments)]
            text, succeeded = run_script(command)
            if not succeeded:
                failed.append(shlex.join(command))
            pages.append(f"\n```\n$ {shlex.join(command)}\n{text}```\n")
            write_text(partial, "".join(pages))
    kept = written_by_hand(read_text(out)) if out.exists() else ""
    write_text(partial, "".join(pages) + ("\n" + kept if kept else ""))
    partial.replace(out)
    print(f"results: {out}")
    if failed:
        raise UserError(f"{'; '.join(failed)}: failed, with the messages above; {out} has the results of the others")


if __name__ == "__main__":
    run((RunAllConfig, main), __doc__)
