"""Documents from text files and from Python sources."""
import pytest

from common.files import UserError
from corpus.documents import read_docstrings, read_text_file


def test_bad_lines_of_a_jsonl_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_text_file(path, "text")) == ["a", "", "b"]
    for bad in ('{"text": null}', '{"txt": "a"}', "[1]", "no"):
        path.write_text('{"text": "a"}\n' + bad + "\n")
        with pytest.raises(UserError, match=r"t\.jsonl, line 2: expected a JSON object with a text as 'text'"):
            list(read_text_file(path, "text"))


def test_a_long_text_becomes_many_documents(tmp_path):
    lines = [f"Line {n} of a long book.\n" for n in range(3000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    pieces = list(read_text_file(tmp_path / "book.txt", "text"))
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and len(piece) < 11_000 for piece in pieces)
    (tmp_path / "book.txt").write_bytes(b"good\n\xff")
    with pytest.raises(UserError, match=r"book\.txt is not UTF-8"):
        list(read_text_file(tmp_path / "book.txt", "text"))


def test_docstrings_keep_the_source_order(tmp_path):
    (tmp_path / "m.py").write_text('"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
                                   'async def g():\n    """Four."""\ndef h(): pass\n')
    assert read_docstrings(tmp_path / "m.py") == ["One.", "Two.", "Three.", "Four."]
    (tmp_path / "m.py").write_text("def (")
    assert read_docstrings(tmp_path / "m.py") == []
