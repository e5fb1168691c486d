"""Benchmarks by lm-eval: suites of them, our model in lm-eval's terms, calibration beside its figures."""
import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import math
import re
import warnings
from array import array
from pathlib import Path

import datasets
import huggingface_hub
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window

from metrics import averaged, calibration
from model.checkpoint import first_line
from model.files import UserError, read_json_lines, write_text
from model.generate import Decoding
from results import figure
from settings import overlay
from suites import Benchmark, open_suite

MAX_NEW_TOKENS = 256  # of a generation that says no number, as in lm-eval's own backend
CALIBRATION = ("ece", "nll", "brier")  # as metrics.calibration names them
ENCODED_AT_ONCE = 1000  # texts


# -------------------------------------------------------------------------------------------------------------- suites

def read_suite(name, folder=None):
    """The benchmarks of a suite (see suites.open_suite). One UserError lists everything that is wrong with them."""
    path, entries, folder = open_suite(name, folder)
    problems = []
    found = [read_benchmark(entry, f"[[benchmark]] {entry.get('name', number)}", folder, problems)
             for number, entry in enumerate(entries, 1)]
    if not problems:
        if unknown := [b.name for b in found if not b.file and b.name not in task_manager().all_tasks]:
            problems.append(f"lm-eval {lm_eval.__version__} knows no task {', '.join(unknown)}")
        found = [part for benchmark in found for part in expand(benchmark)]
        names = [benchmark.name for benchmark in found]
        problems += [f"{name} stands there twice" for name in sorted(set(names)) if names.count(name) > 1]
        problems += [f"{b.name} is part of {b.part_of}, which does not stand there" for b in found
                     if b.part_of and b.part_of not in names]
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return found


def read_benchmark(entry, title, folder, problems):
    """The Benchmark of an entry of a suite; what is wrong with it is added to `problems`, and then there is None."""
    fields = {entry.name: entry for entry in dataclasses.fields(Benchmark) if entry.name not in ("where", "options")}
    options = {key: value for key, value in entry.items() if key not in fields}
    values, wrong = {}, [f"{title} has no {key}" for key in ("name", "category") if key not in entry]
    overlay(values, {key: value for key, value in entry.items() if key in fields}, title, fields, wrong)
    wrong += [f"{title}: unknown key {key!r}" for key in options if key not in lm_eval_keys()]
    wrong += [f"{title}: num_fewshot is below 0"] if values.get("num_fewshot", 0) < 0 else []
    if "file" not in entry:
        if local := {"pairs", "by"} & entry.keys() | options.keys():
            wrong.append(f"{title}: {', '.join(sorted(local))} needs a file; tasks of lm-eval have their own")
    else:
        pairs = values.get("pairs")
        wrong += [f"{title} has no {key}" for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
                  if not pairs and key not in options]
        metrics = ("pct_stereotype",) if pairs else ("acc", "acc_norm", "acc_mutual_info")
        if "metric_list" not in options and (metric := values.get("metric", "acc")) not in metrics:
            wrong.append(f"{title} has the metric {metric!r}, expected {' or '.join(metrics)}")
        values["file"] = str(folder / str(values.get("file")))
        wrong += [f"{title}: {values['file']} does not exist"] if not Path(values["file"]).is_file() else []
    problems += wrong
    return None if wrong else Benchmark(**values, options=options)


@functools.cache
def task_manager():
    """lm-eval's index of its tasks, which takes seconds to make."""
    return TaskManager()


def lm_eval_keys():
    """The keys of lm-eval's task configuration."""
    return {entry.name for entry in dataclasses.fields(lm_eval.config.task.TaskConfig)}


def expand(benchmark):
    """A benchmark and, with `by`, those of its parts."""
    if not benchmark.by:
        return [benchmark]
    values = {item.get(benchmark.by) for item in read_json_lines(benchmark.file)[benchmark.num_fewshot:]}
    if None in values:
        raise UserError(f"{benchmark.file}: an item has no {benchmark.by!r}, by which {benchmark.name} is parted")
    return [benchmark] + [
        dataclasses.replace(benchmark, name=re.sub(r"\W+", "_", f"{benchmark.name}_{value}"), label=str(value), by=None,
                            part_of=benchmark.name, where={benchmark.by: value}) for value in sorted(values, key=str)]


