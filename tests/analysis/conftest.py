"""Folders of evaluated runs, written without training or evaluating anything."""
import json

import pytest

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
            found["results"]["pairs_age"] |= {"ece,none": 9.0, "nll,none": 9.0}  # a part, which does not count
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
