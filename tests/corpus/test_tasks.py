"""Raw and preprocessed task files, the evaluation split, and samples for fine-tuning."""
import json

import datasets
import pytest

from common.files import UserError
from common.settings import read_config
from corpus.raw_tasks import build_raw_files, restore_brackets, split_of_file
from corpus.tasks import PROMPT, RESPONSE, SFTDataset, encode_prompts, read_task, split_indices
from model.tokenizer import Tokenizer
from tests.conftest import ROOT


@pytest.mark.parametrize(("count", "size"), [(125, 0.1), (4000, 0.1), (17, 0.33), (100, 7), (11, 1)])
def test_split_equals_datasets(count, size):
    expected = datasets.Dataset.from_list([{"i": i} for i in range(count)]).train_test_split(
        test_size=size, shuffle=True, seed=42)
    train, evaluation = split_indices(count, size)
    assert train == expected["train"]["i"]
    assert evaluation == expected["test"]["i"]


def test_brackets():
    assert restore_brackets(" a -LRB- b -RRB- -lsb-c-rsb- -x- \n") == "a ( b ) [c] -x-"


def test_prompt_names_may_contain_the_words_train_and_test(tmp_path):
    names = {"constrain_start+make_a_title.test.json": "test", "latest_news.train.json": "train",
             "generate_a_question_1.test_asks.json": "test", "train.json": "train", "notes.json": None}
    assert {name: split_of_file(tmp_path / name) for name in names} == names


@pytest.mark.parametrize(("task", "train", "test"), [("simp", 120, 40), ("empd", 120, 40), ("inqqg", 120, 40),
                                                     ("exp", 40, 20), ("hgen", 40, 20)])
def test_the_sample_is_large_enough_and_has_no_duplicates(task, train, test):
    spec = read_config("task", task)
    counts, seen = {}, []
    for path in sorted((ROOT / "data/sample" / spec["folder"]).glob("*.json")):
        raw = json.loads(path.read_text())
        counts["train" if "train" in path.name else "test"] = len(raw["src"])
        fields = {name for name in raw["src_info"][0] if name not in ("prompt", "prompt_name", "gold_label_prompt",
                                                                      "context_emotion")}
        seen += [info[name] for info in raw["src_info"] for name in fields]
        samples = [{key: value for key, value in info.items() if key not in ("prompt", "prompt_name")}
                   for info in raw["src_info"]]
        assert raw == build_raw_files(samples, spec)[raw["src_info"][0]["prompt_name"]]
    assert counts["train"] >= train
    assert counts["test"] >= test
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("content", "message"), [
    ([], "not a preprocessed task file"), ({"train": [], "eval": []}, "not a preprocessed task file"),
    ({"train": [{"input": "x"}], "eval": [], "test": []}, r"train\[0\] is not an object with the texts"),
    ({"train": [{"input": "x", "output": " "}], "eval": [], "test": []}, "holds no training samples")])
def test_bad_task_files(tmp_path, content, message):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_task(tmp_path / "t.json")


def test_sft_samples(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    items = [{"input": "Say it.", "output": "It."}, {"input": "x " * 3000, "output": "y " * 3000},
             {"input": f"A whole prompt\n\n{RESPONSE}", "output": "z"}]
    data = SFTDataset(items, tokenizer, 200, 50)
    tokens, first = data[0]
    prompt = tokenizer.encode(PROMPT.format(source="Say it."))
    assert tokens.tolist() == [1, *prompt, *tokenizer.encode("It."), 2]
    assert first == 1 + len(prompt)
    tokens, first = data[1]
    assert (len(tokens), first, tokens[-1]) == (250, 200, 2)
    assert tokenizer.decode(tokens[:first].tolist()).endswith("x \n\n" + RESPONSE)
    tokens, first = data[2]
    assert tokens[:first].tolist() == [1, *tokenizer.encode(items[2]["input"])]  # a whole prompt is not wrapped again
    assert SFTDataset(items, tokenizer, 200, 50, train_on_source=True)[0][1] == 1


def test_long_prompts_keep_the_response_marker(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    short, long = encode_prompts(tokenizer, ["a", "b " * 500], 120)
    assert len(short) < 120 == len(long)
    assert tokenizer.decode(long).endswith(RESPONSE)
