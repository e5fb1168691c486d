"""Stand-ins of datasets on the Hub, of tasks and benchmarks: their columns, configurations and splits, with made-up
items."""
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
from pyarrow import Table, parquet

from corpus.documents import CONVERTED
from tests.hub import HubStandIn

WORDS = ["stone", "river", "lamp", "cloud", "garden", "horse", "paper", "winter", "bridge", "candle", "market"]
SUBJECTS = ["age", "autre", "disability", "gender", "nationality", "physical-appearance", "race-color", "religion",
            "sexual-orientation", "socioeconomic"]  # of CrowS-Pairs
Rows = list[dict[str, Any]]


def add_benchmarks(hub: HubStandIn) -> None:
    """Adds the datasets of the suite `paper` to a stand-in of the Hub."""
    for name, splits in of_one_configuration().items():
        add_dataset(hub, name, {"default": splits})
    add_dataset(hub, "aps/super_glue", {"boolq": {split: [
        {"question": phrase(rng, 5), "passage": phrase(rng, 20), "idx": n, "label": n % 2}
        for n, rng in items(f"boolq {split}", 9)] for split in ("train", "validation")}})
    add_dataset(hub, "allenai/winogrande", {"winogrande_xl": {split: [
        {"sentence": f"{phrase(rng, 4)} as _ was {phrase(rng, 2)}", "option1": "the lamp", "option2": "a horse",
         "answer": str(1 + n % 2)} for n, rng in items(f"grande {split}", 9)] for split in ("train", "validation")}})
    add_dataset(hub, "EleutherAI/race", {"high": {"test": [
        {"article": phrase(rng, 40), "problems": str([
            {"question": f"{phrase(rng, 5)}  _  ." if number else f"{phrase(rng, 5)}?", "answer": "ABCD"[n % 4],
             "options": [phrase(rng, 3) for _ in range(4)]} for number in range(3)])}
        for n, rng in items("race", 6)]}})
    add_dataset(hub, "jannalu/crows_pairs_multilingual", {"english": {"test": [
        {"sent_more": phrase(rng, 8), "sent_less": phrase(rng, 8), "stereo_antistereo": "stereo",
         "bias_type": SUBJECTS[n % 10]} for n, rng in items("crows", 30)]}})
    tasks = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    add_dataset(hub, "cais/mmlu", {subject: {split: [
        {"question": phrase(rng, 8), "subject": subject, "choices": [phrase(rng, 2) for _ in range(4)], "answer": n % 4}
        for n, rng in items(f"{subject} {split}", count)] for split, count in (("test", 3), ("dev", 5))}  # those read
        for subject in sorted(path.stem.removeprefix("mmlu_") for path in tasks.glob("mmlu_*.yaml"))})


def of_one_configuration() -> dict[str, dict[str, Rows]]:
    """{name of a dataset: {split: rows}} of the datasets without named configurations."""
    return {
        "baber/piqa": {split: [
            {"goal": phrase(rng, 6), "sol1": phrase(rng, 8), "sol2": phrase(rng, 8), "label": n % 2}
            for n, rng in items(f"piqa {split}", 9)] for split in ("train", "validation")},
        "Rowan/hellaswag": {split: [
            {"ind": n, "activity_label": "Cleaning", "ctx_a": f"{phrase(rng, 6)} [title] {phrase(rng, 2)}.",
             "ctx_b": phrase(rng, 3), "ctx": "", "endings": [phrase(rng, 6) for _ in range(4)], "source_id": "",
             "split": split, "split_type": "indomain", "label": str(n % 4)}
            for n, rng in items(f"hellaswag {split}", 9)] for split in ("train", "validation")},
        "regisss/math_qa": {split: [
            {"Problem": phrase(rng, 12), "Rationale": "", "options": " , ".join(
                f"{letter} ) {rng.randint(1, 999)}" for letter in "abcde"), "correct": "abcde"[n % 5],
             "annotated_formula": "", "linear_formula": "", "category": "general"}
            for n, rng in items(f"mathqa {split}", 9)] for split in ("train", "validation", "test")}}


def add_tasks(hub: HubStandIn) -> None:
    """Adds the datasets of the five tasks: two of them have a loading script on the main branch, and parquet files only
    on the branch to which the Hub converts datasets."""
    add_dataset(hub, "GEM/wiki_auto_asset_turk", {"default": {split: [
        {"gem_id": str(n), "source": f"{phrase(rng, 12)}.", "target": f"{phrase(rng, 5)}.", "references": [
            f"{phrase(rng, 5)}." for _ in range(references)]} for n, rng in items(f"simp {split}", 60)]
        for split, references in (("train", 1), ("test_asset", 10))}})
    add_dataset(hub, "Estwld/empathetic_dialogues_llm", {"default": {split: [
        {"conv_id": str(n), "situation": phrase(rng, 8), "emotion": "proud", "conversations": [
            {"role": role, "content": phrase(rng, 6)} for role in ("user", "assistant", "user", "assistant")]}
        for n, rng in items(f"empd {split}", 20)] for split in ("train", "valid", "test")}})
    add_dataset(hub, "sentence-transformers/eli5", {"pair": {"train": [
        {"question": f"{'Why' if n % 3 else 'Does'} {phrase(rng, 5)}?", "answer": f"{phrase(rng, 15)}."}
        for n, rng in items("inqqg", 90)]}})
    add_converted(hub, "esnli/esnli", "plain_text", {split: [
        {"premise": phrase(rng, 8), "hypothesis": phrase(rng, 5), "label": n % 3, "explanation_1": phrase(rng, 7),
         "explanation_2": "", "explanation_3": ""} for n, rng in items(f"exp {split}", 40)]
        for split in ("train", "validation", "test")})
    add_converted(hub, "Harvard/gigaword", "default", {split: [
        {"document": phrase(rng, 20).lower(), "summary": phrase(rng, 5).lower()}
        for n, rng in items(f"hgen {split}", 40)] for split in ("train", "validation", "test")})


def add_converted(hub: HubStandIn, name: str, config: str, splits: dict[str, Rows]) -> None:
    """Adds a dataset whose main branch holds a loading script, and whose conversion holds parquet files."""
    hub.add("datasets", name, {"README.md": b"# Dataset\n", f"{name.split('/')[1]}.py": b"import datasets\n"})
    hub.add("datasets", name, {f"{config}/{split}/0000.parquet": parquet_of(rows) for split, rows in splits.items()},
            branch=CONVERTED)


def parquet_of(rows: Rows) -> bytes:
    """A parquet file."""
    buffer = io.BytesIO()
    parquet.write_table(Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def add_dataset(hub: HubStandIn, name: str, configs: dict[str, dict[str, Rows]]) -> None:
    """Adds a dataset with its configurations, {split: rows} each, as parquet files."""
    files = {}
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = f"{config}/{split}-00000-of-00001.parquet"
            files[path] = parquet_of(rows)
            lines += [f"  - split: {split}", f"    path: {path}"]
    hub.add("datasets", name, {"README.md": "\n".join([*lines, "---", ""]).encode(), **files})


def items(key: str, count: int) -> Iterator[tuple[int, random.Random]]:
    """Numbers of items, each with a generator of its own."""
    return ((number, random.Random(f"{key} {number}")) for number in range(count))


def phrase(rng: random.Random, words: int) -> str:
    """Some words, the first with a capital letter."""
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize()
