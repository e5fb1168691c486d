"""data_prep.py on raw task files, raw text and Hub datasets."""
import json
import shutil

import datasets
import numpy as np
import pytest

import data_prep
from common.configs import read_config
from corpus.shards import check_shards
from corpus.tasks import read_task
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, error_line, run_script


def write_raw(folder, name, sources, targets, prompt="simplification_1"):
    raw = {"src": sources, "tgt": targets, "src_info": [{"prompt_name": prompt, "n": n} for n in range(len(sources))]}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(raw))


@pytest.fixture
def raw(tmp_path):
    """The raw folder of Simp with two test files, one of which has a prompt that is not used for testing."""
    folder = tmp_path / "raw/wiki_auto"
    folder.parent.mkdir()
    write_raw(folder, "simplification_1.train.json", [f"source -LRB- {n} -RRB-" for n in range(30)],
              [{3: " ", 8: None}.get(n, f"target {n}\n") for n in range(30)])
    write_raw(folder, "simplification_1.test.json", ["a", "b"], [["one", "two"], ["only"]])
    write_raw(folder, "simplification_2.test.json", ["c"], ["d"], "simplification_2")
    return folder


def prepare(raw, out, *flags, check=True, folder=None):
    return run_script("data_prep.py", "task", "--task", "simp", "--folder_path", folder or raw.parent,
                      "--output_path", out, *flags, check=check)


RACE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import corpus.sample_suite, data_prep
from common import scripts

folder = Path(sys.argv.pop(1))

def waits_for_the_other(rename):
    def call(path, target):
        if path.parent == folder:
            (folder / "ready").mkdir(exist_ok=True)
            (folder / "ready" / path.name).touch()
            end = time.monotonic() + 20
            while len(list((folder / "ready").iterdir())) < 2 and time.monotonic() < end:
                time.sleep(0.005)
        return rename(path, target)
    return call

Path.rename, Path.replace = map(waits_for_the_other, (Path.rename, Path.replace))
samples = [{{"document": "d", "summary": "s"}}]
data_prep.read_hub_task = lambda *_: {{"train": samples, "test": samples}}
corpus.sample_suite.read_documents = lambda _: [f"A prose text of number {{n}} with eight words. " * 20 for n in "123"]
scripts.dispatch(data_prep.COMMANDS, "")
"""


@pytest.mark.parametrize(("command", "made", "flags"), [
    ("task", "out", ["--task", "simp", "--folder_path", "data/sample"]),
    ("text", "out", ["--source", "{0}/texts", "--vocab_size", "320"]), ("suite", "out", []),
    ("hub", "gigaword", ["--task", "hgen"])])
def test_two_processes_that_make_one_path(tmp_path, command, made, flags):
    """Both have written everything when the first of them renames its result."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text("".join(f'{{"text": "Text {n}."}}\n' for n in range(400)))
    out = tmp_path if command == "hub" else tmp_path / made
    result = run_script("-c", RACE, tmp_path, command, *(flag.format(tmp_path) for flag in flags), "--output_path", out,
                        launcher=2)
    # both writers of a task file replace it by the same content
    assert result.stdout.count("exists already") == (command != "task")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([made, "ready", "texts"])
    if command == "task":
        assert read_task(tmp_path / made)[0]["train"]
    elif command == "text":
        check_shards(tmp_path / made)
    else:
        names = {"suite": ["continuation.jsonl", "pairs.jsonl", "reading.jsonl", "terms.jsonl"],
                 "hub": [f"constrain_{kind}+make_a_title.{split}.json" for kind in ("contain", "end", "start")
                         for split in ("test", "train")] + ["hub.settings"]}[command]
        assert sorted(path.name for path in (tmp_path / made).iterdir()) == names


def test_preprocessed_file(raw, tmp_path):
    result = prepare(raw, tmp_path / "out.json", "--eval_dataset_size", "5")
    assert "2 train items have an empty target" in result.stderr
    assert "simplification_1.train.json[3], simplification_1.train.json[8]" in result.stderr
    assert " has no text as 'normal_sentence' in src_info, which SARI needs; it has prompt_name, n: `source` in" in \
        result.stderr
    splits = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(items) for name, items in splits.items()} == {"train": 23, "eval": 5, "test": 2}
    kept = [n for n in range(30) if n not in (3, 8)]
    order = datasets.Dataset.from_list([{"n": n} for n in kept]).train_test_split(test_size=5, seed=42)
    assert [item["src_info"]["n"] for item in splits["train"]] == order["train"]["n"]
    assert [item["index"] for item in splits["eval"]] == order["test"]["n"]
    first = splits["train"][0]
    number = first["index"]
    assert (first["input"], first["output"]) == (f"source ( {number} )", f"target {number}")
    assert [item["output"] for item in splits["test"]] == ["one", "only"]
    assert [item.get("references") for item in splits["test"]] == [["one", "two"], None]


