"""The conditions of results: what a value depends on besides the model. Only equal conditions are compared."""
import json
from typing import Any

from common.files import json_digest
from common.provenance import DEFAULT_TEMPLATE
from evaluation.result_files import ResultsFile, tasks_of

Conditions = dict[str, Any]  # by name. What a results file does not tell is left out; it matches any value

# lm-eval's names of dtypes, and this program's.
DTYPES = {"torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float16": "fp16"}

ENTRY_KEYS = "pairs", "where", "options"  # of a suite's entry with a local file: how items become requests

# Settings of a task's evaluation that its metrics depend on.
TASK_SETTINGS = ("dtype", "limit", "data_digest", "max_source_length", "source")


def benchmark_conditions(file: ResultsFile, name: str, metric: str) -> Conditions:
    """The conditions of a task or group in a results file of this program or of lm-eval: metric and version, items,
    shots, prompts, dtype and limit."""
    content, config, tasks = file.content, file.content.get("config") or {}, tasks_of(file.groups, name)
    dtype: Any = config.get("model_dtype")
    entry = next((entry for entry in file.suite if entry["name"] == name), {})
    settings = content.get("configs", {}).get(name, {})
    sizes = [content.get("n-samples", {}).get(task, {}).get("effective") for task in tasks]
    hashes = [content.get("task_hashes", {}).get(task) for task in tasks]
    versions = {str(version) for task in tasks if (version := content.get("versions", {}).get(task)) is not None}
    shots = (entry.get("num_fewshot"), content.get("n-shot", {}).get(name), settings.get("num_fewshot"),
             config.get("num_fewshot"))
    found = {"metric": metric, "version": ", ".join(sorted(versions)) or None, "file": entry.get("file"),
             "items": None if None in sizes else sum(sizes),
             "shots": next((value for value in shots if value is not None), None),
             "items and prompts": None if None in hashes else short_digest(hashes),
             "task": json.dumps([entry.get(key) for key in ENTRY_KEYS]) if entry.get("file") else None,
             "generation": settings.get("generation_kwargs"),
             "dtype": file.run.get("dtype", DTYPES.get(dtype, dtype))}
    if found["shots"]:
        found["few-shot seed"] = config.get("fewshot_seed")
    known = {key: value for key, value in found.items() if value is not None}
    known |= {key: content[key] for key in ("chat_template_sha", "system_instruction_sha") if key in content}
    if file.run or "chat_template_sha" in content:
        known["template"] = "chat" if file.run.get("template") or content.get("chat_template_sha") else "none"
    limits = [source["limit"] for source in (file.run, config) if "limit" in source]
    return known | ({"limit": limits[0]} if limits else {})


def task_conditions(results: dict[str, Any], metric: str) -> Conditions:
    """The conditions of a task's metric in a metrics-<task>.json: version, data, items, prompts and their template,
    decoding, dtype and limit."""
    run = results["run"]
    found = {"metric": metric} | {name: run[name] for name in TASK_SETTINGS if name in run}
    found["template"] = run.get("template") or DEFAULT_TEMPLATE
    found |= {"version": run["sari"]} if metric == "sari" and "sari" in run else {}
    found |= {name: results[key] for name, key in (("items", "samples"), ("prompts", "prompts")) if key in results}
    if metric == "bertscore":
        found |= {name: run[name] for name in ("bertscore_model", "bertscore_layer") if name in run}
    decoding = run.get("decoding", {})
    return found | {f"decoding {name}": value for name, value in decoding.items()
                    if name != "seed" or decoding.get("do_sample")}


def short_digest(texts: list[str]) -> str:
    """Twelve hexadecimal digits that stand for some texts."""
    return json_digest(texts)[:12]


def unlike(one: Conditions, two: Conditions) -> list[str]:
    """The names of the conditions that are known on both sides and differ.

    A limit matters only if the number of items is unknown: it may be larger than the benchmark.
    """
    known = one.keys() & two.keys()
    return sorted(name for name in known if one[name] != two[name] and not (name == "limit" and "items" in known))


def shown(value: Any) -> str:
    """The value of a condition as text."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({short_digest([text])})"
