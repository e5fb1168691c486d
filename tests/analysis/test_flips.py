"""Flips of items, compared with items that are known or guessed by simulation; metrics that are noise."""
import numpy as np
import pytest

from analysis.estimates import Estimate
from analysis.flips import count_flips, noise_flags
from analysis.stages import BENCHMARKS, Choices, Stage


def choices(right, options=4):
    return Choices(np.asarray(right, float), None, None, 1 / options)


def test_flips_by_hand():
    found = count_flips(choices([1, 1, 1, 1, 0, 0, 0, 0]), choices([1, 0, 0, 0, 1, 0, 0, 0]), "items")
    assert (found.items, found.forgotten, found.learned) == (8, 3, 1)
    assert found.p == pytest.approx(2 * 5 / 16)  # 3 and 1: 2 · (1 + 4) / 2⁴
    assert found.net.value == pytest.approx((3 - 1) / 8 / 0.75)


@pytest.mark.parametrize("same_guess", [0.0, 0.8])
@pytest.mark.parametrize("options", [2, 4])
def test_guessing_is_taken_off(options, same_guess):
    """Of 20,000 items 30% stay known, 15% are forgotten, 5% learned; the others are guessed both times. Of the guesses
    a share is the same at both stages."""
    rng = np.random.default_rng(options)
    kind = rng.choice(4, 20_000, p=[0.3, 0.15, 0.05, 0.5])
    first, again = rng.random((2, len(kind))) < 1 / options
    second = np.where(rng.random(len(kind)) < same_guess, first, again)
    start, end = (np.where(np.isin(kind, known), True, guess) for known, guess in (([0, 1], first), ([0, 2], second)))
    net = count_flips(choices(start, options), choices(end, options), "items").net
    assert abs(net.value - 0.10) < 3 * net.error
    assert net.error < 0.01
    assert start.mean() - end.mean() < 0.08  # with guessing it looks like less


def test_models_are_compared_item_by_item():
    rng = np.random.default_rng(0)
    start = rng.random(400) < 0.6
    ends = [start & (rng.random(400) < 0.7) for _ in range(2)]
    one, two = (count_flips(choices(start), choices(end), "items").net for end in ends)
    values = [(start * 1.0 - end) / 0.75 for end in ends]
    assert (one - two).error == pytest.approx(np.std(values[0] - values[1], ddof=1) / 20)


def stages_of(name, values, error=0.02, with_choices=None, metric="acc"):
    """Stages of two models with a benchmark."""
    return [Stage(f"m{place % 2}", 0, place // 2, f"m{place // 2}", benchmarks={name: Estimate(value, error)},
                  conditions={(BENCHMARKS, name): {"metric": metric}},
                  choices={name: with_choices} if with_choices else {}) for place, value in enumerate(values)]


@pytest.mark.parametrize(("stages", "said"), [
    (stages_of("mine", [0.4, 0.4, 0.4, 0.4]), "it is 0.4 for all models and stages"),
    (stages_of("piqa", [0.51, 0.48, 0.545, 0.5]),
     "it is not above chance (0.5) for any model and stage; the values are 0.48"),
    (stages_of("mine", [0.3, 0.34, 0.36, 0.33], with_choices=choices([1, 0], 3)), "is not above chance (0.3333)"),
    (stages_of("piqa", [0.40, 0.48, 0.60, 0.5]),
     "it cannot show forgetting of m0, m1, whose start is not above chance"),
    (stages_of("mine", [0.49, 0.48, 0.51, 0.5], metric="pct_stereotype"), "it does not differ from chance (0.5)"),
    (stages_of("crows_pairs_english", [0.40, 0.48, 0.60, 0.5], metric="pct_stereotype"),
     "it cannot show forgetting of m1, whose start does not differ from chance (0.5)"),
    (stages_of("mmlu_pro", [0.20, 0.18]), ""), (stages_of("mmlu", [0.20, 0.18]), "is not above chance (0.25)"),
    (stages_of("mine", [0.3, 0.34, 0.36, 0.33]), ""),  # the number of options is unknown
    (stages_of("piqa", [0.51, 0.48, 0.60, 0.5]), "of m0, m1, whose start is not above chance (0.5)"),
    (stages_of("piqa", [0.60, 0.48, 0.60, 0.5]), "it cannot show forgetting of m1, whose start"),
    (stages_of("mine", [0.4, 0.4, 0.4]), ""),  # equal by coincidence
    ([*stages_of("mine", [0.5, 0.5], with_choices=choices([1, 0], 3)),
      *stages_of("mine", [0.5, 0.5], with_choices=choices([0, 1], 3))], ""),  # the answers differ
    (stages_of("piqa", [0.60, 0.61, 0.51, 0.5]), ""),
    (stages_of("piqa", [0.51, 0.48, 0.50, 0.5], error=np.nan), "")])
def test_metrics_whose_forgetting_is_noise(stages, said):
    found = noise_flags(stages)
    assert list(found) == list(stages[0].benchmarks) * bool(said)
    assert all(said in sentence and sentence.startswith(f"{name}: ") for name, sentence in found.items())
