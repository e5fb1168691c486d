"""Values as text."""
from common.formatting import format_names


def test_long_lists_of_names_are_cut():
    assert format_names([]) == ""
    assert format_names(["a", 2], 2) == "a, 2"
    assert format_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert format_names(list(range(25))).endswith("18, 19 and 5 more")