def test_training_items_in_the_test_set_are_counted(raw, tmp_path):
    path, = raw.glob("*.train.json")
    (raw / "._simplification_1.train.json").write_bytes(b"\0 of macOS")
    train = json.loads(path.read_text())
    for values in train.values():
        values.append(values[0])
    path.write_text(json.dumps(train))
    test, = raw.glob("simplification_1.test.json")
    content = json.loads(test.read_text())
    test.write_text(json.dumps({name: [*values, train[name][0]] for name, values in content.items()}))
    result = prepare(raw, tmp_path / "out.json")
    splits = json.loads((tmp_path / "out.json").read_text())
    both = [(item["input"], item["output"]) for item in splits["train"]]
    assert (splits["test"][-1]["input"], splits["test"][-1]["output"]) in both
    assert f"1 of {len(splits['test'])} test items are training items as well" in result.stderr
    assert f"1 of {len(splits['test'])} test items have the source text of a training item" in result.stderr


def test_items_that_share_their_source_with_training_items_are_counted(raw, tmp_path):
    """Such as other references of a sentence, or another prompt with it: each sentence here has two prompts."""
    path, = raw.glob("*.train.json")
    write_raw(raw, path.name, [f"Simplify{'.' * (n % 2)} {n // 2}" for n in range(30)], [f"t {n}" for n in range(30)])
    content = json.loads(path.read_text())
    content["src_info"] = [{"normal_sentence": f"sentence {n // 2}"} for n in range(30)]
    path.write_text(json.dumps(content))
    result = prepare(raw, tmp_path / "out.json")
    splits = json.loads((tmp_path / "out.json").read_text())
    trained = {item["src_info"]["normal_sentence"] for item in splits["train"]}
    both = sum(item["src_info"]["normal_sentence"] in trained for item in splits["eval"])
    assert both
    assert "are training items as well" not in result.stderr
    assert f"{both} of {len(splits['eval'])} eval items have the source text of a training item: the loss on them" in \
        result.stderr


def test_folder_path_may_be_the_task_folder_and_a_second_run_changes_nothing(raw, tmp_path):
    prepare(raw, tmp_path / "1.json")
    prepare(raw, tmp_path / "2.json", folder=raw)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    before = (tmp_path / "1.json").stat().st_mtime_ns
    assert "unchanged" in prepare(raw, tmp_path / "1.json").stdout
    assert (tmp_path / "1.json").stat().st_mtime_ns == before


def damage(raw, name, change):
    path = raw / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


BAD = {
    "not JSON": (lambda raw: (raw / "simplification_1.train.json").write_text('{"src": ['),
                 "simplification_1.train.json is not JSON"),
    "no tgt": (lambda raw: damage(raw, "simplification_1.train.json", lambda data: data.pop("tgt")),
               "lacks the list tgt"),
    "lengths": (lambda raw: damage(raw, "simplification_1.train.json", lambda data: data["tgt"].pop()),
                "src 30, tgt 29, src_info 30"),
    "no train": (lambda raw: (raw / "simplification_1.train.json").unlink(), "holds no train file"),
    "no test": (lambda raw: [path.unlink() for path in raw.glob("*.test.json")], "holds no test file"),
    "binary": (lambda raw: (raw / "simplification_1.train.json").write_bytes(b"\xff\xfe"), "is not UTF-8"),
    "a number": (lambda raw: damage(raw, "simplification_1.train.json", lambda data: data["tgt"].__setitem__(4, 5)),
                 "simplification_1.train.json: item 4: expected a text as src"),
    "both words": (lambda raw: (raw / "simplification_1.train.json").rename(raw / "s.train_test.json"),
                   "has both train and test in its name"),
    "no targets": (lambda raw: damage(raw, "simplification_1.train.json",
                                      lambda data: data.update(tgt=[""] * 30)), "hold no item with a target"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
def test_bad_raw_files(raw, tmp_path, spoil, said):
    spoil(raw)
    line = error_line(prepare(raw, tmp_path / "out.json", check=False))
    assert said in line
    assert str(raw) in line
    assert not (tmp_path / "out.json").exists()


def test_the_folder_of_another_task_is_refused(raw, tmp_path):
    other = raw.rename(raw.parent / "eSNLI")
    line = error_line(prepare(raw, tmp_path / "out.json", folder=other, check=False))
    assert f"{other} is the folder of the task exp, expected wiki_auto or its parent folder" in line
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("flags", "said"), [
    (["--task", "smp"], "unknown task 'smp'"), (["--eval_dataset_size", "50"], "takes 50 of 28 training items"),
    (["--eval_dataset_size", "-1"], "expected a number above 0"), (["--eval_dataset_size", "inf"], "size is inf"),
    (["--eval_dataset_size", "1.5"], "expected a share below 1"),
    (["--eval_dataset_size", "nan"], "size is nan"), (["--eval_dataset_size", "1e308"], "0 and at most 1000000000"),
    (["--folder_path", "gone"], "gone is not a folder")])
def test_bad_flags(raw, tmp_path, flags, said):
    assert said in error_line(prepare(raw, tmp_path / "out.json", *flags, check=False))
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("command", "flags", "said"), [
    ("text", ["--vocab_size", "10000000000000"], "vocab_size is 10000000000000, expected a number from 300 to 1048576"),
    ("text", ["--tokenizer", "x", "--size", "tiny"], "size would change nothing, since --tokenizer gives the"),
    ("text", ["--size", "tiny", "--vocab_size", "999"], "vocab_size would change nothing, since --size gives it"),
    ("text", ["--text_column", "body"], "text_column would change nothing, since docs has no fields"),
    ("text", ["--source", "a.txt", "--dataset_config", "en"], "dataset_config would change nothing, since a.txt is"),
    ("text", ["--source", "missing.txt"], "missing.txt does not exist"),
    ("hub", ["--task", "hgen", "--max_samples", 2 ** 62], "expected a number from 1 to 1000000000"),
    ("hub", ["--task", "hgen", "--max_test_samples", 2 ** 62], "expected a number from 1 to 1000000000")])
