"""The settings of experiment.py, and those of train.py and evaluate.py that follow from them."""
import functools
from collections.abc import Callable
from dataclasses import dataclass

from analysis.measures import EARLIER, OF_TEXT, PRIMARY, measure_names
from analysis.stages import CHOICE_METRICS, middle_rate
from common.configs import CONFIGS, known
from common.files import UserError
from common.provenance import DEFAULT_TEMPLATE
from common.settings import load, setting
from evaluation.evaluate_config import EvaluateConfig
from evaluation.suites import open_suite
from model.growth import OPERATORS
from pipeline import chain
from pipeline.jobs import further_flags, optional_flags
from pipeline.pretraining import layer_maps
from training.train_config import TrainConfig

# The settings that identify an evaluation.
EVALUATION_SETTINGS = {"checkpoint", "out", "data", "tasks", "text", "reference", "suite", "suite_files",
                       "posterior_samples"}


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings of an experiment."""
    size: str | None = setting(None, "size preset (a file in configs/size): m0 and the recipe of fine-tuning",
                               names="size")
    models: tuple[str, ...] = setting(chain.PAIR, "models of a pair: llm (from scratch), stack or another growth "
                                                  "operator, base (the shallow base trained further)", required=True,
                                      names=chain.MODELS)
    pairs: tuple[int, ...] = setting((), "pretraining seeds, each a pair of models in a folder pair-<seed>; none: one "
                                         "pair without a folder", at_least=1)
    controls: tuple[str, ...] = setting(("flops",), "what is equal between the m0 of llm and stack: flops; loss (the "
                                                    "worse one is also trained further until it is level)",
                                        required=True, names=("flops", "loss"))
    order: tuple[str, ...] = setting(chain.EXPERIMENT_ORDER, "tasks in the order of the stages; a task may be repeated",
                                     required=True, names="task")
    seeds: tuple[int, ...] = setting((42,), "seeds of fine-tuning; all but the first have a folder seed-<n>",
                                     required=True, at_least=0)
    rates: tuple[float, ...] = setting((), "learning rates of fine-tuning, each a chain from m0 in a folder rate-<x>; "
                                           "test sets are decoded and benchmarks run with the middle one (of two the "
                                           "smaller); none: one chain with the recipe's rate", above=0, at_most=1e6)
    methods: tuple[str, ...] = setting((), "files in configs/method, each a separate chain from m0; settings of "
                                           "train.py may follow: ewc:ewc_strength=10; none: one chain, by "
                                           "configs/train/finetune.toml")
    text: str | None = setting(None, "directory of token shards that m0 is pretrained on, and whose held-out part "
                                     "every stage is evaluated on; for a given m0 also a text file")
    data: str = setting(None, "folder of the preprocessed task files, <task>.json", required=True)
    out: str = setting(None, "folder of the models, such as runs/tiny", required=True)
    init_llm: str | None = setting(None, "checkpoint to use as the m0 of llm: a directory or a Hub id")
    init_stack: str | None = setting(None, "checkpoint to use as the m0 of stack")
    suite: str | None = setting("sample", "suite of benchmarks, as for evaluate.py; none: no benchmarks")
    suite_files: str | None = setting(None, "folder of the suite's local files")
    report: str = setting("report", "folder of the report")
    primary: str = setting(PRIMARY, "the measure that answers the question, named before the first run: the others are "
                                    "secondary")
    launcher: str = setting("", "words before the scripts, such as 'torchrun --nproc_per_node 8'; slurm: a Slurm job "
                                "for each job; not given: one process")
    gpus: int = setting(8, "GPUs, and processes, of a Slurm job", at_least=1, used_if=("launcher", ("slurm",)))
    slurm_file: str = setting("configs/slurm/step.sbatch", "script of a Slurm job, with the placeholder @COMMAND@",
                              used_if=("launcher", ("slurm",)))
    only: str | None = setting(None, "run only the job that makes this directory, and no report")
    train_args: str = setting("", "flags for every fine-tuning, such as '--max_train_samples 400'")
    stage_args: tuple[str, ...] = setting((), "flags for the fine-tuning of each stage, after train_args; in a file a "
                                              "list of texts")
    evaluate_args: str = setting("", "flags for every evaluation, such as '--limit 150'")
    posterior_samples: int = setting(4, "weight samples with which stages trained with IVON are evaluated in addition",
                                     at_least=0)
    dry_run: bool = setting(False, "print the plan and run nothing")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = [f"{name} has a value twice" for name in ("models", "pairs", "controls", "rates", "seeds", "methods")
                 if len(set(getattr(self, name))) < len(getattr(self, name))]
        found += [f"--size is missing, by which {model} is pretrained" + (
            f": give it, or --init_{model}" if model in chain.PAIR else "") for model in self.models
            if not self.size and not self.init(model)]
        if "flops" not in self.controls:
            found.append("controls lacks flops: the loss control trains one of these m0 further; give flops,loss")
        if "loss" in self.controls and not set(chain.PAIR) <= set(self.models):
            found.append(f"controls has loss, which needs the models {' and '.join(chain.PAIR)}")
        if (self.pairs or "loss" in self.controls) and (self.init_llm or self.init_stack):
            found.append("pairs and the loss control pretrain m0: leave out --init_llm and --init_stack")
        if self.primary in OF_TEXT and not self.text and (
                len(self.models) > 1 or len(self.methods) > 1 and self.rates):
            found.append(f"the primary measure, {self.primary}, needs a held-out text: give --text, or another "
                         "--primary")
        if self.rates and "--learning_rate" in " ".join([self.train_args, *self.stage_args]):
            found.append("rates replaces the learning_rate of train_args and stage_args: give one of them")
        found += [f"rates replaces the learning_rate of the method {method!r}: give one of them"
                  for method in self.methods if self.rates and ":learning_rate=" in method]
        if len(self.stage_args) not in (0, len(self.order)):
            found.append(f"stage_args has {len(self.stage_args)} texts for {len(self.order)} stages")
        checks: list[Callable[[], object]] = [functools.partial(evaluate_settings, self),
                                              functools.partial(check_primary, self)]
        if self.size is None or self.size in known("size"):
            checks += [functools.partial(train_settings, self, method, stage_args)
                       for method in self.each_method for stage_args in dict.fromkeys(self.each_stage_args)]
        if self.size in known("size"):
            checks.append(functools.partial(check_growth, self))
        for check in checks:
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return found or template_problems(self)

    def init(self, model: str) -> str | None:
        """The checkpoint that was given as the m0 of a model."""
        return {"llm": self.init_llm, "stack": self.init_stack}.get(model)

    @property
    def each_pair(self) -> tuple[int | None, ...]:
        """The pretraining seeds; None for a single pair without a folder."""
        return self.pairs or (None,)

    @property
    def each_method(self) -> tuple[str | None, ...]:
        """The methods; None for a single chain without a folder."""
        return self.methods or (None,)

    @property
    def each_stage_args(self) -> tuple[str, ...]:
        """The flags of each stage."""
        return self.stage_args or ("",) * len(self.order)

    @property
    def shared_rate(self) -> float | None:
        """The learning rate with which test sets are decoded and benchmarks run; None: all."""
        return middle_rate(sorted(self.rates)) if self.rates else None


@functools.cache  # the same for all pairs, models, rates and seeds
def train_settings(cfg: ExperimentConfig, method: str | None, stage_args: str) -> TrainConfig:
    """The settings of a stage with a method, apart from those that identify it. Raises UserError if train_args, the
    method or the stage's own flags are not valid."""
    try:
        return load(TrainConfig, [
            "--config", str(CONFIGS / "train/finetune.toml"), *optional_flags(size=cfg.size), "--task", chain.ORDER[0],
            "--init", "m0", "--data", "x", "--out", "x", *optional_flags(replay_text=cfg.text),
            *further_flags(cfg.train_args, chain.STAGE_SETTINGS), *further_flags(stage_args, chain.STAGE_SETTINGS),
            *(chain.method_flags(method) if method is not None else [])])
    except UserError as error:
        origins = [name for name, given in (("train_args", cfg.train_args), ("stage_args", stage_args),
                                            (f"the method {method!r}", method)) if given]
        raise UserError(f"{' and '.join(origins) or 'train.py'}: {error}") from None