def local_task(benchmark):
    """The lm-eval task of a benchmark with a local file. Raises UserError where an item has no right choice."""
    items = read_json_lines(benchmark.file)
    keys = dict.fromkeys(key for item in items for key in item)
    items = [{key: item.get(key) for key in keys} for item in items]
    examples, items = items[:benchmark.num_fewshot], items[benchmark.num_fewshot:]
    items = [item for item in items if all(item.get(key) == value for key, value in benchmark.where.items())]
    if not items:
        raise UserError(f"{benchmark.file} holds no item for {benchmark.name}"
                        + (f" beside its {len(examples)} examples" if examples else ""))
    config = {"task": benchmark.name, "test_split": "test", "output_type": "multiple_choice",
              "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
              "num_fewshot": benchmark.num_fewshot,
              "metric_list": [{"metric": name} for name in dict.fromkeys(("acc", "acc_norm", benchmark.metric))]}
    if examples:
        config["fewshot_config"] = {"sampler": "first_n", "samples": examples}
    if benchmark.pairs:
        config |= {"doc_to_text": "", "doc_to_target": 0, "target_delimiter": "",
                   "doc_to_choice": lambda item: [item["sent_more"], item["sent_less"]],
                   "process_results": lambda item, results: {"pct_stereotype": float(results[0][0] > results[1][0])},
                   "metric_list": [{"metric": "pct_stereotype", "aggregation": "mean", "higher_is_better": False}]}
    try:
        task = ConfigurableTask(config=config | benchmark.options)
        for item in [*examples, *items]:
            choices, right = task.doc_to_choice(item), task.doc_to_target(item)
            right = choices.index(right) if right in choices else right
            if not all(isinstance(choice, str) for choice in choices) or right not in range(len(choices)):
                raise ValueError(f"its choices are {choices!r} and the right one is {right!r}, expected texts and the "
                                 f"index of one, or one of them, in {json.dumps(item, ensure_ascii=False)[:200]}")
    except Exception as error:  # of templates, of fields that an item lacks
        raise UserError(f"{benchmark.file}: {benchmark.name} makes no task: {first_line(error)}") from error
    return task


# ----------------------------------------------------------------------------------------------- the model for lm-eval

class HarnessModel(TemplateLM):
    """Our model in lm-eval's terms: texts in, log-likelihoods and texts out, exactly as lm-eval's Hugging Face backend
    tokenizes, truncates and cuts them."""

    def __init__(self, scorer):
        super().__init__()
        self.scorer, self.text_tokenizer = scorer, scorer.tokenizer
        self.max_length = scorer.model.config.max_position_embeddings

    @property
    def eot_token_id(self):
        """The token that ends a text."""
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self):
        """The token that a text without a context follows."""
        return self.eot_token_id if self.text_tokenizer.bos_id is None else self.text_tokenizer.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Token ids of one text."""
        return self.encode([string], add_special_tokens)[0]

    def encode(self, texts, add_special_tokens=None):
        """Token ids of texts; bos comes first where the tokenizer adds one and the text does not begin with it."""
        ids = self.text_tokenizer.encode_batch(texts)
        if add_special_tokens is False or not self.text_tokenizer.adds_bos:
            return ids
        bos = self.text_tokenizer.bos_id
        written = self.text_tokenizer.token(bos)
        return [one if add_special_tokens is None and text.startswith(written) else [bos, *one]
                for text, one in zip(texts, ids)]

    def loglikelihood(self, requests, disable_tqdm=False):
        """As TemplateLM does it, with the texts tokenized in batches, and each context once."""
        pairs, encoded, split = [request.args for request in requests], {}, []
        for start in range(0, len(pairs), ENCODED_AT_ONCE):
            split += self._encode_pairs(pairs[start:start + ENCODED_AT_ONCE], encoded)
        return self._loglikelihood_tokens(split)

    def _encode_pairs(self, pairs, encoded):
        """(pair, its context's token ids, its continuation's) of pairs of texts; encoded: ids of contexts so far.

        The ids are arrays: the requests of a large suite hold hundreds of millions.
        """
        moved = []  # white space at the end of a context is tokenized with the continuation
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept):] + continuation))
        new = list(dict.fromkeys(context for context, _ in moved if context not in encoded))
        encoded.update(zip(new, (array("I", ids) for ids in self.encode(new))))
        whole = self.encode([context + continuation for context, continuation in moved])
        bare = iter(self.encode([text for context, text in moved if not context], False))
        for pair, (context, _), ids in zip(pairs, moved, whole):
            if context:
                yield pair, encoded[context], array("I", ids[len(encoded[context]):])
            else:
                ids = next(bare)
                ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
                yield pair, array("I", [self.prefix_token_id]), array("I", ids)

    def _loglikelihood_tokens(self, requests, **_):
        for (context, continuation), _, ids in requests:
            if not ids:
                raise UserError(f"an empty continuation has no log-likelihood; its context is {context[-60:]!r}")
            if len(ids) > self.max_length:
                raise UserError(f"a continuation of {len(ids):,} tokens is longer than the model's context of "
                                f"{self.max_length:,}: {' '.join(continuation.split())[:60]!r}…")
        return self.scorer.log_likelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of whole texts, in windows of the context's length that do not overlap."""
        windows, owners = [], []
        for index, ids in enumerate(self.encode([request.args[0] for request in requests])):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(index)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [value for value, _ in self.scorer.log_likelihoods(windows)])
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm=False):
        """Texts up to the first of each request's stop strings; those with like settings are decoded together."""
        texts, groups = [None] * len(requests), {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        for indices in groups.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], MAX_NEW_TOKENS)
            stops = handle_stop_sequences(options.pop("until", None), self.text_tokenizer.token(self.eot_token_id))
            decoding = harness_decoding(options)
            room = self.max_length - decoding.max_new_tokens
            if room < 1:
                raise UserError(f"{decoding.max_new_tokens:,} new tokens leave no room for a prompt in the model's "
                                f"context of {self.max_length:,}")
            prompts = [ids[-room:] or [self.prefix_token_id]
                       for ids in self.encode([requests[index].args[0] for index in indices])]
            for index, ids in zip(indices, self.scorer.generate(prompts, decoding, tuple(stops))):
                texts[index] = postprocess_generated_text(self.text_tokenizer.decode(ids), stops, None)
        return texts


