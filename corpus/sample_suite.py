"""The sample suite: multiple-choice items made from held-out documentation and data/sample, without any download.

The three wrong choices of an item are right choices of items from other documents. The frequency of a choice therefore
does not tell whether it is right, and a model that ignores the context scores 1/4.
"""
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.configs import ROOT, read_config
from common.files import json_lines, read_json_lines
from common.writing import new_directory, write_text
from corpus.documents import is_held_out, read_documents
from corpus.raw_tasks import read_raw_split

CONTEXT_WORDS, CONTINUATION_WORDS = 40, 8
SENTENCE_WORDS = 14  # context of a term
PASSAGE_WORDS = 50  # context of a term that occurs in it
MAX_PER_DOCUMENT = 80  # items of one kind from one document; some documents are very long

WORD = re.compile(r"[A-Za-z][a-z]+[.,;:]?|a|I")
TERM = re.compile(r"[a-z]{5,}")

Question = tuple[int, str, str]  # (document number, context, right answer)


def suite_exists(directory: str | Path) -> bool:
    """Whether a directory holds the files of the suite."""
    files = [benchmark["file"] for benchmark in read_config("eval", "sample")["benchmark"]]
    return all((Path(directory) / file).is_file() for file in files)


def write_suite(directory: str | Path) -> dict[str, list[dict]]:
    """Writes the JSONL files that configs/eval/sample.toml names; returns the items by file name."""
    spec = read_config("task", "inqqg")
    with new_directory(directory) as folder:
        passages = read_raw_split(ROOT / "data/sample" / spec["folder"], "test", spec["source"])
        suite = build_suite(filter(is_held_out, read_documents("docs")), [item["src_info"] for item in passages])
        suite["pairs"] = read_json_lines(ROOT / "data/sample/bias/pairs.jsonl")
        for name, items in suite.items():
            write_text(folder / f"{name}.jsonl", json_lines(items))
    return suite


def build_suite(documents: Iterable[str], questions: list[dict]) -> dict[str, list[dict]]:
    """Items {"terms", "continuation", "reading"} of {context, choices, label}; "reading" items also have a `kind`.

    `questions` are dictionaries {text, question}: a passage and the question that it answers.
    """
    texts = [words for words in map(prose_words, documents) if len(words) > PASSAGE_WORDS + SENTENCE_WORDS]
    counts = Counter(word for words in texts for word in set(words))
    common = {word for word, count in counts.items() if count > len(texts) / 2}  # function words, not terms
    answered = [(number, f"{item['text']}\nQuestion:", item["question"]) for number, item in enumerate(questions)]
    reading = {"word in the passage": term_questions(texts, common, PASSAGE_WORDS, repeated=True),
               "question it answers": answered}
    return {"terms": add_choices(term_questions(texts, common, SENTENCE_WORDS, repeated=False)),
            "continuation": add_choices(continuation_questions(texts)),
            "reading": mixed({kind: [item | {"kind": kind} for item in add_choices(asked)]
                              for kind, asked in reading.items()})}


def mixed(items: dict[str, list[dict]]) -> list[dict]:
    """The items of several kinds, evenly mixed: any number of the first ones has each kind in its proportion."""
    places = [(number / len(found), item) for found in items.values() for number, item in enumerate(found, 1)]
    return [item for _, item in sorted(places, key=lambda place: place[0])]


def prose_words(text: str) -> list[str]:
    """The words of a text's prose paragraphs; code, tables and argument lists are skipped."""
    paragraphs = [paragraph.split() for paragraph in re.split(r"\n\s*\n", text)]
    return [word for words in paragraphs if len(words) >= 8
            and sum(bool(WORD.fullmatch(word)) for word in words) >= 0.8 * len(words) for word in words]


def continuation_questions(texts: list[list[str]]) -> list[Question]:
    """Questions for the words that follow a context."""
    size = CONTEXT_WORDS + CONTINUATION_WORDS
    return [(number, " ".join(words[start:start + CONTEXT_WORDS]), " ".join(words[start + CONTEXT_WORDS:start + size]))
            for number, words in enumerate(texts) for start in subsample(range(0, len(words) - size + 1, size))]


def term_questions(texts: list[list[str]], common: set[str], num_words: int, repeated: bool) -> list[Question]:
    """Questions for the term after `num_words` words, which occurs among them (but the last three) if `repeated`."""
    questions = []
    for number, words in enumerate(texts):
        positions: list[int] = []
        for end in range(num_words, len(words)):
            earlier = words[end - num_words:end - 3 if repeated else end]
            if TERM.fullmatch(words[end]) and words[end] not in common and (words[end] in earlier) == repeated \
                    and (not positions or end - positions[-1] >= SENTENCE_WORDS):
                positions.append(end)
        questions += [(number, " ".join(words[end - num_words:end]), words[end]) for end in subsample(positions)]
    return questions


def subsample(positions: Sequence[int]) -> Sequence[int]:
    """At most MAX_PER_DOCUMENT of the positions, evenly spaced."""
    return positions[::max(1, -(-len(positions) // MAX_PER_DOCUMENT))]


def add_choices(questions: list[Question]) -> list[dict]:
    """Items of four choices, the wrong ones drawn from right answers in other documents."""
    rng, items = np.random.default_rng(0), []
    for number, context, right in questions:
        choices = [right]
        for index in rng.permutation(len(questions)):
            other, _, wrong = questions[index]
            if other != number and wrong not in choices and not set(wrong.split()) <= set(context.split()):
                choices.append(wrong)
            if len(choices) == 4:
                break
        if len(choices) == 4:
            order = rng.permutation(4)
            items.append({"context": context, "choices": [choices[i] for i in order], "label": int(np.argmin(order))})
    return items