def all_train_settings(cfg: ExperimentConfig) -> list[TrainConfig]:
    """The settings of all stages with all methods, each different one once."""
    return [train_settings(cfg, method, stage_args)
            for method in cfg.each_method for stage_args in dict.fromkeys(cfg.each_stage_args)]


def check_growth(cfg: ExperimentConfig) -> None:
    """Raises UserError if an operator cannot grow the base of the size, or grows it as another one does."""
    found: dict[tuple, str] = {}
    grown = [model for model in cfg.models
             if model in OPERATORS and not cfg.init(model) and not chain.hub_id(cfg.size, model)]
    for model in grown:
        if (same := found.setdefault(tuple(layer_maps(str(cfg.size), model)), model)) != model:
            raise UserError(f"{model} repeats the layers of the base as {same} does: leave one of these models out")


def template_problems(cfg: ExperimentConfig) -> list[str]:
    """Problems of the prompts, as sentences: all stages and evaluations need the same template, and for a chat template
    each m0 must be given."""
    trained = {settings.template for settings in all_train_settings(cfg)}
    evaluated = evaluate_settings(cfg).template or DEFAULT_TEMPLATE
    if trained != {evaluated}:
        return [f"the stages are trained with the template {' and '.join(sorted(trained))}, and all checkpoints are "
                f"evaluated with {evaluated}: give train_args and evaluate_args the same --template"]
    if evaluated == "chat" and not all(cfg.init(model) for model in cfg.models):
        return ["--template chat needs m0s with a chat template: give --init_llm and --init_stack"]
    return []


