"""The experiment: both models through all tasks, every stage evaluated on everything, and the report.

    python experiment.py --size tiny --text data/text/tiny --data data/prepared/sample --out runs/tiny
    python experiment.py … --init_llm DIR --init_stack DIR        checkpoints of one's own in place of pretrained ones
    python experiment.py … --order simp,empd,simp --seeds 42,43   a task may come again; each seed is a chain from m0
    python experiment.py … --methods finetune,ewc,vcl:tau=0.5    a chain for each way to forget less

Each step is a command of its own, which is printed. A step is done again only where its command, the weights that it
starts from or its data have changed since, as the digests in experiment/*.json say; so an experiment that was stopped
goes on where it stopped, and one that is complete ends at once.
"""
import dataclasses
import functools
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import UserError, digest, read_json, write_json
from common.formatting import format_duration
from common.provenance import data_digest
from common.settings import CONFIGS, ROOT, load, read_config, run, setting, unknown_name
from corpus.tasks import read_task
from evaluation.suites import open_suite
from model.checkpoint import checkpoint_digest
from model.config import ModelConfig
from model.hub import locate
from pipeline.jobs import Stage, run_command, shape, words
from pipeline.slurm import submit
from training.train_config import TrainConfig

UTILISATION = 0.3  # of the speed of a matrix product that training and evaluation reach, for the first estimate

CHARACTERS = 4  # a token, about

