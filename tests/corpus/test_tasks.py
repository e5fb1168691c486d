"""Raw and preprocessed task files, the evaluation split, and samples for fine-tuning."""
import json
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import sentencepiece

from common.configs import read_config
from common.files import UserError
from corpus import raw_tasks
from corpus.prompts import PROMPT, RESPONSE, open_template
from corpus.raw_tasks import (
    build_raw_files,
    constraint,
    cut_test_set,
    fill_template,
    read_hub_task,
    read_raw_file,
    read_raw_task,
    restore_brackets,
    split_of_file,
)
from corpus.tasks import SFTDataset, first_items, read_task, split_indices, write_task
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, sample_texts
from training.data import TrainData
from training.train_config import TrainConfig


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
             "generate_a_question_1.test_asks.json": "test", "train.json": "train", "notes.json": None,
             "training.json": "train", "simp_train.v2.json": "train", "X.Test_v1.json": "test",
             "train.valid.json": None}
    assert {name: split_of_file(tmp_path / name) for name in names} == names
    others = ["constrain_start+make_a_title.validation.json", "constrain_start+make_a_title.json", "latest.json"]
    assert [split_of_file(tmp_path / name) for name in others] == [None] * 3


@pytest.mark.parametrize(("task", "train", "test"), [("simp", 120, 40), ("empd", 120, 40), ("inqqg", 120, 40),
                                                     ("exp", 40, 20), ("hgen", 40, 20)])
def test_the_sample_is_large_enough_and_has_no_duplicates(task, train, test):
    spec = read_config("task", task)
    counts, seen = {}, []
    added = {"prompt", "prompt_name", "TO_REPLACE_1", "constrain_type"}
    for split in ("train", "test"):
        files = {path.name.split(".")[0]: json.loads(path.read_text())
                 for path in (ROOT / "data/sample" / spec["folder"]).glob(f"*.{split}.json")}
        counts[split] = sum(len(raw["src"]) for raw in files.values())
        infos = [info for name in spec["prompts"] for info in files.get(name, {"src_info": []})["src_info"]]
        fields = infos[0].keys() - added - {"gold_label_prompt", "context_emotion"}
        seen += [info[name] for info in infos for name in fields]
        for raw in files.values():
            for source, info in zip(raw["src"], raw["src_info"]):
                assert info["prompt"] in spec["prompts"][info["prompt_name"]]
                assert source == fill_template(info["prompt"], info)
                assert info == info | constraint(info["prompt_name"], info[spec["target"]])
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
def test_no_other_file_is_overwritten(tmp_path, content):
    path, splits = tmp_path / "t.json", {"train": [ITEM], "eval": [], "test": []}
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.json exists already and is not a preprocessed task file"):
        write_task(path, splits)
    assert path.read_bytes() == content
    path.unlink()
    assert write_task(path, splits)
    assert not write_task(path, splits)
    with pytest.raises(UserError, match=r"t\.json exists already, and these raw files .* give another one: remove it"):
        write_task(path, splits | {"train": []})
    assert json.loads(path.read_text())["train"] == [ITEM]
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


def write_prompts(folder, names, split, count=2):
    """A raw file for each prompt, as the published scripts write them."""
    for name in names:
        (folder / f"{name}.{split}.json").write_text(json.dumps({
            "src": [f"{name} {n}" for n in range(count)], "tgt": [["t", "", None]] * count,
            "src_info": [{"prompt_name": name} for _ in range(count)]}))


