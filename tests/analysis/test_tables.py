"""Sentences of the report, and its HTML."""
from analysis.method_tables import describe_gaps
from analysis.pages import to_html
from analysis.statistics import Estimate
from analysis.tables import verdict

ZERO = Estimate(0.0, 0.0)


def test_verdicts():
    def said(title, difference, **options):
        return verdict(title, ("a", "b"), {"a": difference, "b": ZERO}, **options)
    assert said("FG", Estimate(-5, 1)).startswith("FG: a forgets less than b (-5.0 points, 95% interval")
    assert "a forgets more than b" in said("FG", Estimate(5, 1))
    assert "a forgets less than b" in said("Backward transfer", Estimate(5, 1), sign=-1)
    assert "cannot be told apart from noise" in said("FG", Estimate(5, 3))
    assert "without standard errors" in said("FG", Estimate(5))


def test_less_bias_is_neither_better_nor_worse():
    gaps = {"FG Bias": Estimate(-20, 1), "FG DK": Estimate(5, 1), "average performance": Estimate(5, 1)}
    assert describe_gaps(gaps) == (
        "better by average performance (+5.00 [+3.04, +6.96]); worse by FG DK (+5.00 [+3.04, +6.96]); "
        "different by FG Bias (-20.00 [-21.96, -18.04])")


def test_html():
    text = "A `code` & more\n\n| a | b |\n|---|---|\n| 1 | <2> |\n\n- one\n- two\n\n```\nx | y\n```\n"
    assert to_html(text) == ("<p>A <code>code</code> &amp; more</p>\n<table><tr><th>a</th><th>b</th></tr><tr><td>1</td>"
                             "<td>&lt;2&gt;</td></tr></table>\n<ul><li>one</li><li>two</li></ul>\n<pre>x | y</pre>")
