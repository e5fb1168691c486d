"""The pages of a report: Markdown, and HTML with the figures in it."""
import base64
import html
import re
from collections.abc import Iterable
from pathlib import Path

from common.writing import write_text

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem;display:block;overflow-x:auto;
font-variant-numeric:tabular-nums}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left}
.n{white-space:nowrap}figure{margin:1.5rem 0;overflow-x:auto}img{max-width:100%;min-width:40rem}
figcaption{color:#555}pre{overflow-x:auto;background:#f6f6f6;padding:1rem;font-size:.75rem}"""


def write_pages(folder: Path, page: str) -> None:
    """Writes a page in Markdown, which begins with its title, as report.md and report.html.

    The images are files in the folder; report.html includes them. Images that only an earlier page in the folder has
    are deleted, as PNG and as SVG, if that page has the same title up to its first colon.
    """
    path = folder / "report.md"
    earlier = path.read_text(errors="replace") if path.exists() else ""
    if earlier.partition(":")[0] == page.partition(":")[0]:
        for name in images_of(earlier) - images_of(page):
            for suffix in (".png", ".svg"):
                (folder / name).with_suffix(suffix).unlink(missing_ok=True)
    title = html.escape(page.partition("\n")[0].removeprefix("# "))
    write_text(path, page)
    write_text(folder / "report.html", f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
               '<meta name="viewport" content="width=device-width,initial-scale=1">'
               f"<style>{STYLE}</style><body>{to_html(page, folder)}</body></html>\n")


def images_of(page: str) -> set[str]:
    """The file names of the images of a page, which lie in its folder."""
    return set(re.findall(r"^!\[.*\]\(([\w-]+\.png)\)$", page, re.MULTILINE))


def markdown_image(name: str, caption: str) -> str:
    """A figure of a page, <name>.png, with its caption."""
    return f"![{name}]({name}.png)\n*{caption}*\n\n"


def to_html(text: str, folder: Path = Path()) -> str:
    """The Markdown of a report as HTML: headings, images from a folder, paragraphs, lists, tables, code blocks."""
    parts = []
    for block in re.findall(r"\n*```\n.*?\n```$|(?:(?!\n\n).)+", text.strip(), re.DOTALL | re.MULTILINE):
        block = block.strip("\n")
        lines = block.split("\n")
        if heading := re.fullmatch("(#+) (.*)", block):
            level = len(heading[1])
            parts.append(f"<h{level}>{html.escape(heading[2])}</h{level}>")
        elif image := re.fullmatch(r"!\[(.*)\]\((.*)\)\n\*(.*)\*", block):
            name, caption = html.escape(image[1]), html.escape(image[3])
            data = base64.b64encode((folder / image[2]).read_bytes()).decode()
            parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
                         f"<figcaption>{caption}</figcaption></figure>")
        elif block.startswith("```"):
            parts.append("<pre>" + html.escape("\n".join(lines[1:-1])) + "</pre>")
        elif block.startswith("|"):
            head, _, *rows = lines
            parts.append(f"<table>{table_row(head, 'th')}" + "".join(table_row(row, "td") for row in rows) + "</table>")
        elif block.startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def markdown_list(sentences: Iterable[str]) -> str:
    """Sentences as a list in Markdown."""
    return "".join(f"- {' '.join(sentence.split())}\n" for sentence in sentences)


def table_row(line: str, tag: str) -> str:
    """A row of a Markdown table as HTML. tag: "th" or "td"."""
    cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line[1:-1])]
    number = ' class="n"'  # its interval stays on the same line
    return "<tr>" + "".join(f"<{tag}{number * bool(re.match('[-+−]?[0-9]', cell))}>{inline(cell)}</{tag}>"
                            for cell in cells) + "</tr>"


def inline(text: str) -> str:
    """Text with `code` as HTML."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
