"""The items of the sample suite, made from held-out text and from data/sample, so that no download is needed.

In each item the right choice stands among three that are right ones of other items, from other documents. What is
frequent in itself is so right as often as wrong: a model that does not use the context gets a quarter.
"""
import re
from collections import Counter

import numpy as np

CONTEXT, CONTINUATION = 40, 8  # words of a text and of what may follow it

SENTENCE = 14  # words before a term

PASSAGE = 50  # words of a passage, with the word that is asked for in it

PER_DOCUMENT = 80  # items of one kind from one document at most, since some are very long

WORD = re.compile(r"[A-Za-z][a-z]+[.,;:]?|a|I")

TERM = re.compile(r"[a-z]{5,}")


def build_suite(documents, questions):
    """Items {"terms", "continuation", "reading"} of {context, choices, label}; those of "reading" have a `kind` too.

    documents: held-out texts. questions: {text, question} of passages and the question that each answers.
    """
    streams = [words for words in map(prose, documents) if len(words) > PASSAGE + SENTENCE]
    common = {word for word, count in Counter(word for words in streams for word in set(words)).items()
              if count > len(streams) / 2}  # function words are no terms
    answered = [(number, f"{item['text']}\nQuestion:", item["question"]) for number, item in enumerate(questions)]
    reading = {"word in the passage": passages(streams, common), "question it answers": answered}
    return {"terms": choose(terms(streams, common)), "continuation": choose(continuations(streams)),
            "reading": [item | {"kind": kind} for kind, found in reading.items() for item in choose(found)]}


def prose(text):
    """The words of those paragraphs of a text that are prose: code, tables and lists of arguments are left out."""
    paragraphs = [paragraph.split() for paragraph in re.split(r"\n\s*\n", text)]
    return [word for words in paragraphs if len(words) >= 8
            and sum(bool(WORD.fullmatch(word)) for word in words) >= 0.8 * len(words) for word in words]


def continuations(streams):
    """(document, text, the words that follow it)."""
    size = CONTEXT + CONTINUATION
    return [(number, " ".join(words[start:start + CONTEXT]), " ".join(words[start + CONTEXT:start + size]))
            for number, words in enumerate(streams) for start in spread(range(0, len(words) - size + 1, size))]


def terms(streams, common):
    """(document, the words before a term, the term)."""
    found = []
    for number, words in enumerate(streams):
        places = [place for place in range(SENTENCE, len(words)) if TERM.fullmatch(words[place])
                  and words[place] not in common and words[place] not in words[place - SENTENCE:place]]
        found += [(number, " ".join(words[place - SENTENCE:place]), words[place])
                  for place in spread(thin(places, SENTENCE))]
    return found


def passages(streams, common):
    """(document, a passage and the beginning of what follows, a term that comes next and stands in the passage)."""
    found = []
    for number, words in enumerate(streams):
        places = [place for place in range(PASSAGE, len(words)) if TERM.fullmatch(words[place])
                  and words[place] not in common and words[place] in words[place - PASSAGE:place - 3]]
        found += [(number, " ".join(words[place - PASSAGE:place]), words[place])
                  for place in spread(thin(places, SENTENCE))]
    return found


def thin(places, distance):
    """Some of the places, at least so far apart."""
    kept = []
    for place in places:
        if not kept or place - kept[-1] >= distance:
            kept.append(place)
    return kept


def spread(places):
    """At most PER_DOCUMENT of the places, evenly taken."""
    step = max(1, -(-len(places) // PER_DOCUMENT))
    return places[::step]


def choose(found, seed=0):
    """Items from (document, context, right choice): the three others are drawn from other documents' right choices."""
    rng, items = np.random.default_rng(seed), []
    for number, context, right in found:
        choices = [right]
        for place in rng.permutation(len(found)):
            other, text, wrong = found[place]
            if other != number and wrong not in choices and not set(wrong.split()) <= set(context.split()):
                choices.append(wrong)
            if len(choices) == 4:
                break
        if len(choices) == 4:
            order = rng.permutation(4)
            items.append({"context": context, "choices": [choices[i] for i in order], "label": int(np.argmin(order))})
    return items
