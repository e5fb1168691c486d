"""Values as text."""
from collections.abc import Iterable, Sequence


def format_loss(loss: float | None) -> str:
    """A loss with four decimals; None, the loss of an empty split, as "none"."""
    return "none" if loss is None else f"{loss:.4f}"


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"
