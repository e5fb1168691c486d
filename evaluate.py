"""Evaluates a checkpoint: what it generates on the tasks' test sets, and how it scores on a suite of benchmarks.

    python evaluate.py --checkpoint runs/tiny/stack/m1-simp --tasks simp,empd --data data/prepared/sample --suite sample
    torchrun --nproc_per_node 8 evaluate.py …                                              (the same flags)

Writes predictions-<task>.jsonl and metrics-<task>.json for each task, and results_<date>.json for the suite, into the
folder `eval` of the checkpoint. What is there already, of the same weights, data and settings, is not done again.
"""
import dataclasses
import datetime
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from common import settings
from common.distributed import Distributed, resolve_dtype
from common.files import UserError, digest, read_json, write_json, write_text
from common.provenance import git_commit
from common.settings import read_config, setting, unknown_name
from corpus.tasks import clean, encode_prompts, read_task
from evaluation.parallel import ParallelModel
from evaluation.text_metrics import bertscore, bleu, health, interval, rouge, sari
from model.checkpoint import Weights, check_vocabulary, checkpoint_digest
from model.config import ModelConfig
from model.generation import GenerationConfig
from model.hub import load_model, locate
from model.parameter_files import POSTERIOR, find_parameter_files, open_prior
from model.tokenizer import TOKENIZER_FILES, Tokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation."""
    checkpoint: str | None = setting(None, "checkpoint to evaluate: a directory or a Hub id")
    out: str | None = setting(None, "folder for the results; none: eval in the checkpoint's directory")
    tasks: tuple[str, ...] = setting((), "tasks whose test sets are generated (files in configs/task)")
    data: str | None = setting(None, "folder of the preprocessed task files, <task>.json")
    suite: str | None = setting(None, "suite of benchmarks: a name in configs/eval, or the path of a .toml file")
    suite_files: str | None = setting(None, "folder of the suite's local files; none: beside the suite's .toml file")
    limit: int | None = setting(None, "only the first N test items of each task and benchmark")
    max_source_length: int = setting(1024, "most tokens of a prompt, <bos> included")
    seed: int = setting(42, "seed of sampling, where a task's decoding samples, and of weight samples")
    posterior_samples: int = setting(0, "draws of the weights from the checkpoint's posterior, over which the options' "
                                     "probabilities are averaged beside those of its mean")
    bertscore_model: str | None = setting(None, "directory of an encoder for BERTScore (needs the package bert-score)")
    bertscore_layer: int | None = setting(None, "the layer whose vectors BERTScore compares")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 where the hardware multiplies it")

    def problems(self):
        """What contradicts what, as sentences."""
        found = [] if self.checkpoint else ["--checkpoint is missing"]
        found += [problem for task in self.tasks for problem in unknown_name("task", task)]
        if self.tasks and not self.data:
            found.append("--tasks needs --data, the folder of their files")
        if not self.tasks and not self.suite:
            found.append("there is nothing to evaluate: give --tasks or --suite")
        if (self.bertscore_model is None) != (self.bertscore_layer is None):
            found.append("bertscore_model and bertscore_layer go together")
        found += [f"{name} is {getattr(self, name)}, expected at least {least}" for name, least in
                  (("limit", 1), ("seed", 0), ("posterior_samples", 0), ("max_source_length", 16), ("bertscore_layer", 1))
                  if getattr(self, name) is not None and getattr(self, name) < least]
        return found


def main(cfg):
    """Evaluates on all processes: rank 0 knows what is asked, the others carry out their shares."""
    with Distributed(datetime.timedelta(days=1)) as dist:  # while rank 0 downloads datasets the others wait
        run, tasks, suite = dist.on_rank0(lambda: prepare(cfg))
        source = dist.local_rank0_first(lambda: locate(cfg.checkpoint))
        dtype = torch.bfloat16 if run["dtype"] == "bf16" else torch.float32
        scorer = ParallelModel(dist, load_model(source, dtype, dist.device), Tokenizer(source))
        if dist.rank:
            return scorer.serve()
        print(f"evaluating {cfg.checkpoint}: {run['dtype']} on {dist.world_size} × {dist.device.type}", flush=True)
        out = Path(cfg.out or source / "eval")
        try:
            for task, (items, facts) in tasks.items():
                evaluate_task(cfg, task, items, scorer, out, run | facts)
            results = evaluate_suite(cfg, suite, scorer, out, run) if suite else None
        except UserError:  # comes between two requests, so the others wait for the next one
            scorer.dismiss()
            raise
        scorer.dismiss()
        print_tasks(tasks, out)
        if results and results["results"]:
            print_suite(suite, results)
        print(f"results: {out}", flush=True)
        if results and (missing := results["missing"]):
            names = {reason: [name for name in missing if missing[name] == reason] for reason in missing.values()}
            raise UserError(f"the datasets of {len(missing)} benchmarks cannot be had, the others were run: "
                            + "; ".join(f"{', '.join(found)} ({reason})" for reason, found in names.items())
                            + ". To run without a network, evaluate once on a machine that has one, copy its cache of "
                              "datasets (HF_HOME) here and set HF_DATASETS_OFFLINE=1; or use a suite with local files")


def prepare(cfg):
    """Rank 0's work before anything is loaded: checks checkpoint, tasks and suite.

    Returns (what the results will say of the run, {task: (test items, facts of the task)}, benchmarks).
    """
    source = locate(cfg.checkpoint)
    config = ModelConfig.read(source / "config.json")
    Weights(source).check(config)
    check_vocabulary(source, config)
    if Tokenizer(source).eos_id is None:
        raise UserError(f"{source} names no end-of-text token: add eos_token_id to its config.json")
    if cfg.posterior_samples and not open_prior(find_parameter_files(source, POSTERIOR), source, config):
        raise UserError(f"{source} has no posterior to draw weights from: it was not fine-tuned with IVON; "
                        "leave out --posterior_samples")
    tasks, problems = {}, []
    for task in cfg.tasks:
        path = Path(cfg.data) / f"{task}.json"
        if not path.is_file():
            problems.append(f"{path} does not exist: make it with data_prep.py task, or `make data TASK={task}`")
            continue
        items = read_task(path)[0]["test"][:cfg.limit]
        decoding = task_decoding(task, cfg.seed)
        if not items:
            problems.append(f"the test set of {path} is empty: make it from a raw folder with a test file")
        if cfg.max_source_length + decoding.max_new_tokens > config.max_position_embeddings:
            problems.append(f"max_source_length {cfg.max_source_length} + max_new_tokens {decoding.max_new_tokens} of "
                            f"{task} is more than the model's max_position_embeddings "
                            f"{config.max_position_embeddings}: lower max_source_length")
        spec = read_config("task", task)
        tasks[task] = items, {"data_digest": digest([path]), "decoding": dataclasses.asdict(decoding),
                              "max_source_length": cfg.max_source_length, "source": spec["source"],
                              "sari": spec.get("sari", False), "bertscore_model": cfg.bertscore_model,
                              "bertscore_layer": cfg.bertscore_layer}
    if problems:
        raise UserError("; ".join(problems))
    if cfg.suite:
        from evaluation.lm_eval_tasks import read_suite  # lm-eval takes seconds to import
    suite = read_suite(cfg.suite, cfg.suite_files) if cfg.suite else []
    texts = [source / name for name in (*TOKENIZER_FILES, "generation_config.json") if (source / name).exists()]
    run = {"checkpoint": str(cfg.checkpoint), "checkpoint_digest": checkpoint_digest(source),
           "tokenizer_digest": digest(texts), "dtype": resolve_dtype(cfg.dtype), "limit": cfg.limit}
    return run, tasks, suite


def task_decoding(task, seed):
    """The decoding of a task, from the table [decoding] of its file."""
    table, names = read_config("task", task)["decoding"], {entry.name for entry in dataclasses.fields(GenerationConfig)}
    problems = [f"unknown setting {name!r}" for name in sorted(table.keys() - names)]
    decoding = GenerationConfig(**{name: value for name, value in table.items() if name in names} | {"seed": seed})
    if problems := problems + decoding.problems():
        raise UserError(f"configs/task/{task}.toml [decoding]: " + "; ".join(problems))
    return decoding


def evaluate_task(cfg, task, items, scorer, out, run):
    """Generates a task's test set and writes its predictions and metrics, if they are not there already."""
    metrics_file, predictions_file = out / f"metrics-{task}.json", out / f"predictions-{task}.jsonl"
    if metrics_file.exists() and predictions_file.exists() and same_run(read_json(metrics_file).get("run", {}), run):
        return print(f"{metrics_file} is there already, of the same model, data and settings", flush=True)
    spec, decoding = read_config("task", task), task_decoding(task, cfg.seed)
    prompts = encode_prompts(scorer.tokenizer, [item["input"] for item in items], cfg.max_source_length)
    predictions = [scorer.tokenizer.decode(ids).strip() for ids in scorer.generate(prompts, decoding)]
    references = [item.get("references") or [item["output"]] for item in items]
    sources = [clean(item.get("src_info", {}).get(spec["source"]) or item["input"]) for item in items]
    values = rouge(predictions, references)
    if spec.get("sari"):
        values["sari"] = [sari(*texts) for texts in zip(sources, predictions, references)]
    if cfg.bertscore_model:
        values["bertscore"] = bertscore(predictions, references, cfg.bertscore_model, cfg.bertscore_layer)
    values |= health(predictions, sources)
    metrics = {"bleu": bleu(predictions, references)} | {name: interval(scores) for name, scores in values.items()}
    scores = [{name: round(found[index], 4) for name, found in values.items()} for index in range(len(items))]
    lines = [json.dumps(item | {"prediction": text, "scores": found}, ensure_ascii=False)
             for item, text, found in zip(items, predictions, scores)]
    write_text(predictions_file, "\n".join(lines) + "\n")
    write_json(metrics_file, {"task": task, "samples": len(items), "metrics": metrics,
                              "run": run | {"commit": git_commit()}})


