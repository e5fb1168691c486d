"""The targets of make: the commands that each one runs, from the variables in the environment.

    python -m pipeline.targets train               `make train`, with variables such as TASK in the environment
    DRY_RUN=1 python -m pipeline.targets train     prints the commands and runs none

Imports no installed package, since `make help` runs it before they are installed.
"""
import common.preamble

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from common.configs import below_root, known, unknown_name
from common.files import UserError, describe_error
from common.provenance import data_digest, read_lineage, read_record
from pipeline import chain
from pipeline.jobs import further_flags, optional_flags, run_command, split_words
from pipeline.make_variables import Variables, split_names

Command = list[object]
PYTHON, RUFF = ".venv/bin/python", ".venv/bin/ruff"
SAMPLE_SUITE = Path("data/eval/sample")

HELP = """\
make train TASK=simp MODEL=stack        fine-tune, after building whatever is missing before
make pretrain MODEL=stack|llm           build m0, the checkpoint that fine-tuning starts from
make data TASK=simp                     prepare a task
make evaluate TASK=simp MODEL=stack     test sets and benchmarks of a stage, or of CHECKPOINT=dir
make experiment SIZE=tiny PAIRS=5       pairs of models through the tasks, every stage evaluated, and the report
make experiment-plan RUNS=runs/tiny     how many pairs find a difference of EFFECT, from the pairs in RUNS
make report RUNS=runs/tiny              tables and figures of a folder of evaluated runs, in report/ or OUT
make growth-study SIZE=small            loss over FLOPs, from scratch and grown: figure and table (SEEDS, STUDY)
make plan SIZE=7b NPROC=8               whether a run fits, how long it takes (ZERO METHOD TOKENS GPU_MODEL GPU_MEMORY)
make growth-plan SIZE=7b TOKENS=300e9   when to grow, and what it saves (PARAMS=7e9 instead of SIZE)
make bench                              speed compared with other programs: bench/RESULTS.md (INIT, RAW, FILES)
make test | lint | clean                run the tests; check style and types; remove the environment and data/prepared

TASK    {order} (ORDER: the order of the stages)
MODEL   stack, interleave, middle or solar (grown), llm (full size from the start), or base (shallow, trained further)
SIZE    {sizes} (now {size})
SOURCE  sample (in data/sample), raw (the folder RAW) or hub (downloaded to RAW)
RAW     folder of raw task folders
EVAL_SIZE  training samples that are set aside for evaluation: a share (0.1 if not given) or a number
INIT    checkpoint to start from instead of m0: directory or Hub id; with experiment INIT_LLM and INIT_STACK
HUB     Hub id of m0; HUB= to pretrain m0 of a published size
TEXT    directory of token shards to pretrain on, and once m0 exists the held-out text; with experiment and a given m0
        also a text file
OUT     folder of the stages (now {out}), or of make report
RUNS    folder of the models (now {runs})
NPROC   number of processes; with experiment also LAUNCHER: words before the scripts, or slurm
PAIRS   pairs of models, with experiment: their number (seeds 1, 2, …), or pretraining seeds such as 4,6 or 4,
RATES   learning rates of fine-tuning, with experiment: 3e-4,1e-3,3e-3
CONTROLS  flops, or flops,loss: with experiment, also train the worse m0 further until it is level
SEEDS   seeds of fine-tuning (experiment) or of pretraining (growth-study): 42,43,44
METHOD  against forgetting, with settings as in ewc:ewc_strength=10; with experiment one or more, as in finetune,ewc:
        {methods}
SUITE   benchmarks: {suites}, a .toml file, or none; FILES: folder of their local files
TASKS   test sets of make evaluate (now {tasks})
ARGS    more flags for the script of the target: ARGS="--learning_rate 1e-5". With train they go to all missing
        stages, with pretrain to its last run. `.venv/bin/python train.py --help` lists the flags of train.py.
PYTHON  interpreter that the environment is made with; SMOLLM2: directory of SmolLM2-135M, for the tests that need it
DRY_RUN 1: print the commands and run none"""


def script_command(v: Variables, *script: str, **flags: object) -> Command:
    """The command of a target's script, with the flags that are set and those of ARGS."""
    return [PYTHON, *script, *optional_flags(**flags), *split_words(v.args)]


