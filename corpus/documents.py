"""Documents for pretraining: installed documentation, text files or a Hub dataset; and the choice of held-out ones."""
import ast
import glob
import importlib.util
import os
import signal
import sysconfig
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.files import UserError, first_line, parse_json, walk
from common.formatting import format_names

HELD_OUT_PER_MILLE = 10  # of a thousand documents
CONVERTED = "refs/convert/parquet"  # the branch of a dataset on the Hub to which its files are converted
TEXT_SUFFIXES = ".txt", ".jsonl"
DOCUMENT_CHARACTERS = 10_000  # a .txt file is cut into documents of about this length

# Well-documented packages that requirements.txt installs, some as dependencies. The list is fixed, so that other
# installed packages do not change the text. Other versions of these packages do change it; the data digest in run.json
# shows the difference.
DOCUMENTED_PACKAGES = ("datasets", "deepspeed", "huggingface_hub", "networkx", "nltk", "numpy", "pandas", "scipy",
                       "sklearn", "sympy", "torch")


def read_documents(source: str, text_column: str = "text", dataset_config: str | None = None,
                   max_documents: int | None = None) -> Iterator[str]:
    """Yields the non-empty ones of the first `max_documents` documents of a source.

    `source` is "docs" (documentation of the installed packages), a .txt or .jsonl file, a folder of such files, or the
    name of a Hub dataset. `text_column` is the field of a .jsonl line, or the dataset column, that holds the text.
    """
    path = Path(source)
    documents: Iterable[str]
    if source == "docs":
        documents = read_installed_docs()
    elif os.path.lexists(path):
        files = find_text_files(path) if path.is_dir() else [path] if path.suffix in TEXT_SUFFIXES else []
        if not files:
            raise UserError(f"{source}: expected a .txt or .jsonl file, or a folder of them")
        documents = chain.from_iterable(read_text_file(file, text_column) for file in files)
    elif path.suffix in TEXT_SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise UserError(f"{source} does not exist")
    else:
        rows = load_hub_dataset(source, "train", [text_column], dataset_config, streaming=True)
        documents = (text_field(row, text_column, f"{source}, row {number}") for number, row in enumerate(rows, 1))
    return (text for text in islice(documents, max_documents) if text.strip())


def find_text_files(folder: Path) -> list[Path]:
    """The .txt and .jsonl files in a folder and its subfolders, in the order of their paths; no hidden ones."""
    return sorted((root / name for root, _, names in walk(folder) for name in names
                   if Path(name).suffix in TEXT_SUFFIXES), key=str)


def read_text_file(path: Path, column: str) -> Iterator[str]:
    """Yields the documents of a file: pieces of a .txt file, cut at line ends or within long lines, or one field of
    each .jsonl line."""
    if not path.is_file():
        raise UserError(f"{path} is {'a link to something that is ' if path.is_symlink() else ''}not a file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.suffix == ".txt":
                while text := file.read(DOCUMENT_CHARACTERS) + file.readline(DOCUMENT_CHARACTERS):
                    yield text
            else:
                for number, line in enumerate(file, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        yield text_field(parse_json(line, where), column, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def text_field(value: Any, name: str, where: str) -> str:
    """A field of an object. Raises UserError, which begins with `where`, unless the field is a text."""
    if isinstance(value, dict) and isinstance(text := value.get(name), str):
        return text
    if isinstance(value, dict) and value and name not in value:
        found = f"the fields {format_names(list(value))}: data_prep.py text has --text_column for another name"
    else:
        found = f"{value!r:.80}: correct or remove it"
    raise UserError(f"{where}: expected an object with a text as {name!r}, found {found}")


@cache
def read_installed_docs() -> list[str]:
    """Documentation of the standard library and of DOCUMENTED_PACKAGES: English text that needs no download.

    Each module is one document with its docstrings in source order; a repeated docstring is kept once. The language
    reference (pydoc_data.topics) comes first.
    """
    from pydoc_data.topics import topics
    roots = [Path(sysconfig.get_path("stdlib")), *map(package_folder, DOCUMENTED_PACKAGES)]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))
             if not {"tests", "test", "site-packages"} & set(file.relative_to(root).parts)]
    seen: set[str] = set()
    documents = [topics[name] for name in sorted(topics)]
    with ProcessPoolExecutor(initializer=follow_parent) as pool:
        try:
            modules = pool.map(read_docstrings, files, chunksize=64)
            for docstrings in tqdm(modules, "reading documentation", len(files), unit="file", disable=None):
                new = [text for text in dict.fromkeys(docstrings) if text not in seen]
                seen.update(new)
                documents.append("\n\n".join(new))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return documents