def test_limits_of_settings(refusal, tmp_path, command, flags, said):
    assert said in refusal(data_prep.COMMANDS, command, *flags, "--output_path", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "flags"), [("text", []), ("hub", ["--task", "hgen"]), ("suite", []), ("task", [
    "--task", "simp", "--folder_path", "data/sample"])])
def test_a_path_with_something_else_is_left_alone(refusal, tmp_path, monkeypatch, command, flags):
    monkeypatch.setattr(data_prep, "read_hub_task", lambda *_: {"train": [], "test": []})
    (tmp_path / "gigaword").write_text("mine")
    out = tmp_path if command == "hub" else tmp_path / "gigaword"
    assert "gigaword exists already" in refusal(data_prep.COMMANDS, command, *flags, "--output_path", out)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


# -------------------------------------------------------------------------------------------------------------- text

def test_text_to_shards(tmp_path):
    lines = [f"Document number {n} tells of {n * n}." for n in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run_script("data_prep.py", "text", "--source", tmp_path / "a.jsonl", "--vocab_size", "320",
               "--output_path", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 320
    found = []
    for split in ("train", "val"):
        ids = np.load(tmp_path / f"out/{split}-00000.npy", mmap_mode="r")
        assert ids.dtype == np.uint16
        assert ids[-1] == tokenizer.eos_id
        ends = [-1, *np.flatnonzero(ids == tokenizer.eos_id).tolist()]
        found.append([tokenizer.decode(ids[start + 1:stop].tolist()) for start, stop in zip(ends, ends[1:])])
    assert sorted(found[0] + found[1]) == sorted(lines)
    assert 0 < len(found[1]) < 20
    assert json.loads((tmp_path / "out/meta.json").read_text())["documents"] == 400
    again = ["data_prep.py", "text", "--source", tmp_path / "a.jsonl", "--output_path", tmp_path / "out"]
    assert "out exists already: if the text has changed, remove it" in run_script(*again, "--vocab_size", "320").stdout
    line = error_line(run_script(*again, check=False))
    assert "made with other settings: vocab_size is 320 there and 4096 here" in line


def test_text_with_an_existing_tokenizer(checkpoint, tmp_path):
    """The end-of-text token is one that only the checkpoint's config.json names."""
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (checkpoint / "tokenizer_config.json").unlink()
    (tmp_path / "texts").mkdir()
    texts = [f"Text {n}\nof two lines" for n in range(300)]
    for n, text in enumerate(texts):
        (tmp_path / f"texts/{n:03}.txt").write_text(text)
    run_script("data_prep.py", "text", "--source", tmp_path / "texts", "--tokenizer", checkpoint,
               "--output_path", tmp_path / "out")
    train, held_out = (np.load(tmp_path / f"out/{split}-00000.npy").tolist() for split in ("train", "val"))
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.eos_id == Tokenizer(checkpoint).eos_id == 2
    found = tokenizer.fast.decode(train + held_out, skip_special_tokens=False).split("</s>")
    assert sorted(found) == sorted(["", *texts])
    kept = iter(texts)  # in the order of the files
    assert all(text in kept for text in tokenizer.fast.decode(train, skip_special_tokens=False).split("</s>")[:-1])
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("source", "said"), [("nowhere/at-all", "cannot read the split 'train' of nowhere/at-all"),
                                              (ROOT / "Makefile", "expected a .txt or .jsonl file"),
                                              (ROOT / "requirements.txt", "holds 1 documents, too few")])
def test_bad_text_source(tmp_path, source, said):
    result = run_script("data_prep.py", "text", "--source", source, "--output_path", tmp_path / "out", check=False)
    assert said in error_line(result)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- hub

DIALOGUE = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
ROWS = {
    "simp": [{"source": f"s{n}", "target": f"t{n}", "references": [["a", "b"], ["t1"], [], None][n]} for n in range(4)],
    "empd": [{"emotion": "proud", "situation": "A race.", "conversations": DIALOGUE, "conv_id": "x"}],
    "inqqg": [{"question": f"Why {n}?", "answer": f"a{n}"} for n in range(20)],
    "exp": [{"premise": "p", "hypothesis": "h", "label": n, "explanation_1": f"e{n}", "explanation_2": ""}
            for n in range(3)],
    "hgen": [{"document": f"d{n}", "summary": f"s{n}", "id": str(n)} for n in range(3)],
}


@pytest.mark.parametrize("task", ROWS)
def test_hub_rows_become_raw_files(task, tmp_path):
    """Loads local parquet files through the datasets library, as it does those of the Hub."""
    spec = read_config("task", task)
    rows = datasets.Dataset.from_list(ROWS[task])
    for split in spec["hub"]["splits"].values():
        rows.to_parquet(tmp_path / f"parquet/data/{split}-00000-of-00001.parquet")
    run_script("data_prep.py", "hub", "--task", task, "--dataset", tmp_path / "parquet",
               "--output_path", tmp_path / "raw")
    folder = tmp_path / "raw" / spec["folder"]
    items = [json.loads(path.read_text()) for path in sorted(folder.glob("*.train.json"))]
    sources, targets, infos = (sum((item[key] for item in items), []) for key in ("src", "tgt", "src_info"))
    if task == "simp":
        assert targets == [["a", "b"], "t1", "t2"]  # the last sample is the test set
        assert sources[0].startswith("s0\n\n")
        assert '"s1"' in sources[1]
    elif task == "empd":
        assert targets == ["assistant 0", "user 1", "assistant 1"]
        assert infos[2]["input_text"] == "- user 0\n- assistant 0\n- user 1"
        assert '"proud"' in sources[0]
        assert sources[1].endswith(infos[1]["input_text"])
    elif task == "inqqg":
        assert targets == [f"Why {n}?" for n in range(18)]  # the last tenth is the test set
        assert json.loads(next(folder.glob("*.test.json")).read_text())["tgt"] == ["Why 18?", "Why 19?"]
    elif task == "exp":
        assert [info["gold_label_prompt"] for info in infos] == ["entail each other", "are unrelated",
                                                                 "contradict each other"]
        assert targets == ["e0", "e1", "e2"]
    assert "[" not in "".join(sources)
    run_script("data_prep.py", "task", "--task", task, "--folder_path", tmp_path / "raw",
               "--output_path", tmp_path / "out.json", "--eval_dataset_size", "1")
    words = "data_prep.py", "hub", "--task", task, "--output_path", tmp_path / "raw"
    assert "exists already" in run_script(*words, "--dataset", tmp_path / "parquet").stdout
    if task == "hgen":
        assert "was made with other settings: dataset is " in error_line(run_script(*words, check=False))
        (folder / "hub.settings").unlink()  # such as the published raw folders
        assert "exists already" in run_script(*words).stdout


def test_a_task_file_that_does_not_fit_its_data(tmp_path, monkeypatch, refusal):
    words = "hub", "--task", "simp", "--output_path", tmp_path / "raw"
    spec = read_config("task", "simp")
    splits = {"train": [{"src": "a", spec["target"]: "b"}], "test": []}
    monkeypatch.setattr(data_prep, "read_hub_task", lambda *_: splits)
    for changed, said in (({"target": None}, "lacks target, without which nothing can be downloaded"),
                          ({"prompts": {"mine": ["Simplify [sorce]"]}}, "names [sorce], and samples have src, ")):
        given = {name: value for name, value in (spec | changed).items() if value is not None}
        monkeypatch.setattr(data_prep, "read_config", lambda *_, given=given: given)
        assert said in refusal(data_prep.COMMANDS, *words)
    assert not list((tmp_path / "raw").iterdir())


def test_a_missing_network_is_reported_in_one_line(tmp_path):
    result = run_script("data_prep.py", "hub", "--task", "hgen", "--output_path", tmp_path / "raw", check=False)
    assert "Harvard/gigaword" in error_line(result)
    assert not (tmp_path / "raw").exists()
