"""lm-eval's results files. Writer and reader."""
import datetime
import functools
import json
import math
from pathlib import Path

from lm_eval.utils import handle_non_serializable

from common.files import write_text


def write_results(directory, results, samples):
    """Writes results as lm-eval does: results_<date>.json, and samples_<task>_<date>.jsonl with a line an item, of
    which the prompts are left out."""
    date = datetime.datetime.now().isoformat().replace(":", "-")
    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    for task, found in samples.items():
        lines = [dump({key: value for key, value in sample.items() if key not in ("doc", "arguments", "resps")})
                 for sample in found]
        write_text(Path(directory) / f"samples_{task}_{date}.jsonl", "\n".join(lines) + "\n")
    write_text(Path(directory) / f"results_{date}.json", dump(results, indent=2) + "\n")


def date_of(file):
    """The date in the name of a results file."""
    return Path(file).stem.removeprefix("results_")


def sample_files(file):
    """The files with the items of a results file, as lm-eval names them."""
    return sorted(Path(file).parent.glob(f"samples_*_{date_of(file)}.jsonl"))


def group_leaves(name, groups):
    """The tasks of a group, or a task itself. groups: lm-eval's "group_subtasks"."""
    return [leaf for child in groups[name] for leaf in group_leaves(child, groups)] if groups.get(name) else [name]


def figure(figures, metric):
    """(value, standard error) of a metric in a results entry, by lm-eval 0.4 ("acc,none", with the name of a filter
    behind the comma) or before ("acc"); value None where it is not there, error nan where it is not known."""
    name, _, pipeline = metric.partition(",")
    pipeline = pipeline or "none"
    for key, error in ((f"{name},{pipeline}", f"{name}_stderr,{pipeline}"), (name, f"{name}_stderr")):
        if isinstance(figures.get(key), int | float):
            spread = figures.get(error)
            return float(figures[key]), float(spread) if isinstance(spread, int | float) else math.nan
    return None, None
