"""MuTual (Cui et al., arXiv 2004.04494) as a local benchmark, from the text files that its authors published.

lm-eval 0.4.13 cannot load its dataset, which is a loading script, and scores its r@1 without the model's answers.
"""
import re
from pathlib import Path
from typing import Any

from common.files import UserError, json_lines, parsing, read_json, read_text
from common.writing import write_text

LETTERS = ["A", "B", "C", "D"]

# Replacements that undo the tokenization of the published texts, in order; those that lm-eval's task makes.
DETOKENIZED = ((" '", "'"), (" \n", "\n"), ("\n ", "\n"), (" n't", "n't"), ("`` ", '"'), ("''", '"'), (" :", ":"),
               (" ;", ";"), (" !", "!"), (" ?", "?"), (" ,", ","), (" .", "."))


def detokenize(text: str) -> str:
    """Undoes the tokenization of a published text."""
    for old, new in DETOKENIZED:
        text = text.replace(old, new)
    return text


def read_mutual(folder: str | Path) -> list[dict[str, Any]]:
    """Items {id, article, options, label} of a split: a folder of <split>_<number>.txt, each with one JSON object.

    Raises UserError if there are none, or if one is not an item with four options.
    """
    paths = sorted(Path(folder).glob("[!.]*_*.txt"), key=lambda path: (int((re.findall(r"\d+", path.stem) or [0])[-1]),
                                                                   path.name))
    if not paths:
        found = "holds no files such as dev_1.txt" if Path(folder).is_dir() else "is not a folder"
        raise UserError(f"{folder} {found}: expected a split of the published MuTual, such as "
                        "MuTual/data/mutual/dev")
    return [read_item(path) for path in paths]


def read_item(path: Path) -> dict[str, Any]:
    """The item in a published file."""
    raw = read_json(path, dict)
    with parsing(path, "an item of MuTual"):
        options, label = [detokenize(option) for option in raw["options"]], LETTERS.index(raw["answers"])
        if len(options) != len(LETTERS):
            raise ValueError(f"it has {len(options)} options, expected {len(LETTERS)}")
        return {"id": str(raw.get("id", path.stem)), "article": detokenize(raw["article"]), "options": options,
                "label": label}


def write_mutual(folder: str | Path, path: str | Path) -> int:
    """Writes the items of a split as JSON lines; returns their number. Raises UserError if the path exists with another
    content."""
    items = read_mutual(folder)
    text = json_lines(items)
    if Path(path).exists() and read_text(path) != text:
        raise UserError(f"{path} exists already with another content: remove it, or choose another --output_path")
    write_text(path, text)
    return len(items)