def package_folder(name: str) -> Path:
    """The folder of an installed package. Raises UserError if it is not installed."""
    if (spec := importlib.util.find_spec(name)) is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name}, whose documentation is a part of the default text, is not installed: "
                        "install requirements.txt, or give a text of your own")
    return Path(spec.submodule_search_locations[0])


def follow_parent() -> None:
    """Makes a worker leave Ctrl-C, which reaches all processes, to its parent, and end when the parent has ended."""
    parent = os.getppid()  # of a forked worker the pool's process, else a server, which ends with it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def read_docstrings(path: Path) -> list[str]:
    """The docstrings of a Python source file in source order; an empty list if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in third-party code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError, MemoryError):
        return []
    nodes = [node for node in ast.walk(tree)
             if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = (text for node in nodes if (text := ast.get_docstring(node)))
    return [text.encode("utf-8", "replace").decode() for text in texts]  # an escape may stand for half a surrogate pair


def load_hub_dataset(name: str, split: str, columns: list[str], config: str | None = None,
                     revision: str | None = None, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Hub dataset, or of a local directory of parquet files, with the given columns.

    `config` is the dataset's configuration (such as "en"), `revision` a branch or commit. A dataset whose main branch
    holds a loading script, which datasets no longer runs, is read from the Hub's automatic conversion to parquet.
    """
    from datasets import load_dataset
    data_dir, path = None, os.path.realpath(name)
    if os.path.isdir(path) and glob.has_magic(path):  # datasets would take the path for a pattern
        data_dir = os.path.relpath(glob.escape(path), path)
    try:
        try:
            rows = load_dataset(name, config, data_dir, split=split, revision=revision, streaming=streaming)
        except RuntimeError as error:
            if revision is not None or "scripts are no longer supported" not in str(error):
                raise
            files = {split: f"{config or only_config(name)}/{split}/*.parquet"}
            rows = load_dataset(name, data_files=files, split=split, revision=CONVERTED, streaming=streaming)
        yield from tqdm(rows.select_columns(columns), split, disable=True if streaming else None)
    except UserError:
        raise
    except Exception as error:  # datasets and huggingface_hub raise many types: network, name, split, columns
        raise UserError(f"cannot read the split {split!r} of {name}: {first_line(error)}. Without a network, put raw "
                        "files into a folder and name it, or use the sample") from None


def only_config(name: str) -> str:
    """The configuration of a dataset of which the Hub has a conversion, with a folder for each of them. Raises
    UserError if there are several."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder
    entries = HfApi().list_repo_tree(name, revision=CONVERTED, repo_type="dataset")
    configs = [entry.path for entry in entries if isinstance(entry, RepoFolder)]
    if not configs:
        raise UserError(f"the Hub's conversion of {name} is empty")
    if len(configs) > 1:
        raise UserError(f"{name} has the configurations {', '.join(configs)}: choose one with --dataset_config, or for "
                        "a task with config in the table [hub] of its file in configs/task")
    return configs[0]


def is_held_out(text: str) -> bool:
    """Whether a document is held out; depends only on the text."""
    return zlib.crc32(text.encode("utf-8", "replace")) % 1000 < HELD_OUT_PER_MILLE
