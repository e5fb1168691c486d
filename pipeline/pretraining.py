"""Jobs of pretraining: training runs of a size, and growth."""
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.configs import CONFIGS, PHASES, ROOT, read_config, read_toml
from common.files import UserError, is_number
from common.provenance import RUN, changed, read_record
from common.writing import write_json
from model.config import size_config
from model.growth import BLOCK_OPERATORS, OPERATORS
from pipeline.jobs import Job, split_words
from pipeline.ledger import read_own_json

# The operators that need the two depths only.
DEPTH_OPERATORS = [name for name in OPERATORS if name not in BLOCK_OPERATORS]

FACTORS = (4,)  # of growth, if a size names none

# The operators that grow a model in many stages of one block each.
STAGED_OPERATORS = "midas", "lidas"


def growth_factors(size: str) -> Sequence[int]:
    """The factors by which a size's base is grown, one for each growth."""
    return read_config("size", size).get("growth", {}).get("factors", FACTORS)


def base_depth(size: str, factors: Sequence[int] = ()) -> int:
    """The number of layers of the base that growth factors turn into a size's model. factors: none: those of the size.

    Raises UserError if the depth of the model is not a multiple of them.
    """
    factors = factors or growth_factors(size)
    full = size_config(size).num_hidden_layers
    if full % math.prod(factors):
        raise UserError(f"{full} layers are not a multiple of the growth factors {' × '.join(map(str, factors))}: "
                        "choose others")
    return full // math.prod(factors)


def layer_maps(size: str, operator: str, factors: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """The layer map of each growth of a size's base by an operator. factors: none: those of the size.

    Raises UserError if the operator cannot make these depths.
    """
    depth, maps = base_depth(size, factors), []
    for factor in factors or growth_factors(size):
        try:
            maps.append(tuple(OPERATORS[operator](depth, depth * factor)))
        except UserError as error:
            raise UserError(f"a base of {depth} layers cannot be grown by the factor {factor}: {error}") from None
        depth *= factor
    return maps


def run_flops(size: str, phase: str, spent: float = 0.0) -> float:
    """The FLOPs of the run that a phase's table describes, if `spent` were spent on its initial checkpoint."""
    table = read_config("size", size).get(phase, {})
    if not table.keys() & {"max_flops", "max_tokens"}:
        raise UserError(f"the table [{phase}] of the size has neither max_flops nor max_tokens: add one")
    flops = table["max_flops"] - spent if "max_flops" in table else size_config(size).flops(table["max_tokens"])
    if flops <= 0:
        raise UserError(f"the jobs before m0 cost {spent:.4g} FLOPs, and max_flops in [{phase}] is "
                        f"{table['max_flops']:.4g}: grow earlier, or raise it")
    return flops


def flops_before_last_growth(size: str) -> float:
    """The FLOPs of the runs that come before the last growth of a size's model. Raises UserError if the size does not
    say when it is grown."""
    depth, ends, spent = base_depth(size), read_config("size", size).get("growth", {}).get("at_tokens"), 0.0
    if not ends:
        raise UserError(f"the size {size} has no at_tokens in the table [growth], which says when it is grown: add it")
    for factor, begin, end in zip(growth_factors(size), [0, *ends], ends):
        spent += size_config(size, depth).flops(end - begin)
        depth *= factor
    return spent


def training_job(cfg: Any, out: Path, flops: float, flags: Sequence[object]) -> Job:
    """A pretraining run with additional flags. cfg: settings with size, data and launcher."""
    return Job(out, [*(split_words(cfg.launcher) or [sys.executable]), ROOT / "train.py", "--config",
                     CONFIGS / "train/pretrain.toml", "--size", cfg.size, "--data", cfg.data, "--out", out, *flags],
               flops)


def base_job(cfg: Any, out: Path, depth: int, tokens: int, flags: Sequence[object]) -> Job:
    """A pretraining run of a base: a model of `depth` layers, trained on `tokens` tokens and then grown."""
    return training_job(cfg, out, size_config(cfg.size, depth).flops(tokens), [
        "--phase", "base", "--num_hidden_layers", depth, "--max_tokens", tokens, *flags])


def growth_job(init: Path, out: Path, operator: str, depth: int, target: int, moments: str = "reset") -> Job:
    """Growth from `depth` to `target` layers. Raises UserError if the operator cannot make that many."""
    OPERATORS[operator](depth, target)
    return Job(out, [sys.executable, ROOT / "stack.py", "grow", "--init", init, "--out", out, "--operator", operator,
                     "--target_layers", target, *([] if moments == "reset" else ["--moments", moments])])


def held_out_loss(checkpoint: str | Path) -> float:
    """The held-out loss with which a pretraining run ended, in nats per token. Raises UserError if it has none."""
    result = read_record(checkpoint).get("result", {})
    if not is_number(result.get("eval_loss_after")):
        raise UserError(f"{checkpoint} is not a finished pretraining run: its {RUN} holds no eval_loss_after")
    return result["eval_loss_after"]


def record_recipe(path: Path, made: Iterable[Path], phases: Sequence[str] = PHASES, **settings: Any) -> None:
    """Writes to a JSON file what jobs are made with: settings, the tables of the size for some phases, and the
    pretraining config. made: the directories of these jobs and of others with the same recipe.

    Raises UserError if the file names another recipe and one of the directories exists: jobs are identified by their
    directory, and those of another recipe have the same directories. Entries that only the file has are not compared,
    since these jobs do not use them.
    """
    tables = {name: table for name, table in read_config("size", settings["size"]).items()
              if name in ("model", *phases)}
    recipe = json.loads(json.dumps(settings | tables | {"pretrain.toml": read_toml(CONFIGS / "train/pretrain.toml")}))
    finished = path.exists() and any(out.exists() for out in made)
    recorded = read_own_json(path, "the finished stages then count as made with these settings") if finished else {}
    if finished and (found := changed({name: recorded.get(name) for name in recipe}, recipe)):
        raise UserError(f"{path.parent} holds stages made with other settings: {'; '.join(found)}. Choose another "
                        "--out, or remove it")
    if not finished:
        write_json(path, recipe)