def test_three_of_the_eight_published_test_prompts_of_hgen_are_used(tmp_path, capsys):
    kinds = ["", "constrain_start+", "constrain_contain+", "constrain_end+"]
    names = [f"{kind}{prompt}" for prompt in ("make_a_title", "write_its_sentence") for kind in kinds]
    write_prompts(tmp_path, names[1:4], "train")
    write_prompts(tmp_path, names, "test")
    train, test = read_raw_task(tmp_path, read_config("task", "hgen"))
    assert sorted({item["src_info"]["prompt_name"] for item in test}) == sorted(names[1:4])
    assert (len(train), len(test)) == (6, 6)
    assert "references" not in test[0]  # the later ones are empty
    assert capsys.readouterr().err == ""
    write_prompts(tmp_path, ["constrain_start+make_a_title"], "validation")
    assert [len(items) for items in read_raw_task(tmp_path, read_config("task", "hgen"))] == [6, 6]
    assert "not read, since the names say neither train nor test: constrain_start+make_a_title.validation.json" in \
        capsys.readouterr().err
    (tmp_path / "constrain_start+make_a_title.validation.json").unlink()
    for name in names[1:]:
        (tmp_path / f"{name}.test.json").unlink()
    assert len(read_raw_task(tmp_path, read_config("task", "hgen"))[1]) == 2
    assert "no test item has the prompt_name constrain_start+make_a_title or " in (said := capsys.readouterr().err)
    assert said.endswith("so that all 2 are used: make_a_title\n")


