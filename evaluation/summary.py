"""Tables of evaluation results, as text."""
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from common.files import UserError
from evaluation.metrics import CALIBRATION_METRICS
from evaluation.result_files import metric_value, tasks_of
from evaluation.suites import Benchmark, version_note


@dataclass(frozen=True)
class BenchmarkScore:
    """Results of one benchmark."""
    benchmark: Benchmark
    value: float  # of the primary metric
    stderr: float  # NaN if unknown
    items: int
    version: str  # of lm-eval's task; empty if unknown
    chance: float  # the value by guessing; NaN if unknown
    calibration: dict[str, float]  # empty if the benchmark is not multiple-choice
    sampled: dict[str, float]  # accuracy and calibration over posterior samples; empty without samples


def benchmark_scores(suite: Iterable[Benchmark], results: dict[str, Any]) -> list[BenchmarkScore]:
    """The scores of all benchmarks of a suite that were run. `results` is the content of a results file."""
    scores = []
    for benchmark in (benchmark for benchmark in suite if benchmark.name in results["results"]):
        entry = results["results"][benchmark.name]
        if (measured := metric_value(entry, benchmark.metric)) is None:
            names = [key.removesuffix(",none") for key, value in entry.items() if isinstance(value, float)]
            raise UserError(f"{benchmark.name} has no metric {benchmark.metric!r}; it has {', '.join(names)}")
        calibration = {key: entry[f"{key},none"] for key in CALIBRATION_METRICS if f"{key},none" in entry}
        sampled = {key: entry[f"{key},sampled"] for key in ("acc", *CALIBRATION_METRICS) if f"{key},sampled" in entry}
        tasks = tasks_of(results.get("group_subtasks", {}), benchmark.name)
        items = sum(results["n-samples"][task]["effective"] for task in tasks)
        versions = {str(results["versions"][task]) for task in tasks if task in results.get("versions", {})}
        version = "" if benchmark.file else ", ".join(sorted(versions))
        scores.append(BenchmarkScore(benchmark, *measured, items, version,
                                     entry.get("chance,none", math.nan), calibration, sampled))
    return scores


def loss_table(results: Iterable[dict[str, Any]]) -> str:
    """A line for each text or task: its loss, and the KL divergence if there is one. `results` are contents of losses
    files."""
    lines = [f"{'losses':<8} {'items':>5}  {'nats/token':>10} {'bits/byte':>9} {'KL/token':>9}"]
    for result in results:
        kl = "–" if result["kl"] is None else f"{result['kl']:.4f}"
        lines.append(f"{result['name']:<8} {result['samples']:>5}  {result['loss']:>10.4f} "
                     f"{result['bits_per_byte']:>9.4f} {kl:>9}")
    return "\n".join(lines)


def task_table(results: Iterable[dict[str, Any]]) -> str:
    """A line for each task: its metrics with their 95% intervals. `results` are contents of metrics files."""
    names = " ".join(f"{name:>18}" for name in ("BLEU", "ROUGE-1", "ROUGE-L", "SARI", "SARI (HF)"))
    lines = [f"{'task':<8} {'items':>5}  {names}  words  empty copied"]
    for result in results:
        metrics = result["metrics"]
        cells = [f"{value['mean']:5.1f} [{value['low']:4.1f}, {value['high']:4.1f}]" if value else "–"
                 for value in map(metrics.get, ("bleu", "rouge1", "rougeL", "sari", "sari_hf"))]
        words, empty, copied = (metrics[name]["mean"] for name in ("words", "empty", "copied"))
        lines.append(f"{result['task']:<8} {result['samples']:>5}  " + " ".join(f"{cell:>18}" for cell in cells)
                     + f" {words:6.1f} {empty:5.1f}% {copied:5.1f}%")
    return "\n".join(lines)


def suite_table(suite: Iterable[Benchmark], results: dict[str, Any]) -> str:
    """A line for each benchmark, grouped by category with the category's mean: percentages, and calibration.

    Benchmarks that also ran over posterior samples have a second line.
    """
    scores = benchmark_scores(suite, results)
    lines = [f"{'category':<9} {'benchmark':<36} {'items':>6} {'shots':>5} {'version':>7}  {'metric':<15} {'%':>6} "
             f"{'±':>4} {'chance':>6}  " + "  ".join(f"{name.upper():>6}" for name in CALIBRATION_METRICS)]
    for category in dict.fromkeys(score.benchmark.category for score in scores):
        in_category = [score for score in scores if score.benchmark.category == category]
        for score in in_category:
            benchmark = score.benchmark
            label = ("  " if benchmark.part_of else "") + (benchmark.label or benchmark.name)
            error = f"{'–':>4}" if math.isnan(score.stderr) else f"{100 * score.stderr:4.1f}"
            calibration = "  ".join(f"{score.calibration[key]:6.3f}" if key in score.calibration else f"{'–':>6}"
                                    for key in CALIBRATION_METRICS)
            chance = f"{'–':>6}" if math.isnan(score.chance) else f"{100 * score.chance:6.1f}"
            version = score.version or "–"
            lines.append(f"{category:<9} {label:<36} {score.items:>6} {benchmark.num_fewshot:>5} {version:>7}  "
                         f"{benchmark.metric:<15} {100 * score.value:6.1f} {error} {chance}  {calibration}")
            if score.sampled:
                label = f"  over {results['run']['posterior_samples']} posterior samples"
                lines.append(f"{'':<9} {label:<36} {'':>6} {'':>5} {'':>7}  {'acc':<15} "
                             f"{100 * score.sampled['acc']:6.1f} {'':>4} {'':>6}  "
                             + "  ".join(f"{score.sampled[key]:6.3f}" for key in CALIBRATION_METRICS))
        wholes = [score.value for score in in_category if not score.benchmark.part_of]
        if len(wholes) > 1:
            lines.append(f"{category:<9} {'mean':<36} {'':>6} {'':>5} {'':>7}  {'':<15} "
                         f"{100 * sum(wholes) / len(wholes):6.1f}")
    lines += [note for score in scores if (note := version_note(score.benchmark, score.version))]
    tokens = results["tokens"]
    if tokens["computed"]:
        lines.append(f"tokens computed: {tokens['computed']:,} of {tokens['asked']:,} requested; sharing prefixes "
                     f"saved a factor of {tokens['asked'] / tokens['computed']:.1f}")
    return "\n".join(lines)