def data_commands(v: Variables, tasks: Iterable[str]) -> list[Command]:
    """Prepares tasks. data_prep.py notices which ones are up to date."""
    folder, commands = "data/sample" if v.source == "sample" else v.raw, list[Command]()
    for task in dict.fromkeys(tasks):
        if v.source == "hub":
            commands.append([PYTHON, "data_prep.py", "hub", "--task", task, "--output_path", v.raw])
        commands.append([PYTHON, "data_prep.py", "task", "--task", task, "--folder_path", folder, "--output_path",
                         v.data / f"{task}.json", *optional_flags(eval_dataset_size=v.get("EVAL_SIZE"))])
    return commands


def text_commands(v: Variables) -> list[Command]:
    """Makes the token shards of the size if they are missing. Raises UserError if TEXT does not exist, except
    in a dry run."""
    if Path(v.text).exists() or v.get("TEXT") and v.dry_run:
        return []
    if v.get("TEXT"):
        raise UserError(f"TEXT={v.text} does not exist: make token shards there with data_prep.py text, or leave "
                        "it out for those of the size")
    return [[PYTHON, "data_prep.py", "text", "--size", v.size, "--output_path", v.text]]


def suite_commands(suite: str) -> list[Command]:
    """Makes the items of the sample suite if `suite` is that one and they are missing."""
    if suite != "sample" or SAMPLE_SUITE.exists():
        return []
    return [[PYTHON, "data_prep.py", "suite", "--output_path", SAMPLE_SUITE]]


def m0_commands(v: Variables, args: str = "") -> list[Command]:
    """Makes m0. pretrain.py notices if it is finished. args: flags for the last run of train.py."""
    if v.hub:
        exists = v.m0.exists() and "HUB" not in v.given  # a given HUB is compared with the source of m0
        return [] if exists else [chain.download_command(PYTHON, v.hub, v.m0)]
    flags = [*optional_flags(launcher=shlex.join(v.torchrun)), *([f"--args={args}"] if args else [])]
    return [*([] if v.m0.exists() else text_commands(v)),
            chain.pretrain_command(PYTHON, v.size, v.model, v.text, v.out, flags)]


def train_commands(v: Variables, args: Iterable[str] = ()) -> list[Command]:
    """Makes the stage of TASK and what is missing before it. train.py notices if the stage is finished."""
    stages = v.stages
    made = max((index for index, stage in enumerate(stages) if stage.out.exists()), default=-1)
    missing = stages[made + 1:]
    tasks = [stage.task for stage in (stages if missing else stages[-1:])]
    check_init_of_chain(v)
    chain.check_order((stage.out for stage in stages), v.order, "RUNS")
    is_compared = bool(v.hub) and "HUB" in v.given and v.m0.exists()  # a given HUB with the source of m0
    commands = m0_commands(v) if not v.init and (is_compared or made < 0 and not v.m0.exists()) else []
    held_out = optional_flags(held_out_text=v.text if v.get("TEXT") or is_text_of_m0(v) else "")
    settings = chain.method_settings(v.method) if v.method else set()
    for stage in missing or stages[-1:]:
        method = chain.method_flags(v.method) if v.method else []
        method += ["--replay_text", v.text] if "replay_share" in settings else []
        commands.append(chain.finetune_command(v.torchrun or [PYTHON], stage, v.data / f"{stage.task}.json", v.preset,
                                               [*held_out, *method, *args]))
    return data_commands(v, tasks) + commands


def is_text_of_m0(v: Variables) -> bool:
    """Whether the token shards `v.text` are those that m0 was, or will be, pretrained on."""
    if v.init or v.hub:
        return False
    made = next((path for path in (v.m0, *(stage.out for stage in v.stages)) if path.exists()), None)
    if made is None:
        return True
    digest = read_lineage(made).get("text", {}).get("data_digest")
    return digest is not None and Path(v.text).is_dir() and digest == data_digest(v.text)


def check_init_of_chain(v: Variables) -> None:
    """Raises UserError if the first stage of the chain was trained from another checkpoint than INIT."""
    stage = v.stages[0].out
    started = read_record(stage).get("settings", {}).get("init") if v.init else None
    was_moved = started and not os.path.exists(started) and os.path.exists(v.init)
    if started and os.path.realpath(started) != os.path.realpath(v.init) and not was_moved:
        raise UserError(f"{stage} was trained from {started}, and INIT is {v.init}: give another OUT for the stages of "
                        "INIT, or remove the ones there")


