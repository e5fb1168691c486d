"""The variables of make: their defaults, what follows from them, and what is wrong with them.

Imports no installed package, like pipeline/targets.py.
"""
import re
from collections.abc import Mapping
from pathlib import Path

from common.configs import known, unknown_name
from common.files import UserError
from pipeline import chain
from pipeline.jobs import split_words

TORCHRUN = ".venv/bin/torchrun"
SHUTDOWN_TIMEOUT = "1800"  # seconds that processes have to end their step and save their state, by default 30

# All variables of make.
VARIABLES = ("ARGS", "CHECKPOINT", "CONTROLS", "DRY_RUN", "EFFECT", "EVAL_SIZE", "FILES", "GPU_MEMORY", "GPU_MODEL",
             "HUB", "INIT", "INIT_LLM", "INIT_STACK", "LAUNCHER", "METHOD", "MODEL", "NPROC", "ORDER", "OUT", "PAIRS",
             "PARAMS", "PYTHON", "RATES", "RAW", "RUNS", "SEEDS", "SIZE", "SMOLLM2", "SOURCE", "STUDY", "SUITE", "TASK",
             "TASKS", "TEXT", "TOKENS", "ZERO")


STAGES = "train", "data", "evaluate"  # targets of a stage of the chain
ALWAYS = "DRY_RUN", "PYTHON", "LAUNCHER"  # problems() says where LAUNCHER belongs
CHAIN = "TASK MODEL SIZE SOURCE RAW EVAL_SIZE TEXT HUB RUNS OUT ORDER METHOD NPROC"
# The variables that each target uses. A target that builds stages accepts all variables that name one. HUB and INIT are
# listed for experiment so that problems() can say what to give instead.
USED = {"train": f"{CHAIN} INIT ARGS", "pretrain": f"{CHAIN} ARGS", "data": f"{CHAIN} INIT",
        "evaluate": f"{CHAIN} INIT CHECKPOINT TASKS SUITE FILES ARGS",
        "experiment": "SIZE SOURCE RAW EVAL_SIZE TEXT RUNS ORDER METHOD NPROC INIT_LLM INIT_STACK PAIRS RATES CONTROLS "
                      "SEEDS SUITE FILES HUB INIT ARGS",
        "experiment-plan": "SIZE RUNS EFFECT ARGS", "report": "SIZE RUNS OUT ARGS",
        "growth-study": "SIZE TEXT STUDY SEEDS NPROC ARGS",
        "plan": "INIT SIZE NPROC ZERO METHOD GPU_MODEL GPU_MEMORY TOKENS ARGS",
        "growth-plan": "PARAMS SIZE TOKENS ARGS",
        "bench": "SIZE INIT SOURCE RAW EVAL_SIZE FILES ARGS", "test": "SMOLLM2 ARGS", "lint": ""}


def spaceless(text: str) -> str:
    """A list of numbers without the spaces at its commas."""
    return re.sub(r"\s*,\s*", ",", text.strip())


def split_names(text: str) -> list[str]:
    """Names that are divided by spaces or commas."""
    return text.replace(",", " ").split()


