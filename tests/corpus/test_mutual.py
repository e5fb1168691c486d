"""Items of MuTual."""
import json

import pytest

from common.files import UserError, read_json_lines
from corpus.mutual import write_mutual


def test_the_items_of_a_split_by_hand(tmp_path):
    """They are in the order of the files' numbers, written as before their tokenization, with the letter as a label."""
    (tmp_path / "dev").mkdir()
    for number, letter, article, option in (
            (10, "B", "f : i do n't know .", "m : wait , please ; it 's late !"),
            (2, "D", "m : did she say `` yes '' ? \n f : no .", "f : why ?")):
        (tmp_path / f"dev/dev_{number}.txt").write_text(json.dumps({
            "id": f"dev_{number}", "answers": letter, "article": article, "options": [option, "a .", "b", "c"]}))
    (tmp_path / "dev/._dev_2.txt").write_bytes(b"\0 of macOS")
    assert write_mutual(tmp_path / "dev", tmp_path / "mutual.jsonl") == 2
    assert write_mutual(tmp_path / "dev", tmp_path / "mutual.jsonl") == 2
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="notes exists already with another content: remove it, or choose another"):
        write_mutual(tmp_path / "dev", tmp_path / "notes")
    assert read_json_lines(tmp_path / "mutual.jsonl") == [
        {"id": "dev_2", "article": 'm: did she say "yes"?\nf: no.', "options": ["f: why?", "a.", "b", "c"], "label": 3},
        {"id": "dev_10", "article": "f: i don't know.", "options": ["m: wait, please; it's late!", "a.", "b", "c"],
         "label": 1}]