def next_commands(v: Variables) -> list[str]:
    """Command lines to continue with after `make train`: the next task, or what follows the last; then real weights."""
    names = ("MODEL", "SIZE", "INIT", "SOURCE", "RAW", "EVAL_SIZE", "TEXT", "HUB", "RUNS", "OUT", "ORDER", "METHOD",
             "NPROC")
    given = {"MODEL": v.model} | {name: v.get(name) for name in names
                                  if v.get(name) or name == "HUB" and name in v.given}
    later = v.order[len(v.stages):]
    if later:
        args = {"ARGS": v.args} if v.args else {}
        lines = [("train", {"TASK": later[0]} | given | args, "the next task")]
    elif v.init or v.hub and not v.get("TEXT"):  # an experiment with weights from the Hub needs a text
        lines = [("evaluate", {"TASK": v.task} | given, "its results")]
    else:
        kept = {name: value for name, value in given.items() if name not in ("MODEL", "SIZE", "INIT", "HUB", "OUT")}
        own_order = {} if v.order == list(chain.ORDER) else {"ORDER": " ".join(v.order)}
        lines = [("experiment", {"SIZE": v.size} | kept | own_order, "the models compared")]
    if not v.hub and not v.init and v.task in chain.ORDER:
        lines.append(("train", {"TASK": v.task, "MODEL": "stack", "SIZE": "410m"},
                      "410M weights from the Hub, for a GPU"))
    return [f"{shlex.join(['make', target, *(f'{name}={value}' for name, value in values.items())])}  # {comment}"
            for target, values, comment in lines]


def finetuning_commands(v: Variables) -> list[Command]:
    """The commands of `make train`, whose ARGS are for train.py."""
    try:
        further_flags(v.args, chain.STAGE_SETTINGS - {"seed"})
    except UserError as error:
        raise UserError(f"ARGS: {error}: `make help` lists the variables of what make sets") from None
    return train_commands(v, split_words(v.args))


def evaluate_commands(v: Variables) -> list[Command]:
    """Evaluates CHECKPOINT or the stage of TASK, which is made if it is missing: a stage also on the text of m0, and in
    comparison with m0, as in an experiment."""
    is_stage, commands = not v.get("CHECKPOINT"), data_commands(v, v.tasks)
    if is_stage:
        check_init_of_chain(v)
    checkpoint = v.stages[-1].out if is_stage else v.get("CHECKPOINT")
    if is_stage and not v.stages[-1].out.exists():
        commands += [command for command in train_commands(v) if command not in commands]
    pretrains = [command for command in m0_commands(v) if command in commands]
    own_text = is_stage and is_text_of_m0(v) and (pretrains or v.m0.exists())
    text = v.text if v.get("TEXT") or own_text else ""
    flags = optional_flags(text=text, reference=v.init or v.m0 if text and is_stage else "",
                           suite=v.suite, suite_files=v.files)
    return [*commands, *suite_commands(v.suite), chain.evaluate_command(
        v.torchrun or [PYTHON], checkpoint, None, v.data, v.tasks, [*flags, *split_words(v.args)])]


def experiment_commands(v: Variables) -> list[Command]:
    """Runs the experiment, after making its data."""
    order = split_names(v.get("ORDER"))
    pretrains = not (v.hub or v.get("INIT_LLM") and v.get("INIT_STACK"))
    return [*data_commands(v, order or chain.EXPERIMENT_ORDER), *(text_commands(v) if pretrains else []),
            *suite_commands(v.suite), script_command(
                v, "experiment.py", size=v.preset, data=v.data, out=v.runs, suite=v.suite,
                text=v.text if pretrains else v.get("TEXT"), order=",".join(order), init_llm=v.get("INIT_LLM"),
                init_stack=v.get("INIT_STACK"), pairs=v.pairs, rates=v.get("RATES"), controls=v.get("CONTROLS"),
                seeds=v.get("SEEDS"), methods=v.method, suite_files=v.files,
                launcher=v.get("LAUNCHER") or shlex.join(v.torchrun))]


def study_commands(v: Variables) -> list[Command]:
    """Runs the growth study, after making its text."""
    out = v.get("STUDY") or Path("runs", v.size, "growth-study")
    return [*text_commands(v), script_command(v, "-m", "pipeline.growth_study", size=v.size, data=v.text, out=out,
                                              launcher=shlex.join(v.torchrun), seeds=v.get("SEEDS"))]


def bench_commands(v: Variables) -> list[Command]:
    """Runs the benchmarks, after making their data."""
    return [*data_commands(v, ["simp"]), *suite_commands("" if v.files else "sample"),
            script_command(v, "bench/run_all.py", data=v.data / "simp.json", folder="runs/bench", checkpoint=v.init,
                           files=v.files)]