def same_run(old, new):
    """Whether two records are of the same run; where the weights lie and the program's commit do not count."""
    ignored = {"checkpoint", "commit"}
    return {key: old.get(key) for key in old.keys() | new.keys() if key not in ignored} == \
        {key: json.loads(json.dumps(new.get(key))) for key in old.keys() | new.keys() if key not in ignored}


def evaluate_suite(cfg, suite, scorer, out, run):
    """Runs the benchmarks, if results of the same run are not there already. Returns lm-eval's results, with `suite`,
    `run`, `tokens` and `missing` added."""
    from evaluation.benchmarks import run_suite
    from evaluation.lm_eval_files import sample_files, write_results
    run = run | {"lm_eval": version("lm_eval"), "suite": [
        dataclasses.asdict(benchmark) | {"file": benchmark.file and digest([benchmark.file])} for benchmark in suite]}
    if cfg.posterior_samples:
        run |= {"posterior_samples": cfg.posterior_samples, "seed": cfg.seed,
                "checkpoint_digest": checkpoint_digest(locate(cfg.checkpoint), (POSTERIOR,))}
    for path in sorted(out.glob("results_*.json"), reverse=True):
        results = read_json(path)
        if same_run(results.get("run", {}), run) and not results["missing"]:
            print(f"{path} is there already, of the same model, data and settings", flush=True)
            return results
    draws = [(locate(cfg.checkpoint), ("weights", cfg.seed, number)) for number in range(cfg.posterior_samples)]
    results, samples, missing = run_suite(suite, scorer, cfg.limit, draws)
    results = (results or {"results": {}}) | {"run": run | {"commit": git_commit()}, "tokens": scorer.counts,
                                              "missing": missing}
    if results["results"]:
        older = [path for path in out.glob("results_*.json") if superseded(read_json(path), results)]
        write_results(out, results, samples)
        for path in older:
            path.unlink()
            for items in sample_files(path):
                items.unlink()
    return results


