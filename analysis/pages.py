"""Markdown as HTML."""
import html
import re

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;
text-align:left}img{max-width:100%}pre{overflow-x:auto;background:#f6f6f6;padding:1rem;font-size:.75rem}
figure{margin:1.5rem 0}figcaption{color:#555}"""


def to_html(text):
    """The Markdown that this module writes, as HTML: paragraphs, lists, tables, code."""
    parts = []
    for block in re.split(r"\n\n+", text.strip()):
        lines = block.splitlines()
        if block.startswith("```"):
            parts.append("<pre>" + html.escape("\n".join(lines[1:-1])) + "</pre>")
        elif block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            cells = lambda row, kind: "".join(f"<{kind}>{inline(cell)}</{kind}>" for cell in row)  # noqa: E731
            parts.append(f"<table><tr>{cells(head, 'th')}</tr>"
                         + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</table>")
        elif block.startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def inline(text):
    """Text with `code` as HTML."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