def harness_decoding(options):
    """The decoding of lm-eval's generation settings; what is not implemented is refused by name."""
    options = {name: value for name, value in options.items() if value is not None}
    chosen = {"max_new_tokens": options.pop("max_gen_toks")}
    if not options.get("do_sample"):
        options.pop("temperature", None)
    names = {entry.name for entry in dataclasses.fields(Decoding)}
    if unknown := sorted(options.keys() - names):
        raise UserError(f"lm-eval asks for generation settings that are not implemented: {', '.join(unknown)}")
    decoding = Decoding(**chosen | options)
    if problems := decoding.problems():
        raise UserError("lm-eval's generation settings: " + "; ".join(problems))
    return decoding


# ------------------------------------------------------------------------------------------------------------- running

def run_suite(suite, scorer, limit=None, draws=()):
    """Runs the benchmarks of a suite in one call of lm-eval's `simple_evaluate`.

    draws: (directory, key) of draws of the weights from the posterior there. For each of them the multiple-choice
    benchmarks are run again, and accuracy and calibration by the probabilities averaged over the draws stand beside
    the other figures, as `acc,sampled` and so on. The model keeps the last draw.

    Returns its results, in its own layout with calibration added; {task: its items as lm-eval answered them}; and
    {name: reason} of benchmarks whose dataset could not be had. limit: items of each task. None in place of results
    where no benchmark could be run.
    """
    loaded, missing = {}, {}
    with quiet():
        for benchmark in suite:
            if benchmark.file:
                loaded[benchmark.name] = local_task(benchmark)
                continue
            try:
                loaded[benchmark.name] = task_manager().load(benchmark.name)
            except Exception as error:  # of datasets, of the Hub, of its HTTP library
                missing[benchmark.name] = first_line(error)
                if isinstance(error, ConnectionError):  # the others are in the cache or not: no more retries of 20 s
                    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
                continue
            for task in leaves(loaded[benchmark.name]):
                task.set_config(key="num_fewshot", value=benchmark.num_fewshot)
        if not loaded:
            return None, {}, missing
        check_tasks(suite, loaded)
        given = [built if isinstance(built, ConfigurableTask) else
                 next(iter((built["groups"] or built["tasks"]).values())) for built in loaded.values()]
        ask = functools.partial(lm_eval.simple_evaluate, HarnessModel(scorer), limit=limit, task_manager=task_manager())
        results = ask(tasks=given)
        samples = results.pop("samples")
        given = [task for task, built in zip(given, loaded.values())
                 if all(leaf.OUTPUT_TYPE == "multiple_choice" for leaf in leaves(built))]
        drawn = []
        for directory, key in draws if given else ():
            scorer.draw_weights(directory, key)
            drawn.append(ask(tasks=given)["samples"])
    for name, built in loaded.items():
        for title, tasks in ({task.task_name: [task] for task in leaves(built)} | {name: leaves(built)}).items():
            def scored(found, tasks=tasks):
                return [score for task in tasks for score in option_scores(task, found.get(task.task_name, ()))]
            if not (scores := scored(samples)):
                continue
            figures = {f"{key},none": value for key, value in calibration(*zip(*scores)).items()}
            if each := [answers for found in drawn if (answers := scored(found))]:
                right = [gold for _, gold in scores]
                mixed = [averaged([options for options, _ in answers]) for answers in zip(*each)]
                figures["acc,sampled"] = float(np.mean([log_p.argmax() == gold for log_p, gold in zip(mixed, right)]))
                figures |= {f"{key},sampled": value for key, value in calibration(mixed, right).items()}
            results["results"][title] |= figures
    return results, samples, missing


