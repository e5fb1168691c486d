"""Folders of studies, pairs of models at several learning rates, with known effects."""
import json
import math

import numpy as np

from evaluation.conditions import short_digest
from evaluation.result_files import write_losses

RATES = "0.0003", "0.001", "0.003"
TASKS = "simp", "empd"
ITEMS = 24
TOKENS = np.arange(5, 5 + ITEMS)
START = {"llm": 5.0, "stack": 4.8}  # held-out loss of m0
FASTER = {"llm": 0.0, "stack": 0.15}  # how much lower the new-task loss is at the same rate
SLOPE = 0.5  # forgetting per nat of learning
SPREAD = 0.02  # standard deviation of a pair's effect


def losses_of(loss, key, kl=None):
    """The items of losses whose mean per token is `loss`; key: of the noise of the items."""
    rng = np.random.default_rng(list(key.encode()))
    noise = rng.normal(0, 0.05, ITEMS)
    noise -= (noise * TOKENS).sum() / TOKENS.sum()
    return {"nll": (TOKENS * (loss + noise)).tolist(), "tokens": TOKENS.tolist(), "bytes": (4 * TOKENS).tolist(),
            "kl": None if kl is None else (TOKENS * kl).tolist()}


def digest_of(stage):
    """A stand-in for the digest of a checkpoint."""
    return short_digest([str(stage)])


def learned_loss(model, number, place):
    """The loss on the new task of stage `number`, at the rate at `place`."""
    return 3.0 - 0.2 * place - 0.1 * number - FASTER.get(model, 0.0)


def rise(model, pair, number, x, effect):
    """The rise of the held-out loss: linear in learning, plus the effect of the model and the pair's deviation."""
    own = np.random.default_rng([pair, 7]).normal(0, SPREAD) if model.startswith("stack") else 0.0
    return number * (SLOPE * (3.2 - x) + (effect + own if model.startswith("stack") else 0.0))


def write_pretraining(folder, start, flops=0):
    """Writes the log of the pretraining of an m0: its held-out loss falls from 3 nats above `start`."""
    (folder / "m0/metrics.jsonl").write_text("".join(json.dumps(
        {"step": step, "eval_loss": start + 3 - step, "flops": flops + (1e13 - flops) * step / 3}) + "\n"
        for step in range(4)))


def write_stage_of(folder, number, settings, losses, right, seconds=60.0):
    """Writes a stage with losses {name: (items, kind)} and a benchmark of four options."""
    stage = folder / ("m0" if number == 0 else f"m{number}-{TASKS[number - 1]}")
    (stage / "eval").mkdir(parents=True)
    (stage / "run.json").write_text(json.dumps({
        "settings": {"task": TASKS[number - 1] if number else None, "seed": 42, "num_train_epochs": 1.0} | settings,
        "result": {"seconds": seconds}}))
    run = {"dtype": "fp32", "limit": None, "data_digest": "d", "tokenizer_digest": "t"}
    for name, (items, kind) in losses.items():
        write_losses(stage / "eval", name, kind, items, run | {"checkpoint_digest": digest_of(stage)})
    suite = [{"name": "quiz", "category": "DK", "metric": "acc", "label": None, "part_of": None}]
    value = float(np.mean(right))
    (stage / "eval/results_1.json").write_text(json.dumps({"run": {"suite": suite}, "results": {
        "quiz": {"acc,none": value, "acc_stderr,none": math.sqrt(value * (1 - value) / (len(right) - 1))}}}))
    (stage / "eval/samples_quiz_1.jsonl").write_text("\n".join(json.dumps(
        {"doc_id": item, "filter": "none", "acc": float(one), "nll": 1.5 - one, "bits_per_byte": 2.0 - one,
         "filtered_resps": [[-1.0, False]] * 4}) for item, one in enumerate(right)))


def write_study(folder, pairs=(1, 2, 3, 4), rates=RATES, models=("llm", "stack"), effect=-0.1):
    """Writes the runs of a study. The grown model forgets `effect` nats per token and stage more at equal learning."""
    for pair in pairs:
        for model in models:
            place = folder / f"pair-{pair}" / model if pairs != (0,) else folder / model
            base = model.removesuffix("-level")
            start = min(START.values()) if model.endswith("-level") else START.get(base, 5.2)
            right = np.arange(40) % 2
            tasks = {task: (losses_of(3.2, f"{task} {pair} {model}"), "task") for task in TASKS}
            write_stage_of(place, 0, {}, {"text": (losses_of(start, f"{pair} {model}"), "text")} | tasks, right)
            write_pretraining(place, start + 0.01 * pair, 0 if base in ("llm", "base") else 2.5e12)
            for step, rate in enumerate(rates):
                chain = place / f"rate-{rate}" if len(rates) > 1 else place
                for number in (1, 2):
                    x = learned_loss(base, number, step)
                    loss = start + rise(base, pair, number, x, effect)
                    of_tasks = {task: (losses_of(x if stage == number else 3.1 if stage > number else
                                                 learned_loss(base, stage, step) + 0.1, f"{task} {rate} {model} {pair}",
                                                 kl=0.02), "task") for stage, task in enumerate(TASKS, 1)}
                    write_stage_of(chain, number, {"learning_rate": float(rate)}, {
                        "text": (losses_of(loss, f"{pair} {model} {rate} {number}", kl=0.1 * number), "text"),
                        **of_tasks}, right * (np.arange(40) >= 4 * number))
    return folder