def test_the_published_split_of_simp():
    """Of 100,002 raw training samples, a hundredth is set aside. The published run took 2,063 steps of 48 samples in
    each of 3 epochs, the last one of an epoch smaller; here a batch may hold the end and the beginning of epochs."""
    train, evaluation = split_indices(100_002, 0.01)
    assert (len(train), len(evaluation)) == (99_001, 1_001)
    assert 3 * -(-len(train) // 48) == 6_189
    run = SimpleNamespace(cfg=TrainConfig(global_batch_size=48), first_sample=0)
    assert TrainData(run, [], [], [], [], None, 3 * len(train)).steps == 6_188


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


def test_every_turn_but_the_first_is_a_sample(hub):
    samples = hub("empd", [HUB_ROWS["empd"]])["train"]
    assert [(sample["input_text"], sample["output_text"]) for sample in samples] == [
        ("- turn 0", "turn 1"), ("- turn 0\n- turn 1", "turn 2"), ("- turn 0\n- turn 1\n- turn 2", "turn 3")]


def test_questions_that_begin_with_w_or_h_are_kept(hub):
    questions = ["What is it?", "Is it?", "How? Why?", "Why not", "what is it?", "Hot\nor cold? Say."]
    samples = hub("inqqg", [{"answer": "a", "question": question} for question in questions] * 10)
    assert {sample["question"] for sample in samples["train"]} == {"What is it?", "Hot\nor cold? Say."}


def test_the_test_set_is_the_end_of_the_training_split(hub):
    """As published: of simp, 4,000 of the last 10,000 samples, none of which is trained on; here a tenth at most."""
    rows = [{"n": n} for n in range(100)]
    numbers = {name: [row["n"] for row in part] for name, part in cut_test_set(rows, 1000, 4, 6).items()}
    assert numbers == {"train": list(range(94)), "test": [96, 97, 98, 99]}
    numbers = {name: [row["n"] for row in part] for name, part in cut_test_set(rows, 50, 40, 60).items()}
    assert numbers == {"train": list(range(50)), "test": list(range(90, 100))}
    simp = hub("simp", [HUB_ROWS["simp"] | {"target": str(n)} for n in range(30)])
    assert [sample["simple_sentence"] for sample in simp["test"]] == ["27", "28", "29"]
    assert [sample["simple_sentence"] for sample in simp["train"]] == [str(n) for n in range(10)]


def test_another_test_split(monkeypatch):
    """Simplifications are tested on the end of the training split, or by choice on ASSET, with all its references."""
    asked = []
    monkeypatch.setattr(raw_tasks, "load_hub_dataset",
                        lambda name, split, *_: asked.append(split) or iter([HUB_ROWS["simp"]] * 3))
    splits = read_hub_task(read_config("task", "simp"), None, 2, 2, "test_asset")
    assert asked == ["train", "test_asset"]
    assert {name: len(part) for name, part in splits.items()} == {"train": 2, "test": 2}
    assert splits["test"][0]["references"] == ["t", "u"]


def test_constraint_prompts_ask_for_a_word_of_the_headline():
    spec = read_config("task", "hgen")
    files = build_raw_files([{"document": "d", "summary": headline} for headline in ["one two three", "four", ""] * 3],
                            spec)
    assert {name: len(raw["src"]) for name, raw in files.items()} == dict.fromkeys(spec["test_prompt"], 3)
    words = {name: [info["TO_REPLACE_1"] for info in raw["src_info"]] for name, raw in files.items()}
    assert words["constrain_start+make_a_title"] == ["one"] * 3
    assert words["constrain_contain+make_a_title"] == ["four"] * 3
    assert words["constrain_end+make_a_title"] == [""] * 3
    assert 'first word is "one"' in files["constrain_start+make_a_title"]["src"][0]
    assert constraint("constrain_end+x", "one two three") == {"TO_REPLACE_1": "three", "constrain_type": "end"}
    any_word = {constraint("constrain_contain+x", f"{n} b c d")["TO_REPLACE_1"] for n in range(20)}
    assert {"b", "c", "d"} < any_word
    assert constraint("make_a_title", "one") == {}


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
    assert hub(task, [row, row])["train"]
    name = read_config("task", task)["hub"]["dataset"]
    with pytest.raises(UserError, match=f"{name}: row 1 of the split 'train' is damaged or not as .*{said}"):
        hub(task, [row, row | change])


@pytest.mark.parametrize(("task", "rows", "said"), [
    ("simp", [], "holds no train and no test samples"),
    ("inqqg", [{"answer": "a", "question": "Why?"}], "holds no train samples"),
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
    assert (len(tokens), first) == (250, 200)
    assert tokens[first:].tolist() == tokenizer.encode(items[1]["output"])[:50]  # cut, and without <eos>
    assert tokenizer.decode(tokens[:first].tolist()).endswith("x \n\n" + RESPONSE)
    tokens, first = data[2]
    assert tokens[:first].tolist() == [1, *tokenizer.encode(items[2]["input"])]  # a whole prompt is not wrapped again
    assert SFTDataset(items, tokenizer, 200, 50, train_on_source=True)[0][1] == 1
    assert (data.long_prompts, data.cut_targets) == (1, 1)


def test_long_prompts_keep_the_response_marker(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    short, long = open_template("alpaca", tokenizer).encode_prompts(["a", "b " * 500], 120)
    assert len(short) < 120 == len(long)
    assert tokenizer.decode(long).endswith(RESPONSE)


def test_a_plain_prompt_is_the_source(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    source, target = "Say it again.", "It was said."
    (ids, first), = SFTDataset([{"input": source, "output": target}], tokenizer, 200, 50, template="plain")
    assert ids[:first].tolist() == [tokenizer.bos_id, *tokenizer.encode(source)]
    assert ids[first:].tolist() == [*tokenizer.encode(target), tokenizer.eos_id]
    words = "b " * 500 + "Who was it?"
    begun, long = open_template("plain", tokenizer).encode_prompts(["<s>Say", words], 120)
    assert begun == [tokenizer.bos_id, *tokenizer.encode("Say")]  # with one <bos>
    assert long == [tokenizer.bos_id, *tokenizer.encode(words)[-119:]]  # the question is at the end
    without_bos = replace(open_template("plain", tokenizer), bos=[])
    assert without_bos.encode_prompts(["Say"], 120) == [tokenizer.encode("Say")]
    with pytest.raises(UserError, match="the input of an item is empty, and this tokenizer has no token that begins"):
        without_bos.encode_prompts(["Say", ""], 120)


def test_a_cut_prompt_ends_as_a_whole_one(tmp_path):
    """SentencePiece encodes a text alone with a space before it, and not where it follows another."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=800,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    tokenizer = Tokenizer(tmp_path)
    short, long = open_template("alpaca", tokenizer).encode_prompts(["a b", "b " * 500], 200)
    ending = short[[tokenizer.token(index) for index in short].index("▁b") + 1:]
    assert tokenizer.decode(ending) == "\n\n" + RESPONSE
    assert len(short) < 200 == len(long)
    assert tokenizer.token(long[-len(ending) - 1]) == "▁b"
    assert long[-len(ending):] == ending


def test_the_first_items_are_of_all_prompts():
    items = [{"n": n, "src_info": {"prompt_name": prompt}} for n, prompt in enumerate("aaaabbc")]
    assert [item["n"] for item in first_items(items, 6)] == [0, 4, 6, 1, 5, 2]
    assert first_items(items, None) == items
    assert [item["n"] for item in first_items(items[:4], 3)] == [0, 1, 2]