# What a method of an experiment may set: anything but what makes a stage the one that it is.
METHOD_SETTINGS = {field.name for field in dataclasses.fields(TrainConfig)} - {
    "task", "size", "phase", "init", "data", "out", "seed", "method", "local_rank"}


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings of an experiment."""
    size: str | None = setting(None, "size preset (a file in configs/size): m0 and the recipe of fine-tuning")
    models: tuple[str, ...] = setting(("llm", "stack"), "models: stack was grown, llm was not")
    order: tuple[str, ...] = setting(("simp", "empd", "inqqg"), "tasks in the order of the stages; one may come again")
    seeds: tuple[int, ...] = setting((42,), "seeds of fine-tuning; the stages of all but the first lie in seed-<n>")
    methods: tuple[str, ...] = setting((), "files in configs/method, each a chain of its own from m0; settings of "
                                           "train.py may follow: ewc:ewc_strength=10; none: one chain, by "
                                           "configs/train/finetune.toml")
    text: str | None = setting(None, "directory of token shards that m0 is pretrained on")
    data: str | None = setting(None, "folder of the preprocessed task files, <task>.json")
    out: str | None = setting(None, "folder of the models, such as runs/tiny")
    init_llm: str | None = setting(None, "checkpoint in place of the m0 of llm: a directory or a Hub id")
    init_stack: str | None = setting(None, "checkpoint in place of the m0 of stack")
    suite: str = setting("sample", "suite of benchmarks, as for evaluate.py")
    suite_files: str | None = setting(None, "folder of the suite's local files")
    report: str = setting("report", "folder of the report")
    launcher: str = setting("", "words before the scripts, such as 'torchrun --nproc_per_node 8'; none: one process; "
                                "slurm: a job for each step")
    gpus: int = setting(8, "GPUs, and processes, of a Slurm job")
    slurm_file: str = setting("configs/slurm/step.sbatch", "script of a Slurm job, with @COMMAND@ to fill in")
    only: str | None = setting(None, "run only the step that makes this directory, and no report")
    train_args: str = setting("", "flags for every fine-tuning, such as '--max_train_samples 400'")
    evaluate_args: str = setting("", "flags for every evaluation, such as '--limit 150'")
    posterior_samples: int = setting(4, "draws of the weights over which stages trained with IVON are evaluated, too")
    dry_run: bool = setting(False, "print the plan and run nothing")

    def problems(self):
        found = [f"--{name} is missing" for name in ("data", "out") if not getattr(self, name)]
        found += unknown_name("size", self.size) if self.size else []
        found += [problem for task in dict.fromkeys(self.order) for problem in unknown_name("task", task)]
        found += [f"unknown model {name!r}, expected llm or stack" for name in self.models
                  if name not in ("llm", "stack")]
        found += [f"{name} is empty or names one twice" for name in ("models", "seeds")
                  if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name))]
        found += ["methods names one twice"] if len(set(self.methods)) < len(self.methods) else []
        for method in self.methods:
            try:
                read_method(method)
            except UserError as error:
                found.append(str(error))
        found += [] if self.order else ["order is empty"]
        found += [f"posterior_samples is {self.posterior_samples}, expected at least 0"] if self.posterior_samples < 0 else []
        found += [f"{name} has no --init_{name}, and --size is missing" for name in self.models
                  if name in ("llm", "stack") and not self.size and not getattr(self, f"init_{name}")]
        return found


def read_method(text):
    """(flags for train.py, its settings by them) of a method such as "ewc:ewc_strength=10"; raises UserError."""
    file, *given = text.split(":")
    flags, others = ["--method", file], ["--task", "simp", "--init", "x", "--data", "x", "--out", "x"]
    for part in given:
        name, _, value = part.partition("=")
        if not value or name not in METHOD_SETTINGS:
            raise UserError(f"{part!r} of the method {text!r} is no name=value of a setting that a method may have")
        flags += [f"--{name}", value]
    try:
        return flags, load(TrainConfig, [*flags, *others], "")
    except UserError as error:
        raise UserError(f"the method {text!r}: {error}") from None


@dataclass(frozen=True)
class Step(Stage):
    """A stage of the experiment: what its result depends on, beside its command, is `inputs`."""
    script: str = ""
    inputs: tuple = ()

    @property
    def work(self):
        """The command from the script on, without the launcher, which changes no number."""
        command = [str(word) for word in self.command]
        start = next(index for index, word in enumerate(command) if word.endswith(self.script))
        end = command.index("--launcher") if "--launcher" in command else len(command)
        return command[start:end]


def plan(cfg):
    """The steps of the experiment, in order."""
    return [step for model in cfg.models for step in model_steps(cfg, model)]


def model_steps(cfg, model):
    """The steps of one model: m0, then for each method and seed the stages; each is evaluated before the next."""
    folder, steps = Path(cfg.out) / model, []
    start = getattr(cfg, f"init_{model}")
    if start is None:
        start = folder / "m0"
        steps.append(start_step(cfg, model, start))
    steps.append(evaluation(cfg, model, start, folder / "m0"))
    for method in cfg.methods or [None]:
        place = folder / method.replace(":", "-") if method else folder
        for seed in cfg.seeds:
            steps += chain_steps(cfg, model, start, place if seed == cfg.seeds[0] else place / f"seed-{seed}", method, seed)
    return steps


def chain_steps(cfg, model, start, place, method, seed):
    """The steps of one chain from m0: the stages with one method and one seed."""
    parent, steps, flags, sampled = start, [], [], []
    recipe = [CONFIGS / "train/finetune.toml", *size_files(cfg)]
    if method:
        flags, settings = read_method(method)
        recipe.append(CONFIGS / f"method/{settings.method}.toml")
        sampled = ["--posterior_samples", cfg.posterior_samples] if settings.optimizer == "ivon" else []
    for number, task in enumerate(cfg.order, 1):
        out, data = place / f"m{number}-{task}", Path(cfg.data) / f"{task}.json"
        size = ["--size", cfg.size] if cfg.size else []
        first = ["--rehearsal", "0"] if number == 1 and method and settings.rehearsal else []
        command = [*launch(cfg), ROOT / "train.py", "--config", CONFIGS / "train/finetune.toml", *size,
                   "--task", task, "--init", parent, "--data", data, "--out", out, "--seed", seed,
                   *words(cfg.train_args), *flags, *first]
        steps.append(Step(out, command, training_flops(cfg, model, data), "train.py", (parent, data, *recipe)))
        steps.append(evaluation(cfg, model, out, out, sampled))
        parent = out
    return steps


def start_step(cfg, model, out):
    """m0: pretrained by the size's recipe, or from the Hub."""
    tables = read_config("size", cfg.size)
    if hub := tables.get("hub", {}).get(model):
        return Step(out, [sys.executable, "-m", "model.hub", hub, out], 0.0, "model.hub")
    if not cfg.text:
        raise UserError(f"m0 of {model} has to be pretrained: give --text, or --init_{model}")
    command = [sys.executable, ROOT / "pretrain.py", "--size", cfg.size, "--model", model, "--data", cfg.text,
               "--out", out.parent, *(["--launcher", cfg.launcher] if cfg.launcher else [])]
    return Step(out, command, tables.get(model, {}).get("max_flops", 0.0), "pretrain.py",
                (Path(cfg.text), CONFIGS / "train/pretrain.toml", *size_files(cfg)))