def length_notes(cfg: ExperimentConfig) -> list[str]:
    """Sentences on lengths of prompts and targets that fine-tuning and evaluation do not share."""
    found = []
    for name in ("max_source_length", "max_target_length"):
        lengths = {getattr(settings, name) for settings in all_train_settings(cfg)}
        length = getattr(evaluate_settings(cfg), name)
        if lengths != {length}:
            found.append(f"the stages are trained with {name} {' and '.join(map(str, sorted(lengths)))}, and evaluated "
                         f"with {length}: the losses are those of texts that are cut otherwise")
    return found


def check_primary(cfg: ExperimentConfig) -> None:
    """Raises UserError if the primary measure is not one that the report of this experiment has."""
    entries = open_suite(cfg.suite, cfg.suite_files)[1] if cfg.suite else []
    names = measure_names(list(dict.fromkeys(entry.get("category", "") for entry in entries
                                             if entry.get("metric", "acc") in CHOICE_METRICS)))
    if cfg.primary not in names:
        raise UserError(f"unknown primary measure {cfg.primary!r}, expected one of {'; '.join(names)}")
    if cfg.primary == EARLIER and not set(cfg.order[:-1]) - {cfg.order[-1]}:
        raise UserError(f"the primary measure, {EARLIER}, needs another task before the last one of order")
    if cfg.primary not in measure_names([]) and len(cfg.rates) > 1:
        raise UserError(f"the primary measure, {cfg.primary}, is of benchmarks, which run at one of the rates only, "
                        "and with several rates models are compared at equal new-task loss: give one rate, or a "
                        "--primary of losses")


@functools.cache
def evaluate_settings(cfg: ExperimentConfig) -> EvaluateConfig:
    """The settings of the evaluations, apart from those that identify one. Raises UserError if evaluate_args is not
    valid."""
    suite = optional_flags(suite=cfg.suite, suite_files=cfg.suite_files,
                           posterior_samples=cfg.posterior_samples if cfg.suite else 0)
    try:
        return load(EvaluateConfig, ["--checkpoint", "x", "--tasks", ",".join(cfg.order), "--data", "x",
                                     *optional_flags(text=cfg.text), *suite,
                                     *further_flags(cfg.evaluate_args, EVALUATION_SETTINGS)])
    except UserError as error:
        raise UserError(f"{'evaluate_args' if cfg.evaluate_args else 'evaluate.py'}: {error}") from None
