"""Tasks and sizes of one's own: what their files lack is said."""
import re

import pytest

from common import configs
from common.configs import known, model_shape, read_config
from common.files import UserError

TASK = 'folder = "mine"\nsource = "text"\n'
DECODING = "[decoding]\nmax_new_tokens = 5\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for kind in ("task", "size"):
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("text", "said"), [
    (TASK, "decoding is missing"), ('folder = "mine"\n' + DECODING, "source is missing"),
    (TASK + 'measur = "sari"\n' + DECODING, "unknown key 'measur'"),
    (TASK.replace('"mine"', "5") + DECODING, "folder is 5, expected str"),
    (TASK + "decoding = 4\n", "decoding is 4, expected a table")])
def test_a_file_that_describes_no_task(folder, text, said):
    (folder / "task/mine.toml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.toml: {re.escape(said)}$"):
        read_config("task", "mine")
    (folder / "task/mine.toml").write_text(TASK + DECODING)
    assert read_config("task", "mine")["decoding"] == {"max_new_tokens": 5}


def test_the_name_of_a_task_is_part_of_the_names_of_folders(folder):
    for name in ("my-task", "my.task"):
        (folder / f"task/{name}.toml").write_text(TASK + DECODING)
    assert read_config("task", "my-task")["folder"] == "mine"
    with pytest.raises(UserError, match="the name of a task, which folders have, consists of letters, digits, _ and -"):
        read_config("task", "my.task")


def test_a_size_without_all_of_a_shape(folder):
    (folder / "size/mini.toml").write_text("[model]\nhidden_size = 8\nnum_hidden_layers = 1\nintermediate_size = 8\n")
    with pytest.raises(UserError, match=r"mini\.toml: \[model\] lacks vocab_size, num_attention_heads"):
        model_shape("mini")


def test_the_tasks_of_this_project():
    assert len([read_config("task", name) for name in known("task")]) == 5
