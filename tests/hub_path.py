"""The commands of a user with published models, from nothing to the report, through a stand-in of the Hub.

    python -m tests.hub_path FOLDER      makes FOLDER, clones the repository into it, and runs make there

The repositories have the names and the kinds of files of the published ones; the models are small.
"""
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from model.checkpoint import write_checkpoint
from model.tokenizer import train_tokenizer
from tests.conftest import ROOT, random_model, sample_texts
from tests.hub import HubStandIn, published_files
from tests.hub_datasets import add_tasks

TARGETS = ["train TASK=simp MODEL=stack SIZE=410m",
           *(f"data TASK={task} SOURCE=hub" for task in ("simp", "empd", "inqqg", "exp", "hgen")),
           "experiment SIZE=410m ARGS=\"--evaluate_args '--limit 20'\""]


def main(folder: Path) -> None:
    """Runs the targets."""
    folder.mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", ROOT, folder / "project"], check=True)
    (folder / "project/.venv").symlink_to(Path(sys.prefix))  # the packages are not installed again
    with HubStandIn() as hub:
        add_tasks(hub)
        for seed, name in enumerate(("LLM", "StackLLM")):
            model, place = random_model(seed), folder / name
            for part in ("tokenizer", "checkpoint"):
                (place / part).mkdir(parents=True)
            train_tokenizer(sample_texts(), model.config.vocab_size, place / "tokenizer")
            write_checkpoint(place / "checkpoint", model.config, model.named_parameters(), place / "tokenizer")
            hub.add("models", f"llm-stacking/{name}_410M_750BToken", published_files(place / "checkpoint", place))
        for target in TARGETS:
            start = time.monotonic()
            print(f"$ make {target}", flush=True)
            subprocess.run(["make", "-o", ".venv/user", *shlex.split(target)], cwd=folder / "project",
                           env=os.environ | hub.environment(folder / "cache"), check=True)
            print(f"({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
