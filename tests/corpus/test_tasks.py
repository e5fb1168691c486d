"""Raw and preprocessed task files, the evaluation split, and samples for fine-tuning."""
import json

import datasets
import pytest

from common.files import UserError
from common.settings import read_config
from corpus import raw_tasks
from corpus.raw_tasks import build_raw_files, read_hub_task, read_raw_file, restore_brackets, split_of_file
from corpus.tasks import PROMPT, RESPONSE, SFTDataset, encode_prompts, read_task, split_indices, write_task
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
    assert restore_brackets("-Lrb- -L\u017fB-") == "( -L\u017fB-"  # a long s, which equals an s when case is ignored


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


ITEM = {"input": "i", "output": "o", "src_info": {"normal_sentence": "s", "n": 5}, "references": ["a", "b"]}
BAD_ITEMS = {
    "list": ([], "is not an object with the texts 'input' and 'output'"),
    "no output": ({"input": "x"}, "is not an object with the texts 'input' and 'output'"),
    "number": (ITEM | {"input": 5}, "is not an object with the texts 'input' and 'output'"),
    "null references": (ITEM | {"references": None}, "'references' are a list of one or more texts"),
    "no references": (ITEM | {"references": []}, "'references' are a list of one or more texts"),
    "text as references": (ITEM | {"references": "letters"}, "'references' are a list of one or more texts"),
    "null reference": (ITEM | {"references": ["a", None]}, "'references' are a list of one or more texts"),
    "number as reference": (ITEM | {"references": [1, 2]}, "'references' are a list of one or more texts"),
    "list as src_info": (ITEM | {"src_info": []}, "'src_info' is an object"),
    "text as src_info": (ITEM | {"src_info": "s"}, "'src_info' is an object"),
    "number as source": (ITEM | {"src_info": {"normal_sentence": 5}}, "'src_info' has a text as 'normal_sentence'"),
    "list as source": (ITEM | {"src_info": {"normal_sentence": []}}, "'src_info' has a text as 'normal_sentence'"),
}