def evaluation(cfg, model, checkpoint, directory, sampled=()):
    """The evaluation of a checkpoint on all tasks of the order and the suite."""
    tasks = list(dict.fromkeys(cfg.order))
    command = [*launch(cfg), ROOT / "evaluate.py", "--checkpoint", checkpoint, "--out", directory / "eval",
               "--data", cfg.data, "--tasks", ",".join(tasks), "--suite", cfg.suite,
               *(["--suite_files", cfg.suite_files] if cfg.suite_files else []), *sampled, *words(cfg.evaluate_args)]
    files = [place for task in tasks for place in (Path(cfg.data) / f"{task}.json", CONFIGS / f"task/{task}.toml")]
    files += suite_files(cfg)
    return Step(directory / "eval", command, evaluation_flops(cfg, model), "evaluate.py", (checkpoint, *files))


def size_files(cfg):
    """The file of the size's recipes, if a size is given."""
    return [CONFIGS / f"size/{cfg.size}.toml"] if cfg.size else []


def suite_files(cfg):
    """The TOML file of the suite and the local files that it names."""
    path, entries, folder = open_suite(cfg.suite, cfg.suite_files)
    return [path, *(folder / name for name in dict.fromkeys(entry["file"] for entry in entries if "file" in entry))]


def launch(cfg):
    """The words before a script's name; a Slurm job runs this script again with those of its own."""
    return words(cfg.launcher) if cfg.launcher not in ("", "slurm") else [sys.executable]


def model_config(cfg, model):
    """The configuration of a model."""
    init = getattr(cfg, f"init_{model}")
    return ModelConfig.read(locate(init) / "config.json") if init else shape(cfg.size)


def training_flops(cfg, model, data):
    """The FLOPs of fine-tuning on a task's training split, about."""
    table = read_config("size", cfg.size).get("finetune", {}) if cfg.size else {}
    samples = flag(cfg.train_args, "max_train_samples", table.get("max_train_samples"))
    epochs = flag(cfg.train_args, "num_train_epochs", table.get("num_train_epochs", 3))
    items = read_items(data)["train"][:samples and int(samples)]
    tokens = sum(len(item["input"]) + len(item["output"]) for item in items) / CHARACTERS
    return model_config(cfg, model).flops(tokens * epochs)


def evaluation_flops(cfg, model):
    """The FLOPs of an evaluation, about: a third of training's for each token that is read or tried, of the test sets
    and of the suite's local files; what lm-eval downloads is not known before."""
    tokens, limit = 0, flag(cfg.evaluate_args, "limit", None)
    for task in dict.fromkeys(cfg.order):
        decoding = read_config("task", task)["decoding"]
        new = decoding.get("num_beams", 1) * decoding["max_new_tokens"] / 2
        tokens += sum(len(item["input"]) / CHARACTERS + new
                      for item in read_items(Path(cfg.data) / f"{task}.json")["test"][:limit and int(limit)])
    for file in suite_files(cfg)[1:]:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        tokens += sum(map(len, lines[:limit and int(limit)])) / CHARACTERS
    return model_config(cfg, model).flops(tokens) / 3


