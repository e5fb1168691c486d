"""Items of the sample suite."""
import random

import pytest

from common.files import read_json_lines
from corpus.sample_suite import build_suite, prose_words
from tests.conftest import ROOT

SUBJECTS = {"age", "autre", "disability", "gender", "nationality", "physical-appearance", "race-color", "religion",
            "sexual-orientation", "socioeconomic"}


def documents():
    """Texts of made-up words: some occur in all documents, some in only one."""
    rng = random.Random(0)
    common = ["of", "the", "which", "about"]
    for _ in range(6):
        own = ["".join(rng.choice("abcdefghij") for _ in range(7)) for _ in range(12)]
        yield "\n\n".join(" ".join(rng.choice(own + common) for _ in range(60)) for _ in range(4)) + \
            "\n\nx = 1; y[2] = f(x, *z) + 3 == 4 ** 5 and code(that) is not __prose__"


def test_prose_words_skip_code_and_short_lines():
    text = "These are eight words of quite plain prose.\n\nA title\n\nx = f(1) + y[2]; z == 3 and __code__ is 4 or 5"
    assert " ".join(prose_words(text)) == "These are eight words of quite plain prose."


def test_items_have_one_right_choice():
    texts = list(documents())
    streams = [" ".join(prose_words(text)) for text in texts]
    questions = [{"text": f"Passage {n} tells of it.", "question": f"What does passage {n} tell?"} for n in range(5)]
    suite = build_suite(texts, questions)
    assert suite == build_suite(texts, questions)
    assert set(suite) == {"terms", "continuation", "reading"}
    reading = [item for item in suite["reading"] if item["kind"] == "word in the passage"]
    for items in (suite["terms"], suite["continuation"], reading):
        assert len(items) > 20
        for item in items:
            home, = [stream for stream in streams if f"{item['context']} {item['choices'][item['label']]}" in stream]
            wrong = [choice for place, choice in enumerate(item["choices"]) if place != item["label"]]
            assert len(set(item["choices"])) == 4
            assert not any(choice in home for choice in wrong)  # they come from other documents
    assert all(item["choices"][item["label"]] in item["context"].split() for item in reading)
    assert not any(item["choices"][item["label"]] in item["context"].split() for item in suite["terms"])
    assert not {"which", "about"} & {choice for item in suite["terms"] for choice in item["choices"]}
    assert {item["label"] for item in suite["terms"]} == {0, 1, 2, 3}
    share = [item["kind"] for item in suite["reading"]].count("question it answers") / len(suite["reading"])
    first = [item["kind"] for item in suite["reading"][:len(suite["reading"]) // 2]]
    assert first.count("question it answers") == pytest.approx(share * len(first), abs=1)
    answered = [item for item in suite["reading"] if item["kind"] == "question it answers"]
    assert [item["choices"][item["label"]] for item in answered] == [item["question"] for item in questions]


def test_the_pairs_differ_in_few_words_and_cover_the_subjects():
    pairs = read_json_lines(ROOT / "data/sample/bias/pairs.jsonl")
    assert len(pairs) >= 60
    assert {pair["bias_type"] for pair in pairs} == SUBJECTS
    assert len({pair["sent_more"] for pair in pairs} | {pair["sent_less"] for pair in pairs}) == 2 * len(pairs)
    for pair in pairs:
        more, less = (set(pair[key].split()) for key in ("sent_more", "sent_less"))
        assert 0 < len(more - less) <= 3
        assert more & less
