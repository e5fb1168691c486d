"""All benchmarks beside what people use, in one run: bench/RESULTS.md.

    python bench/run_all.py --data data/prepared/sample/simp.json --folder DIR          or `make bench`
    python bench/run_all.py --data FILE --folder DIR --checkpoint DIR --files DIR     weights and data of one's own
    python bench/run_all.py … --only startup,scaling --out /tmp/results.md

Runs one script after another and writes what each printed below its command, with the machine, the versions and the
date above. What stands in the file from the heading "Tried" on is written by hand, and stays.
"""
import datetime
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import small_checkpoint
from common.files import UserError
from common.settings import ROOT, run, setting

PACKAGES = ("torch", "deepspeed", "transformers", "lm_eval", "tokenizers")
RESULTS = str(ROOT / "bench/RESULTS.md")
BY_HAND = "\n## Tried"
TITLES = {"finetuning": "Fine-tuning", "pretraining": "Pretraining", "decoding": "Decoding", "scoring": "Benchmarks",
          "scaling": "Growth of cost", "startup": "Start-up"}


@dataclass(frozen=True)
class ResultsSettings:
    """Settings of the run."""
    data: str | None = setting(None, "preprocessed file of the task simp")
    folder: str | None = setting(None, "folder to work in")
    checkpoint: str | None = setting(None, "checkpoint; none: random weights of the size small")
    files: str | None = setting(None, "folder of the JSONL files that configs/eval/local.toml names; none: the sample "
                                      "suite's")
    only: tuple[str, ...] = setting(tuple(TITLES), "benchmarks to run")
    out: str = setting(RESULTS, "file of the results")

    def problems(self):
        found = [f"--{name} is missing" for name in ("data", "folder") if not getattr(self, name)]
        if self.only != tuple(TITLES) and self.out == RESULTS:
            found.append("--only leaves benchmarks out, whose results would be lost: give --out")
        return found + [f"unknown benchmark {name!r}, expected one of {', '.join(TITLES)}" for name in self.only
                        if name not in TITLES]


def flags(cfg, checkpoint):
    """The flags of each benchmark."""
    weights = ["--checkpoint", checkpoint]
    return {"finetuning": ["--data", cfg.data, *weights], "pretraining": [], "decoding": ["--data", cfg.data, *weights],
            "scoring": [*weights, *(["--files", cfg.files] if cfg.files else [])], "scaling": [],
            "startup": ["--folder", cfg.folder]}


def machine():
    """What the benchmarks run on, in a line."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]
    features = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
                if torch.cpu.get_capabilities().get(name)]
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} × {names[0]} ({', '.join(features)})" + (f", {', '.join(cards)}" if cards else "")


def main(cfg):
    """Runs the benchmarks and writes the file."""
    checkpoint = Path(cfg.checkpoint or small_checkpoint(Path(cfg.folder)))
    pages = [f"# Results\n\n{machine()}; Python {platform.python_version()}, "
             + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
             + f"; {datetime.date.today()}. Written by `bench/run_all.py` (`make bench`).\n"]
    failed = []
    for name in cfg.only:
        command = ["python", f"bench/{name}.py", *map(str, flags(cfg, checkpoint)[name])]
        print(f"{shlex.join(command)}", flush=True)
        text = ""
        with subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                text += line
        if process.returncode:
            text += f"ended with status {process.returncode}\n"
            failed.append(name)
        pages.append(f"\n## {TITLES[name]}\n\n```\n$ {shlex.join(command)}\n{text}```\n")
    out = Path(cfg.out)
    _, heading, rest = (out.read_text(encoding="utf-8") if out.exists() else "").partition(BY_HAND)
    out.write_text("".join(pages) + heading + rest, encoding="utf-8")
    print(f"results: {out}")
    if failed:
        raise UserError(f"{', '.join(failed)} failed; what was said is above, the results of the others are in {out}")


if __name__ == "__main__":
    run((ResultsSettings, main), __doc__)