def flag(args, name, default):
    """The number that a flag among `args` has, or the default; raises UserError where it is none."""
    given = [part for word in words(args) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if f"--{name}" not in given:
        return default
    value = next(iter(given[given.index(f"--{name}") + 1:]), "")
    try:
        return None if value == "none" else float(value)
    except ValueError:
        raise UserError(f"--{name} is {value!r} in {args!r}, expected a number") from None


@functools.cache
def read_items(path):
    """The splits of a preprocessed task file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: make it with data_prep.py task, or `make data`")
    return read_task(path)[0]


def machine_speed(size=1024, repeats=8):
    """FLOPs a second of a matrix product in fp32 on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.rand(size, size, device=device)
    (a @ a).sum().item()
    began = time.perf_counter()
    for _ in range(repeats):
        b = a @ a
    b.sum().item()
    return 2 * size ** 3 * repeats / (time.perf_counter() - began)


class Pace:
    """How fast each script is here: as measured where it ran before, otherwise at the speed given (FLOPs a second)."""

    def __init__(self, speed):
        self.speed, self.spent = speed, {}

    def add(self, step, seconds):
        flops, total = self.spent.get(step.script, (0.0, 0.0))
        self.spent[step.script] = flops + step.flops, total + seconds

    def left(self, steps):
        """Seconds that steps will take."""
        seconds = 0.0
        for step in steps:
            done, took = self.spent.get(step.script, (0.0, 0.0))
            seconds += step.flops * (took / done if done else 1 / self.speed)
        return seconds


def inputs_digest(step):
    """Digests of the weights, data and settings that a step depends on, by path; None for what is not there yet."""
    return {str(path): digest_of(path) for path in step.inputs}


def digest_of(source):
    """The digest of a checkpoint (a directory or a Hub id), of token shards, or of a file; None where nothing is."""
    path = Path(source)
    if not path.exists() and isinstance(source, str):
        path = locate(source)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return digest_of_state(path, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.cache
def digest_of_state(path, state):
    """The digest of what lies at a path, read once as long as names, sizes and times of its files stay the same."""
    if (path / "config.json").exists():
        return checkpoint_digest(path)
    return data_digest(path) if path.is_dir() else digest([path])


class Ledger:
    """What each finished step was made with, a file a step, since steps may run at the same time."""

    def __init__(self, out):
        self.out = Path(out)

    def path(self, step):
        """The file of a step, such as experiment/llm-m1-simp.json."""
        return self.out / "experiment" / f"{name_of(self.out, step)}.json"

    def unchanged(self, step):
        """Whether a step was finished with the same command and the same inputs."""
        path, entry = self.path(step), self.entry(step)
        return step.out.exists() and path.exists() and None not in entry["inputs"].values() and read_json(path) == entry

    def entry(self, step):
        return {"command": step.work, "inputs": inputs_digest(step)}

    def add(self, step):
        write_json(self.path(step), self.entry(step))


def name_of(out, step):
    """A step's name: its place under the experiment's folder, such as llm-m1-simp-eval."""
    return "-".join(step.out.relative_to(out).parts)


def lacks_benchmarks(step, began):
    """Whether an evaluation that failed has written, since it began, the results of all benchmarks that can be had."""
    return step.script == "evaluate.py" and any(
        path.stat().st_mtime >= began and read_json(path).get("missing") for path in step.out.glob("results_*.json"))


def main(cfg):
    """Prints the plan, runs what is missing or changed, and writes the report."""
    steps, ledger = plan(cfg), Ledger(cfg.out)
    if cfg.only and not (steps := [step for step in steps if str(step.out) == cfg.only]):
        raise UserError(f"{cfg.only} is made by no step of this experiment")
    pace, to_do = Pace(UTILISATION * machine_speed()), [step for step in steps if not ledger.unchanged(step)]
    for number, step in enumerate(steps, 1):
        print(f"  {number:>3}  {step.out}: " + (f"{step.flops / 1e12:.2f} TFLOP" if step in to_do else "complete"))
    print(f"{len(steps)} steps, {len(to_do)} of them to do; about {format_duration(pace.left(to_do))} at {UTILISATION:.0%} of a "
          "matrix product's speed on one device of this machine", flush=True)
    if cfg.dry_run:
        return
    if cfg.launcher == "slurm":
        return submit(cfg, to_do, functools.partial(name_of, cfg.out))
    incomplete = []
    for number, step in enumerate(steps, 1):
        if ledger.unchanged(step):
            continue
        ahead = [later for later in steps[number - 1:] if later in to_do]
        print(f"[{number}/{len(steps)}] {step.out}, about {format_duration(pace.left(ahead))} left in all\n"
              f"{shlex.join(map(str, step.command))}", flush=True)
        began = time.time()
        try:
            run_command([str(word) for word in step.command])
        except SystemExit:
            if not lacks_benchmarks(step, began):
                raise
            incomplete.append(str(step.out))  # such as a dataset that cannot be had: the stages after it can go on
            continue
        pace.add(step, time.time() - began)
        ledger.add(step)
    if not cfg.only:
        try:
            run_command([sys.executable, str(ROOT / "report.py"), "--runs", str(cfg.out), "--out", str(cfg.report)])
        except SystemExit:
            if not incomplete:
                raise
    if incomplete:
        raise UserError(f"{len(incomplete)} evaluations are incomplete: {', '.join(incomplete)}. Each said why above; "
                        "start again to do them anew")


if __name__ == "__main__":
    run((ExperimentConfig, main), __doc__)