class Variables:
    """The variables of make, with their defaults."""

    def __init__(self, environ: Mapping[str, str]):
        self.given = environ
        self.task, self.model, self.init = self.get("TASK", "simp"), self.get("MODEL", "stack"), self.get("INIT")
        self.size = self.get("SIZE", Path(self.init).name or "tiny")
        self.preset = self.size if self.size in known("size") else None
        self.hub = self.get("HUB", chain.hub_id(self.preset, self.model) or "")  # HUB= forces pretraining
        published = any(chain.hub_id(self.preset, model) for model in chain.PAIR)
        self.source = self.get("SOURCE") or ("raw" if self.get("RAW") else "hub" if published else "sample")
        self.raw = self.get("RAW") or "data/raw"
        self.data = Path("data/prepared", self.source)
        self.text = self.get("TEXT") or str(Path("data/text", self.size))
        self.runs = self.get("RUNS") or str(Path("runs", self.size))
        self.out = Path(self.get("OUT") or Path(self.runs, self.model))
        self.m0 = self.out / "m0"
        is_own = self.task in known("task") and self.task not in chain.ORDER  # then its chain has no other stage
        self.order = split_names(self.get("ORDER")) or ([self.task] if is_own else list(chain.ORDER))
        self.tasks = split_names(self.get("TASKS", " ".join(self.order)))
        self.method, self.suite, self.files = self.get("METHOD"), self.get("SUITE", "sample"), self.get("FILES")
        pairs = spaceless(self.get("PAIRS"))
        is_count = re.fullmatch("[1-9][0-9]{0,3}", pairs)
        self.pairs = ",".join(map(str, range(1, int(pairs) + 1))) if is_count else pairs.removesuffix(",")
        self.nproc, self.args = self.get("NPROC") or "1", self.get("ARGS")
        self.dry_run = self.get("DRY_RUN") not in ("", "0")

    def get(self, name: str, default: str = "") -> str:
        """The value of a variable; the default if it is not set."""
        return self.given.get(name, default)

    def problems(self, target: str) -> list[str]:
        """Problems of the variables that a target uses, as sentences."""
        return [*self.not_used(target), *self.unknown_values(target), *self.contradictions(target),
                *self.malformed_values(target)]

    def not_used(self, target: str) -> list[str]:
        """Sentences on the given variables that make does not know, or that its targets do not use."""
        given, goals = self.get("GIVEN").split(), [goal for goal in self.get("GOALS", target).split() if goal in USED]
        used = {*ALWAYS, *(name for goal in goals for name in USED[goal].split())}
        unknown = sorted(set(given) - set(VARIABLES))
        unused = [name for name in given if name in VARIABLES and name not in used]
        found = [f"unknown variable {', '.join(unknown)}: `make help` lists the variables"] if unknown else []
        return found + ([f"make {' '.join(goals)} does not use {', '.join(unused)}"] if unused else [])

    def unknown_values(self, target: str) -> list[str]:
        """Sentences on the values that are not among those that a variable may have."""
        building = *STAGES, "experiment", "pretrain", "growth-study"
        has_init = not self.get("SIZE") and (self.init or self.get("INIT_LLM") and self.get("INIT_STACK"))
        checks = [(building, "MODEL", [self.model], chain.MODELS),
                  (building, "SOURCE", [self.source], ("sample", "raw", "hub")),
                  ((*building, "plan"), "SIZE", [] if has_init else [self.size], known("size")),
                  ((*STAGES, "experiment"), "ORDER", self.order, known("task")),
                  (("data",), "TASK", [self.task], known("task")),
                  (("train", "evaluate"), "TASK", [self.task], dict.fromkeys(self.order)),
                  (("evaluate",), "TASKS", self.tasks, known("task")),
                  (("evaluate", "experiment"), "SUITE", [] if self.suite.endswith(".toml") else [self.suite],
                   [*known("eval"), "none"]),
                  (("train", "evaluate"), "METHOD", [self.method.partition(":")[0]] if self.method else [],
                   known("method"))]
        return [problem for targets, variable, values, accepted in checks if target in targets
                for value in values for problem in unknown_name(variable, value, accepted)]

    def contradictions(self, target: str) -> list[str]:
        """Sentences on variables that do not go together, or not with the target."""
        found = []
        if target in (*STAGES, "plan") and self.init and "SIZE" not in self.given and self.preset:
            found.append(f"INIT is a folder with the name of the size {self.preset}: give SIZE={self.preset} to use "
                         "its recipe, or SIZE= and RUNS=folder for none")
        if target == "experiment" and "HUB" in self.given:
            found.append("HUB is the m0 of one model, and an experiment compares two: give INIT_LLM and INIT_STACK")
        if target == "experiment" and self.get("LAUNCHER") and "NPROC" in self.given:
            found.append("NPROC is for this machine: LAUNCHER says how many processes there are, for Slurm "
                         'ARGS="--gpus N"')
        if target != "experiment" and self.get("LAUNCHER"):
            found.append("LAUNCHER is for make experiment: for other targets give NPROC")
        if target == "pretrain" and self.hub and self.args:
            found.append(f"ARGS are for pretraining, and the m0 of {self.size} is downloaded: give HUB= to pretrain it")
        if target == "evaluate" and self.get("CHECKPOINT") and (
                stage_variables := {"MODEL", "METHOD", "INIT", "HUB", "RUNS", "OUT"} & set(self.get("GIVEN").split())):
            found.append(f"CHECKPOINT is evaluated instead of a stage: leave out {', '.join(sorted(stage_variables))}")
        if target == "experiment" and self.init:
            found.append("INIT is one checkpoint, and an experiment compares two: give INIT_LLM and INIT_STACK")
        return found

    def malformed_values(self, target: str) -> list[str]:
        """Sentences on values that cannot be read, and on a suite that does not exist."""
        found = []
        if target in ("evaluate", "experiment") and self.suite.endswith(".toml") and not (
                Path(self.suite).is_file() or self.dry_run):
            found.append(f"SUITE is {self.suite}, which does not exist: expected a .toml file, or one of "
                         f"{', '.join(known('eval'))}")
        if self.method and target in ("train", "evaluate", "plan"):
            try:
                chain.method_flags(self.method)
            except UserError as error:
                found.append(f"METHOD: {error}")
        if not self.nproc.isdecimal() or int(self.nproc) < 1:
            found.append(f"NPROC is {self.nproc!r}, expected a whole number of at least 1")
        if not re.fullmatch(r"([1-9]\d{0,3}|[1-9]\d*(,[1-9]\d*)*,|[1-9]\d*(,[1-9]\d*)+)?",
                            spaceless(self.get("PAIRS"))):
            found.append(f"PAIRS is {self.get('PAIRS')!r}, expected at most 9,999 pairs, or seeds divided by commas, "
                         "such as 4,6 or 4,")
        try:
            split_words(self.args)
        except UserError as error:
            found.append(f"ARGS: {error}")
        return found

    @property
    def torchrun(self) -> list[str]:
        """The words before a script that several processes run; empty for one process."""
        return [] if int(self.nproc) == 1 else [
            TORCHRUN, "--standalone", "--shutdown-timeout", SHUTDOWN_TIMEOUT, "--nproc_per_node", self.nproc]

    @property
    def stages(self) -> list[chain.FinetuneStage]:
        """The stages of the chain, up to the last one of TASK."""
        stages = chain.finetune_stages(self.order, self.init or self.m0, chain.chain_folder(self.out, self.method))
        while stages[-1].task != self.task:
            stages.pop()
        return stages
