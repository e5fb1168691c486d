"""Values as text."""
from collections.abc import Iterable, Sequence


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_names(names: Sequence[object], limit: int = 20) -> str:
    """The first `limit` names and the number of the others: "a, b and 3 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table. A "|" in a cell is escaped, and a line break becomes a space."""
    lines = [table_line(header), "|" + "---|" * len(header), *map(table_line, rows)]
    return "\n".join(lines) + "\n"


def table_line(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(" ".join(str(cell).split("\n")).replace("|", "\\|") for cell in cells) + " |"
