"""Folders of evaluated runs, written without training or evaluating anything."""
import itertools
import json
import random

import pytest

from common.configs import read_config

SUITE = [("terms", "DK", "acc", None, None), ("continuation", "Rs", "acc", None, None),
         ("passages", "Rs", "acc", "passages", None), ("pairs", "Bias", "pct_stereotype", None, None),
         ("pairs_age", "Bias", "pct_stereotype", "age", "pairs"),
         ("pairs_race", "Bias", "pct_stereotype", "race", "pairs")]
# accuracy of terms, continuation, passages and share of stereotypes at m0, m1, m2
VALUES = {"llm": [(0.5, 0.4, 0.30, 0.6), (0.4, 0.3, 0.30, 0.6), (0.3, 0.2, 0.15, 0.54)],
          "stack": [(0.5, 0.4, 0.30, 0.6), (0.5, 0.4, 0.24, 0.6), (0.5, 0.4, 0.18, 0.6)]}
TASKS = {"llm": [(10, 5), (40, 6), (30, 50)], "stack": [(10, 5), (40, 7), (38, 50)]}


def write_stage(folder, number, values, tasks, seed=42):
    """Writes the stage m<number> into a folder and returns its directory."""
    name = "m0" if number == 0 else f"m{number}-{('simp', 'empd')[number - 1]}"
    stage = folder / name
    (stage / "eval").mkdir(parents=True)
    suite = [dict(zip(("name", "category", "metric", "label", "part_of"), entry)) for entry in SUITE]
    results = {}
    for (title, _, metric, _, _), value in zip(SUITE, [*values, 0.5, 0.5]):
        results[title] = {f"{metric},none": value, f"{metric}_stderr,none": 0.02}
        if metric == "acc":
            results[title] |= {"ece,none": 0.1 + number / 10, "nll,none": 1.0, "brier,none": 0.7}
    (stage / "eval/results_1.json").write_text(json.dumps({"results": results, "run": {"suite": suite}}))
    for task, metric, value in (("simp", "sari", tasks[0]), ("empd", "rougeL", tasks[1])):
        (stage / f"eval/metrics-{task}.json").write_text(json.dumps(
            {"task": task, "metrics": {metric: {"mean": value, "low": value - 1.96, "high": value + 1.96}}}))
    (stage / "run.json").write_text(json.dumps({
        "settings": {"task": ("simp", "empd")[number - 1] if number else None, "seed": seed, "num_train_epochs": 2.0,
                     "out": f"runs/{name}"}, "commit": "c0ffee", "data_digest": "d" * 64, "parent_digest": "a" * 64}))
    lines = [{"step": 0, "eval_loss": 5.0}, *({"step": step, "loss": 5 - step / 5, "tokens": 100 * step}
                                               for step in range(1, 9)), {"step": 8, "eval_loss": 3.5}]
    (stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return stage


@pytest.fixture
def runs(tmp_path):
    """A folder of both models at all stages."""
    folder = tmp_path / "runs"
    for model in VALUES:
        for number in range(3):
            write_stage(folder / model, number, VALUES[model][number], TASKS[model][number])
    return folder


@pytest.fixture
def seed_runs(runs):
    """The same, and another seed of llm, which forgets as much as stack."""
    for number in (1, 2):
        write_stage(runs / "llm/seed-43", number, VALUES["stack"][number], TASKS["llm"][number], seed=43)
    return runs


@pytest.fixture
def method_runs(tmp_path):
    """A folder of llm with three methods: finetune; ewc, which forgets nothing; and vcl, which has the values of
    finetune and posterior samples."""
    folder = tmp_path / "runs"
    write_stage(folder / "llm", 0, VALUES["llm"][0], TASKS["llm"][0])
    for method, model in (("finetune", "llm"), ("ewc", "stack"), ("vcl-tau=0.5", "llm")):
        for number in (1, 2):
            stage = write_stage(folder / "llm" / method, number, VALUES[model][number], TASKS[model][number])
            run = json.loads((stage / "run.json").read_text())
            run["settings"]["method"] = method.partition("-")[0]
            run["result"] = {"seconds": 60.0, "seconds_after": 30.0 * (method == "ewc")}
            (stage / "run.json").write_text(json.dumps(run))
            path = stage / "eval/results_1.json"
            found = json.loads(path.read_text())
            found["results"]["pairs_age"] |= {"ece,none": 0.9, "nll,none": 9.0}  # a part, which does not count
            if method.startswith("vcl"):
                found["results"]["terms"] |= {"acc,sampled": 0.5, "ece,sampled": 0.04, "nll,sampled": 0.9}
            path.write_text(json.dumps(found))
    return folder


@pytest.fixture
def mixed_runs(method_runs):
    """The same, and stages outside a method's folder: one with a method in its run.json, one without."""
    for number in (1, 2):
        write_stage(method_runs / "llm", number, VALUES["stack"][number], TASKS["stack"][number])
    run = json.loads((method_runs / "llm/m1-simp/run.json").read_text())
    run["settings"]["method"] = "rehearsal"
    (method_runs / "llm/m1-simp/run.json").write_text(json.dumps(run))
    return method_runs


# Twelve names that no suite describes, next to the twelve benchmarks and ten parts of configs/eval/paper.toml.
OTHER = ["arc_challenge", "arc_easy", "bigbench_logical_deduction_five_objects_multiple_choice",
         "blimp_wh_questions_subject_gap_long_distance", "crows_pairs_french", "lambada_openai",
         "leaderboard_musr_murder_mysteries", "mmlu_pro_computer_science", "sciq", "truthfulqa_mc1", "truthfulqa_mc2",
         "wsc273"]
ORDER = ["simp", "empd", "inqqg", "exp", "hgen"]
STAGES = ["m0", *(f"m{number}-{task}" for number, task in enumerate(ORDER, 1))]


def paper_results(model, number, rename=str):
    """The results entries and the suite of a stage, by category: as many as the published results have.

    rename: a function of each benchmark's name.
    """
    suite = read_config("eval", "paper")["benchmark"] + [{"name": name, "category": "other"} for name in OTHER]
    results = {}
    for entry in suite:
        noise, metric = random.Random(f"{entry['name']} {model} {number}"), entry.get("metric", "acc")
        start = random.Random(entry["name"]).uniform(0.3, 0.8)
        values = {f"{metric},none": start * (1 - 0.04 * number) + noise.uniform(-0.03, 0.03),
                  f"{metric}_stderr,none": noise.uniform(0.002, 0.02)}
        if metric == "acc":
            values |= {"ece,none": 0.05 + 0.03 * number + noise.uniform(0, 0.05), "nll,none": 1.0}
        results.setdefault(entry["category"], {})[rename(entry["name"])] = values
    described = [entry | {key: rename(entry[key]) for key in ("name", "label", "part_of") if key in entry}
                 for entry in suite if entry["category"] != "other"]
    return results, described


def write_published_results(folder):
    """Writes results in the layout of the published ones: without calibration, and one results file is a folder."""
    for model, (number, name) in itertools.product(("llm", "stack"), enumerate(STAGES)):
        for category, results in paper_results(model, number)[0].items():
            path = folder / model / name / f"results_{category}.json"
            if category == "Rs":
                path = path / "llm-stacking__LLM_7B/results_2025-05-10T10-00-00.123456.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"results": {name: {key: value for key, value in values.items()
                                                           if key not in ("ece,none", "nll,none")}
                                                    for name, values in results.items()}}))
    return folder