def check_tasks(suite, loaded):
    """Raises a UserError for what lm-eval would run, but not as the suite means it."""
    problems, seen = [], {}
    for benchmark in (benchmark for benchmark in suite if benchmark.name in loaded):
        tasks = leaves(loaded[benchmark.name])
        if len(tasks) > 1 and not loaded[benchmark.name]["groups"]:
            problems.append(f"{benchmark.name} is a tag without figures of its own: name its tasks, "
                            + ", ".join(task.task_name for task in tasks))
        for task in tasks:
            if (other := seen.setdefault(task.task_name, benchmark.name)) != benchmark.name:
                problems.append(f"{task.task_name} is in both {other} and {benchmark.name}: leave one out")
            if benchmark.metric.partition(",")[0] not in task.aggregation():
                problems.append(f"{task.task_name} has no metric {benchmark.metric!r}, expected one of "
                                + ", ".join(task.aggregation()))
    if problems:
        raise UserError("; ".join(problems))


def leaves(built):
    """The tasks of what lm-eval built: of one task, a group or a tag."""
    return [built] if isinstance(built, ConfigurableTask) else list(built["tasks"].values())


def option_scores(task, samples):
    """(log-likelihoods of the options, index of the right one) of a multiple-choice task's samples; none of others.

    A task that judges its options in a way of its own may have several right ones, but for those ranked by r@1.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results and "r@1" not in task.aggregation():
        return []
    found = []
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        if isinstance(gold, int) and 0 <= gold < len(choices):
            found.append(([score for score, _ in sample["filtered_resps"]][:len(choices)], gold))
    return found


@contextlib.contextmanager
def quiet():
    """lm-eval and datasets without their notes, and with progress bars as ours: on a terminal, while they run."""
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, desc="building requests", leave=False, disable=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            lm_eval.api.task.tqdm = bar


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


def figures(suite, results):
    """A dict for each benchmark that was run: its fields, `value`, `stderr`, `items`, calibration, and `sampled`:
    accuracy and calibration over draws of the weights, None where there were none."""
    def items(name):
        parts = results.get("group_subtasks", {}).get(name)
        return sum(map(items, parts)) if parts else results["n-samples"][name]["effective"]

    rows = []
    for benchmark in (benchmark for benchmark in suite if benchmark.name in results["results"]):
        found = results["results"][benchmark.name]
        value, error = figure(found, benchmark.metric)
        if value is None:
            names = [key.removesuffix(",none") for key, value in found.items() if isinstance(value, float)]
            raise UserError(f"{benchmark.name} has no metric {benchmark.metric!r}; it has {', '.join(names)}")
        rows.append({"name": benchmark.name, "label": benchmark.label or benchmark.name, "category": benchmark.category,
                     "part_of": benchmark.part_of, "metric": benchmark.metric, "num_fewshot": benchmark.num_fewshot,
                     "value": value, "stderr": None if math.isnan(error) else error,
                     "items": items(benchmark.name)} | {name: found.get(f"{name},none") for name in CALIBRATION}
                    | {"sampled": {name: found[f"{name},sampled"] for name in ("acc", *CALIBRATION)}
                       if "acc,sampled" in found else None})
    return rows