def test_commands(v: Variables) -> list[Command]:
    """Runs the tests: up to four processes, one thread each. The files start in their own order: xdist would leave
    those with few tests, some of which take minutes, to the end."""
    weights = os.path.abspath(v.get("SMOLLM2")) if v.get("SMOLLM2") else ""
    # tests run make, too
    own = [word for name in ("ARGS", "GIVEN", "GOALS", "MAKEFLAGS", "MFLAGS") for word in ("-u", name)]
    environment = ["env", *own, "OMP_NUM_THREADS=1", f"SMOLLM2={weights}"]
    return [[*environment, PYTHON, "-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile",
             "--no-loadscope-reorder", *split_words(v.args)]]


COMMANDS: dict[str, Callable[[Variables], list[Command]]] = {
    "train": finetuning_commands,
    "pretrain": lambda v: m0_commands(v, v.args),
    "data": lambda v: data_commands(v, [v.task]),
    "evaluate": evaluate_commands,
    "experiment": experiment_commands,
    "experiment-plan": lambda v: [script_command(v, "-m", "pipeline.experiment_plan", runs=v.runs,
                                                 effect=v.get("EFFECT"))],
    "report": lambda v: [script_command(v, "report.py", runs=v.runs, out=v.get("OUT"))],
    "growth-study": study_commands,
    "plan": lambda v: [script_command(v, "-m", "pipeline.plan", init=v.init, size=v.preset,
                                      processes=v.nproc, zero=v.get("ZERO"), method=v.method,
                                      gpu=v.get("GPU_MODEL"), gpu_memory=v.get("GPU_MEMORY"),
                                      tokens=v.get("TOKENS"))],
    "growth-plan": lambda v: [script_command(v, "stack.py", "plan", params=v.get("PARAMS"), size=v.get("SIZE"),
                                             tokens=v.get("TOKENS"))],
    "bench": bench_commands,
    "test": test_commands,
    "lint": lambda v: [[RUFF, "check", "."], [PYTHON, "-m", "mypy"]],
}


def target_commands(target: str, environ: Mapping[str, str]) -> list[list[str]]:
    """The commands of a target, in order. Raises UserError with everything that is wrong with its variables."""
    variables = Variables(environ)
    if problems := unknown_name("target", target, COMMANDS) or variables.problems(target):
        raise UserError("; ".join(problems))
    return [[below_root(str(word)) for word in command] for command in COMMANDS[target](variables)]


def check_arguments(command: Sequence[str]) -> None:
    """Lets the script of a command check its settings. Exits with the status of the script if they are not valid."""
    script = script_place(command)
    checked = subprocess.run([PYTHON, *command[script:], "--show_settings"], stdout=subprocess.DEVNULL)
    if checked.returncode:
        sys.exit(checked.returncode)


def script_place(command: Sequence[str]) -> int:
    """The place of a command's script among its words."""
    return next(index for index, word in enumerate(command) if word == "-m" or word.endswith(".py"))


def main(target: str = "help") -> None:
    """Runs a target: prints and runs each of its commands. What is passed on to scripts is checked first if more than
    the preparation of tasks, which takes seconds, precedes them."""
    v = Variables(os.environ)
    if target == "help":
        return print(HELP.format(
            order=" ".join(chain.ORDER), sizes=" ".join(known("size")), methods=" ".join(known("method")),
            suites=", ".join(known("eval")), size=v.size, out=v.out, runs=v.runs, tasks=" ".join(v.tasks)))
    commands, dry_run = target_commands(target, os.environ), v.dry_run
    takes_long = any(words[1:3] != ["data_prep.py", "task"] for words in commands[:-1])
    passed_on = v.args or ":" in v.method or target in ("experiment", "growth-study")
    if passed_on and takes_long and not dry_run and target != "lint":
        by_script = {command[script_place(command)]: command for command in commands}
        for script, command in by_script.items():  # the last command of each script
            if script == "train.py" or command is commands[-1]:
                check_arguments(command)
    for command in commands:
        print(shlex.join(command), flush=True)
        if not dry_run:
            run_command(command)
    if target == "pretrain" and not dry_run:
        print(f"m0: {v.m0}")
    if target == "train" and not dry_run:
        print("next:", *next_commands(v), sep="\n  ")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, such as `head`
        os._exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)