def write_paper_runs(folder, models, stages=6, seeds=(42,), rename=str, categories=()):
    """Writes runs of the real size: the five tasks in the published order and the benchmarks of paper_results.

    categories: only these; empty: all.
    """
    for model, seed, number in itertools.product(models, seeds, range(stages)):
        stage = folder / model / f"seed-{seed}" / STAGES[number]
        (stage / "eval").mkdir(parents=True)
        noise = random.Random(f"{model} {seed} {number}")
        by_category, suite = paper_results(f"{model} {seed}", number, rename)
        results = {name: values for category, found in by_category.items() if not categories or category in categories
                   for name, values in found.items()}
        (stage / "eval/results_1.json").write_text(json.dumps({"results": results, "run": {"suite": suite}}))
        for task in ORDER:
            value = noise.uniform(5, 60)
            (stage / f"eval/metrics-{task}.json").write_text(json.dumps({"task": task, "metrics": {
                name: {"mean": value, "low": value - 1, "high": value + 1} for name in ("sari", "rougeL")}}))
        (stage / "run.json").write_text(json.dumps({"settings": {
            "task": ORDER[number - 1] if number else None, "seed": seed, "num_train_epochs": 3.0}}))
        lines = [{"step": step, "tokens": 1e6 * step, "loss": 9 / (step + 1) ** 0.2 + noise.uniform(-0.2, 0.2)}
                 for step in range(1, 101)]
        lines += [{"step": step, "eval_loss": 9 / (step + 1) ** noise.uniform(0.18, 0.22)}
                  for step in range(0, 101, 20)]
        (stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
