"""Sentences of the report, and its HTML."""
import pytest

from analysis.estimates import Estimate
from analysis.method_tables import describe_gaps, format_gap
from analysis.pages import markdown_list, to_html
from analysis.record import Comparison
from analysis.tables import format_estimate, table_of_values, verdict
from common.formatting import markdown_table

ZERO = Estimate(0.0, 0.0)


def test_verdicts():
    def said(title, difference, **options):
        return verdict(title, ("a", "b"), Comparison({"a": difference, "b": ZERO}, difference), **options)
    assert said("FG", Estimate(-5, 1)).startswith("FG: in this pair a forgot less than b (-5.0 points, 95% interval")
    assert "a forgot more than b" in said("FG", Estimate(5, 1))
    assert "a forgot less than b" in said("Backward transfer", Estimate(5, 1), sign=-1)
    assert "cannot be told apart from noise" in said("FG", Estimate(5, 3))
    assert "without standard errors" in said("FG", Estimate(5))


@pytest.mark.parametrize(("value", "error", "printed", "said"), [
    (-5.0, 2.53, "-5.00 points, 95% interval [-9.96, -0.04]", "a forgot less than b"),
    (5.0, 2.55099, "+5.0000 points, 95% interval [+0.0001, +9.9999]", "a forgot more than b"),
    (-5.0, 2.57, "-5.0 points, 95% interval [-10.0, +0.0]", "cannot be told apart"),
    (-5.0, 5 / 1.96, "-5.0 points, 95% interval [-10.0, +0.0]", "cannot be told apart"),
    (0.004, 0.001, "+0.004 points, 95% interval [+0.002, +0.006]", "a forgot more than b")])
def test_intervals_agree_with_the_sentence(value, error, printed, said):
    """An interval without 0 has enough decimals to show it, in sentences and in tables."""
    difference = Estimate(value, error)
    sentence = verdict("FG", ("a", "b"), Comparison({"a": difference, "b": ZERO}, difference))
    assert printed in sentence
    assert said in sentence
    low, high = map(float, format_estimate(difference, 1).split("[")[1].strip("]").split(", "))
    assert (low <= 0 <= high) == ("cannot" in sentence)
    low, high = map(float, format_gap((difference, False)).split("[")[1].strip("]").split(", "))
    assert (low <= 0 <= high) == ("cannot" in sentence)


def test_less_bias_is_neither_better_nor_worse():
    gaps = {"FG Bias": (Estimate(-20, 1), False), "FG DK": (Estimate(5, 1), False),
            "average performance": (Estimate(5, 1), False)}
    assert describe_gaps(gaps, gaps) == (
        "better by average performance (+5.00 [+3.04, +6.96]); worse by FG DK (+5.00 [+3.04, +6.96]); "
        "different by FG Bias (-20.00 [-21.96, -18.04])")


def test_measures_that_say_nothing_are_named():
    noise, unknown = (Estimate(1, 1), False), (Estimate(1), False)
    assert describe_gaps({"x": noise, "y": unknown}, "xyz") == (
        "nothing can be told apart from noise; without standard errors to judge by: y; "
        "not compared, since they have no results in common: z")
    assert describe_gaps({"y": unknown}, "y") == "without standard errors to judge by: y"


def test_columns_without_values_are_left_out():
    assert table_of_values(["a", "b", "c"], [["x", "–", 1], ["y", "–", "–"]]) == markdown_table(
        ["a", "c"], [["x", 1], ["y", "–"]])
    assert table_of_values(["a", "b"], [["x", "–"]]) == ""


def test_html():
    text = "A `code` & more\n\n| a | b |\n|---|---|\n| 1 | <2> |\n\n- one\n- two\n\n```\nx | y\n```\n"
    assert to_html(text) == ("<p>A <code>code</code> &amp; more</p>\n<table><tr><th>a</th><th>b</th></tr><tr>"
                             '<td class="n">1</td>'
                             "<td>&lt;2&gt;</td></tr></table>\n<ul><li>one</li><li>two</li></ul>\n<pre>x | y</pre>")


def test_names_with_special_characters_stay_in_their_cells():
    names = ["a|b", "|", "c\\|", "d\\", "e\nf", "<g>"]
    shown = ["a|b", "|", "c\\|", "d\\", "e f", "&lt;g&gt;"]
    page = to_html(markdown_table(names, [names]))
    for tag in ("th", "td"):
        assert page.count(f"<{tag}>") == len(names)
        assert "".join(f"<{tag}>{name}</{tag}>" for name in shown) in page


def test_blank_lines_stay_in_their_blocks():
    assert to_html("```\na\n\n## b\n```\n\n" + markdown_list(["one\n\ntwo", "three"])) == (
        "<pre>a\n\n## b</pre>\n<ul><li>one two</li><li>three</li></ul>")
    assert to_html("# T\n\n```\na\n\n## b\n```\n") == "<h1>T</h1>\n<pre>a\n\n## b</pre>"
