"""Tasks and sizes of one's own: what their files lack is said."""
import re

import pytest

from common import configs
from common.configs import known, read_config
from common.files import UserError
from model.config import size_config
from pipeline.chain import ORDER

TASK = 'folder = "mine"\nsource = "text"\n'
DECODING = "[decoding]\nmax_new_tokens = 5\n"
HUB = f"""{TASK}target = 'a'
{DECODING}
[hub]
dataset = 'me/mine'
splits = {{train = 'train'}}
columns = {{a = 'b'}}
[prompts]
one = ['Read [a]']
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for kind in ("task", "size"):
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("text", "said"), [
    (TASK, "decoding is missing"), ('folder = "mine"\n' + DECODING, "source is missing"),
    (TASK + 'measur = "sari"\n' + DECODING, "unknown key 'measur'"),
    (TASK + 'measure = "accuracy"\n' + DECODING, "measure is 'accuracy', expected one of bleu, rouge1, rouge2, rougeL, "
     "sari, sari_hf, bertscore"), (TASK + 'measure = "sari"\n' + DECODING, "measure is sari, which takes sari = true"),
    (TASK.replace('"mine"', "5") + DECODING, "folder is 5, expected str"),
    (TASK + DECODING + "[hub]\ndataset = 'me/mine'\ncolumns = {}\n", "[hub] lacks splits"),
    (HUB.replace("train =", "test ="), "splits in [hub] lacks train"),
    (HUB.replace("columns = {a = 'b'}", "columns = 'b'"), "columns in [hub] is 'b', expected a table"),
    (HUB.replace("a = 'b'", "c = 'b'"), "target is 'a', expected a field in columns of [hub]"),
    (HUB.partition("one")[0], "[prompts] has no prompt"),
    (HUB.replace("['Read [a]']", "'Read [a]'"), "one in [prompts] is 'Read [a]', expected a list of texts"),
    (HUB.replace("['Read [a]']", "[]"), "one in [prompts] is [], expected a list of texts"),
    (HUB.replace("['Read [a]']", "[1]"), "one in [prompts] is [1], expected a list of texts"),
    (TASK + "decoding = 4\n", "decoding is 4, expected a table")])
def test_a_file_that_describes_no_task(folder, text, said):
    (folder / "task/mine.toml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.toml: {re.escape(said)}$"):
        read_config("task", "mine")
    turns = HUB.replace("target = 'a'", "target = 'output_text'").replace("columns", "dialogue = 'turns'\ncolumns")
    labels = HUB.replace("target = 'a'", "target = 'kind'").replace("columns", "labels = {field = 'kind'}\ncolumns")
    for valid in (TASK + DECODING, HUB, turns, labels):
        (folder / "task/mine.toml").write_text(valid)
        assert read_config("task", "mine")["decoding"] == {"max_new_tokens": 5}


def test_the_name_of_a_task_is_part_of_the_names_of_folders(folder):
    for name in ("my-task", "my.task", "text"):
        (folder / f"task/{name}.toml").write_text(TASK + DECODING)
    assert read_config("task", "my-task")["folder"] == "mine"
    with pytest.raises(UserError, match="the name of a task, which folders have, consists of letters, digits, _ and -"):
        read_config("task", "my.task")
    with pytest.raises(UserError, match="the name text is that of the held-out text in results: rename the file"):
        read_config("task", "text")


@pytest.mark.parametrize(("text", "said"), [
    ("[model]\nhidden_size = 8\nnum_hidden_layers = 1\nintermediate_size = 8\n",
     "[model] lacks vocab_size, lacks num_attention_heads"),
    ("[model]\nvocab_size = 8\nhidden_size = 8\nintermediate_size = 8\nnum_hidden_layers = 1\n"
     "num_attention_heads = 1\nnum_key_values_heads = 1\n", "[model] has an unknown field 'num_key_values_heads'"),
    ("[finetune]\nzero = 1\n", "gives no model shape"),
    ("[pretrainig]\nzero = 1\n", "unknown table [pretrainig], expected hub, model, growth, pretraining, base,")])
def test_a_file_that_describes_no_size(folder, text, said):
    (folder / "size/mini.toml").write_text(text)
    with pytest.raises(UserError, match=rf"mini\.toml:? {re.escape(said)}"):
        size_config("mini")


def test_the_tasks_of_this_project():
    assert {*ORDER} <= {name for name in known("task") if read_config("task", name)["folder"]}