def superseded(old, new):
    """Whether results that this program wrote measure a benchmark that newer ones measure as well."""
    return "run" in old and bool(old["results"].keys() & new["results"].keys())


def print_tasks(tasks, out):
    """A line for each task: its metrics with their 95% intervals."""
    if not tasks:
        return
    print(f"\n{'task':<8} {'items':>5}  {'BLEU':>18} {'ROUGE-1':>18} {'ROUGE-L':>18} {'SARI':>18}  words  empty copied")
    for task in tasks:
        report = read_json(out / f"metrics-{task}.json")
        cells = [f"{value['mean']:5.1f} [{value['low']:4.1f}, {value['high']:4.1f}]" if value else "–"
                 for value in map(report["metrics"].get, ("bleu", "rouge1", "rougeL", "sari"))]
        words, empty, copied = (report["metrics"][name]["mean"] for name in ("words", "empty", "copied"))
        print(f"{task:<8} {report['samples']:>5}  " + " ".join(f"{cell:>18}" for cell in cells)
              + f" {words:6.1f} {empty:5.1f}% {copied:5.1f}%")


def print_suite(suite, results):
    """A line for each benchmark, by categories, with the mean of each category: percentages, and calibration."""
    from evaluation.benchmarks import CALIBRATION, figures
    rows = figures(suite, results)
    print(f"\n{'category':<9} {'benchmark':<36} {'items':>6} {'shots':>5}  {'metric':<15} {'%':>6} {'±':>4}  "
          + "  ".join(f"{name.upper():>6}" for name in CALIBRATION))
    for category in dict.fromkeys(row["category"] for row in rows):
        inside = [row for row in rows if row["category"] == category]
        for row in inside:
            name = ("  " if row["part_of"] else "") + row["label"]
            calibrated = "  ".join(f"{row[key]:6.3f}" if row[key] is not None else f"{'–':>6}" for key in CALIBRATION)
            error = f"{100 * row['stderr']:4.1f}" if row["stderr"] is not None else f"{'–':>4}"
            print(f"{category:<9} {name:<36} {row['items']:>6} {row['num_fewshot']:>5}  {row['metric']:<15} "
                  f"{100 * row['value']:6.1f} {error}  {calibrated}")
            if sampled := row["sampled"]:
                label = f"  over {results['run']['posterior_samples']} weight samples"
                print(f"{'':<9} {label:<36} {'':>6} {'':>5}  {'acc':<15} {100 * sampled['acc']:6.1f} {'':>4}  "
                      + "  ".join(f"{sampled[key]:6.3f}" for key in CALIBRATION))
        whole = [row["value"] for row in inside if not row["part_of"]]
        if len(whole) > 1:
            print(f"{category:<9} {'mean':<36} {'':>6} {'':>5}  {'':<15} {100 * sum(whole) / len(whole):6.1f}")
    tokens = results["tokens"]
    if tokens["computed"]:
        print(f"tokens computed {tokens['computed']:,} of {tokens['asked']:,} asked for: shared prefixes saved a "
              f"factor of {tokens['asked'] / tokens['computed']:.1f}")


if __name__ == "__main__":
    settings.run((EvaluateConfig, main), __doc__)
