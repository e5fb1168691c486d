"""Documents of the installed packages, of text files or of a dataset on the Hub, and which of them are held out."""
import ast
import glob
import json
import sysconfig
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from common.files import UserError

VALIDATION_PER_MILLE = 10  # of the documents of a text, held out

PIECE_CHARACTERS = 10_000  # of a .txt file make a document

# Packages that come with the requirements and are documented at length; a fixed list, so that other packages do not
# change the text. Other versions of these do: the digests in run.json tell texts apart.
DOCUMENTED = ("datasets", "deepspeed", "huggingface_hub", "networkx", "nltk", "numpy", "pandas", "scipy", "sklearn",
              "sympy", "torch")


def read_documents(source, text_column="text", dataset_config=None, max_documents=None):
    """Yields the documents of a source: "docs" (the installed packages' documentation), a .txt or .jsonl file, a folder
    of them, or the name of a Hub dataset. text_column: the field of a line, or the column, that holds the text."""
    path = Path(source)
    if source == "docs":
        documents = installed_documentation()
    elif path.exists():
        files = sorted(glob.glob(f"{path}/**/*", recursive=True)) if path.is_dir() else [path]
        files = [file for file in map(Path, files) if file.suffix in (".txt", ".jsonl")]
        if not files:
            raise UserError(f"{source}: expected a .txt or .jsonl file, or a folder of them")
        documents = chain.from_iterable(read_text_file(file, text_column) for file in files)
    else:
        rows = load_hub_dataset(source, "train", [text_column], dataset_config, streaming=True)
        documents = (row[text_column] for row in rows)
    for text in islice(documents, max_documents):
        if text.strip():
            yield text


def read_text_file(path, column):
    """Yields the documents of a file: pieces of a .txt, cut at ends of lines; a field of every line of a .jsonl."""
    with open(path, encoding="utf-8") as file:
        try:
            while path.suffix == ".txt" and (lines := file.readlines(PIECE_CHARACTERS)):
                yield "".join(lines)
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)[column] if line.strip() else ""
                except (json.JSONDecodeError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(f"{path}, line {number}: expected a JSON object with a text as {column!r}")
                yield text
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason})") from None


@cache
def installed_documentation():
    """The documentation in this Python and in DOCUMENTED, a document a module: every docstring once, in the order of
    the source, and the language reference in pydoc_data.topics. English text that is on every machine."""
    from pydoc_data.topics import topics
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    roots = [library, *(packages / name for name in DOCUMENTED)]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))
             if not {"tests", "test", "site-packages"} & set(file.relative_to(root).parts)]
    seen, documents = set(), [topics[name] for name in sorted(topics)]
    with ProcessPoolExecutor() as pool:
        found = pool.map(docstrings, files, chunksize=64)
        for texts in tqdm(found, "reading documentation", len(files), unit="file", disable=None):
            new = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(new)
            documents.append("\n\n".join(new))
    return documents


def docstrings(path):
    """The docstrings of a Python source file, top to bottom; none where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's backslashes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError, MemoryError):
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def load_hub_dataset(name, split, columns, config=None, revision=None, streaming=False):
    """The rows of a dataset on the Hub, or of a local directory of parquet files, with some of its columns.

    config is the dataset's configuration (such as "en"), revision a branch such as "refs/convert/parquet".
    """
    from datasets import load_dataset
    try:
        rows = load_dataset(str(name), config, split=split, revision=revision, streaming=streaming)
        return rows.select_columns(columns)
    except Exception as error:  # datasets and huggingface_hub raise many kinds: network, name, split, columns
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the split {split!r} of {name}: {reason}. Without a network, put raw files into a "
                        "folder and name it, or use the sample") from None


def held_out(text):
    """Whether a document belongs to the validation split."""
    return zlib.crc32(text.encode("utf-8", "replace")) % 1000 < VALIDATION_PER_MILLE