@pytest.mark.parametrize("split", ["train", "eval", "test"])
@pytest.mark.parametrize(("item", "message"), BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_bad_items_of_task_files_are_named(tmp_path, split, item, message):
    good = [ITEM, {"input": "i", "output": "o", "src_info": {"normal_sentence": None}}]
    content = {"train": good, "eval": good, "test": good}
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert read_task(tmp_path / "t.json", "normal_sentence") == (content, [])
    (tmp_path / "t.json").write_text(json.dumps(content | {split: [*good, item]}))
    with pytest.raises(UserError, match=rf"t\.json: {split}\[2\] .*{message}"):
        read_task(tmp_path / "t.json", "normal_sentence")


@pytest.mark.parametrize(("content", "message"), [
    ([], "not a preprocessed task file"), ({"train": [], "eval": []}, "not a preprocessed task file"),
    ({"train": [{"input": "x", "output": " "}], "eval": [], "test": []}, "holds no training samples"),
    ({"train": [ITEM | {"output": "\ud800"}], "eval": [], "test": []}, "half of a surrogate pair")])
def test_bad_task_files(tmp_path, content, message):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_task(tmp_path / "t.json")


def test_items_without_a_target_are_skipped(tmp_path):
    empty = ITEM | {"output": " \n"}
    write_task(tmp_path / "t.json", {"train": [empty, ITEM, empty], "eval": [empty], "test": [ITEM]})
    assert read_task(tmp_path / "t.json") == ({"train": [ITEM], "eval": [], "test": [ITEM]},
                                              ["train[0]", "train[2]", "eval[0]"])


def test_src_info_may_be_missing(tmp_path):
    item = {"input": "i", "output": "o"}
    write_task(tmp_path / "t.json", {"train": [item, item | {"src_info": None}], "eval": [], "test": []})
    assert read_task(tmp_path / "t.json", "normal_sentence")[0]["train"] == [item | {"src_info": {}}] * 2


@pytest.mark.parametrize("content", [b"\xff\x00\xb5", b"", b"precious notes\n", b'{"src": ["a"]}'])
def test_only_task_files_are_overwritten(tmp_path, content):
    path, splits = tmp_path / "t.json", {"train": [ITEM], "eval": [], "test": []}
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json exists already and is not a preprocessed task file"):
        write_task(path, splits)
    assert path.read_bytes() == content
    path.unlink()
    assert write_task(path, splits)
    assert not write_task(path, splits)
    assert write_task(path, splits | {"train": []})
    assert json.loads(path.read_text())["train"] == []
    with pytest.raises(UserError, match="cannot write .*: it is a folder, expected the name of a file"):
        write_task(tmp_path, splits)


def write_raw_file(path, **lists):
    raw = {"src": ["a", "b"], "tgt": ["c", "d"], "src_info": [{"normal_sentence": "a"}, {"n": 5}]}
    path.write_text(json.dumps(raw | lists))
    return path


def test_targets_of_a_raw_file(tmp_path):
    path = write_raw_file(tmp_path / "a.train.json", tgt=[["one", " ", None, "two"], None])
    assert list(read_raw_file(path, "normal_sentence")) == [("a", ["one", "two"], {"normal_sentence": "a"}),
                                                            ("b", [], {"n": 5})]


@pytest.mark.parametrize("lists", [
    {"src": ["a", None]}, {"src": ["a", ["b"]]}, {"src": ["a", 0]}, {"tgt": ["c", 0]}, {"tgt": ["c", False]},
    {"tgt": ["c", {}]}, {"tgt": ["c", [[]]]}, {"tgt": ["c", ["d", 0]]}, {"src_info": [{}, None]},
    {"src_info": [{}, []]}, {"src_info": [{}, {"normal_sentence": 5}]},
    {"src_info": [{}, {"normal_sentence": ["b"]}]}], ids=str)
def test_bad_items_of_raw_files_are_named(tmp_path, lists):
    path = write_raw_file(tmp_path / "a.train.json", **lists)
    with pytest.raises(UserError, match=r"a\.train\.json: item 1: expected a text as src"):
        list(read_raw_file(path, "normal_sentence"))


# ------------------------------------------------------------------------------------------------------- Hub datasets

TURNS = [{"role": role, "content": f"turn {n}"} for n, role in enumerate(("user", "user", "assistant", "assistant"))]
HUB_ROWS = {"simp": {"source": "s", "target": "t", "references": ["t", "u"]},
            "exp": {"premise": "p", "hypothesis": "h", "label": 0, "explanation_1": "e"},
            "empd": {"emotion": "proud", "situation": "A race.", "conversations": TURNS}}


@pytest.fixture
def hub(monkeypatch):
    """A function that reads a task from the given rows, the same for each split of its Hub dataset."""
    def call(task, rows):
        monkeypatch.setattr(raw_tasks, "load_hub_dataset", lambda *_: iter(rows))
        return read_hub_task(read_config("task", task), None, 10, 10)
    return call


def test_replies_are_the_turns_of_the_assistant(hub):
    samples = hub("empd", [HUB_ROWS["empd"]])["train"]
    assert [(sample["input_text"], sample["output_text"]) for sample in samples] == [
        ("- turn 0\n- turn 1", "turn 2"), ("- turn 0\n- turn 1\n- turn 2", "turn 3")]


@pytest.mark.parametrize(("task", "change", "said"), [
    ("simp", {"source": 5}, "expected a text, found 5"), ("simp", {"source": ["s"]}, "expected a text"),
    ("simp", {"references": "tu"}, "expected a list of texts, found 'tu'"),
    ("simp", {"references": [1, 2]}, "expected a text, found 1"), ("exp", {"label": "x"}, "TypeError"),
    ("exp", {"label": 3}, "IndexError"), ("exp", {"label": 0.5}, "TypeError"),
    ("empd", {"conversations": None}, "TypeError"), ("empd", {"conversations": ["a", "b"]}, "TypeError"),
    ("empd", {"conversations": [{"content": "a"}] * 2}, "KeyError: 'role'"),
    ("empd", {"conversations": [TURNS[0], {"role": "gpt", "content": "a"}]}, "unknown roles .'gpt'"),
    ("empd", {"conversations": [TURNS[0], {"role": "assistant", "content": 5}]}, "expected a text, found 5")])
def test_bad_rows_of_a_hub_dataset_are_named(hub, task, change, said):
    row = HUB_ROWS[task]
    assert hub(task, [row])["train"]
    name = read_config("task", task)["hub"]["dataset"]
    with pytest.raises(UserError, match=f"{name}: row 1 of the split 'train' is damaged or not as .*{said}"):
        hub(task, [row, row | change])


@pytest.mark.parametrize(("task", "rows", "said"), [
    ("simp", [], "holds no train and no test samples"),
    ("inqqg", [{"answer": "a", "question": "q"}], "holds no train samples"),
    ("empd", [HUB_ROWS["empd"] | {"conversations": TURNS[:1]}], "holds no train and no test samples")])
def test_a_hub_dataset_without_samples_is_an_error(hub, task, rows, said):
    with pytest.raises(UserError, match=said):
        hub(task, rows)


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
