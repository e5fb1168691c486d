"""Losses on held-out text and on references by evaluate.py, compared with transformers; one process and two."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import UserError, digest, read_json
from common.provenance import data_digest
from corpus.documents import is_held_out
from corpus.prompts import PROMPT
from corpus.shards import write_shards
from evaluate import prepare_evaluation
from evaluation.evaluate_config import EvaluateConfig
from evaluation.losses import open_text
from evaluation.result_files import read_losses, write_losses
from evaluation.summary import loss_table
from model.checkpoint import checkpoint_digest, open_checkpoint, write_checkpoint
from model.tokenizer import Tokenizer, copy_tokenizer, train_tokenizer
from tests.conftest import random_model, run_script, sample_texts

WINDOW = 32


@pytest.fixture(scope="module")
def documents():
    """Some of them are held out."""
    return [f"{number}: {text} – é" for number in range(5) for text in sample_texts()]


@pytest.fixture(scope="module")
def shards(tokenizer_dir, documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, documents, Tokenizer(tokenizer_dir), {"source": "texts"})
    copy_tokenizer(tokenizer_dir, folder)
    return folder


@pytest.fixture(scope="module")
def reference(tokenizer_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    model = random_model(1, num_hidden_layers=3)
    write_checkpoint(folder, model.config, model.named_parameters(), tokenizer_dir)
    return folder


@pytest.fixture(scope="module")
def words(checkpoint, reference, shards, simp_file):
    return ["evaluate.py", "--checkpoint", checkpoint, "--reference", reference, "--text", shards, "--text_length",
            WINDOW, "--tasks", "simp", "--data", simp_file.parent, "--limit", "7", "--decode", "false", "--dtype",
            "fp32"]


@pytest.fixture(scope="module")
def done(words, tmp_path_factory):
    """(folder of the results, printed output)."""
    out = tmp_path_factory.mktemp("eval")
    return out, run_script(*words, "--out", out).stdout


@pytest.fixture(scope="module")
def by_transformers(checkpoint, reference):
    """A function: (nll, KL), summed over the targets of one sample, in fp32."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (checkpoint, reference)]

    def losses(ids, first):
        with torch.no_grad():
            log_q, log_p = (model(torch.tensor([ids[:-1]])).logits[0, first - 1:].double().log_softmax(-1)
                            for model in models)
        targets = ids[first:]
        return float(-log_q[range(len(targets)), targets].sum()), float((log_p.exp() * (log_p - log_q)).sum())
    return losses


def check(found, samples, by_transformers):
    """Compares the items and totals of a losses file with transformers on samples (ids, first target)."""
    nll, kl = zip(*(by_transformers(*sample) for sample in samples))
    items, tokens = found["items"], [len(ids) - first for ids, first in samples]
    assert items["nll"] == pytest.approx(nll, rel=1e-5)
    assert items["kl"] == pytest.approx(kl, rel=1e-5)
    assert items["tokens"] == tokens
    assert found["loss"] == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
    assert found["kl"] == pytest.approx(sum(kl) / sum(tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / sum(items["bytes"]), rel=1e-5)


def test_windows_of_token_shards(done, shards, checkpoint, reference, documents, by_transformers):
    found = read_json(done[0] / "losses-text.json")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [token for text in documents if is_held_out(text) for token in [*tokenizer(text)["input_ids"], 2]]
    samples = [(ids[start:start + WINDOW + 1], 1) for start in range(0, 7 * WINDOW, WINDOW)]
    assert (found["name"], found["kind"], found["samples"]) == ("text", "text", 7)
    check(found, samples, by_transformers)
    texts = [tokenizer.decode(ids[1:], skip_special_tokens=True) for ids, _ in samples]
    assert found["items"]["bytes"] == [len(text.encode()) for text in texts]
    assert "�" not in "".join(texts)  # no window cuts a character
    run = found["run"]
    assert run["data_digest"] == data_digest(shards) == digest([shards / "meta.json"])
    assert run["checkpoint_digest"] == checkpoint_digest(checkpoint)
    assert run["reference_digest"] == checkpoint_digest(reference)
    assert (run["dtype"], run["limit"], run["seq_length"]) == ("fp32", 7, WINDOW)


def test_references_of_a_task(done, checkpoint, simp_file, by_transformers):
    found = read_json(done[0] / "losses-task-simp.json")
    tokenizer, items = AutoTokenizer.from_pretrained(checkpoint), read_json(simp_file)["test"][:7]
    samples = []
    for item in items:
        prompt = [1, *tokenizer(PROMPT.format(source=item["input"]))["input_ids"]]
        samples.append((prompt + tokenizer(item["output"])["input_ids"] + [2], len(prompt)))
    assert (found["name"], found["kind"], found["samples"]) == ("simp", "task", 7)
    check(found, samples, by_transformers)
    assert found["items"]["bytes"] == [len(item["output"].encode()) for item in items]
    assert found["run"]["data_digest"] == digest([simp_file])
    assert (found["run"]["max_source_length"], found["run"]["max_target_length"]) == (1024, 256)


def test_without_decoding_there_are_losses_only(done):
    assert sorted(path.name for path in done[0].iterdir()) == ["losses-task-simp.json", "losses-text.json"]


def test_the_table(done):
    lines = done[1].splitlines()
    for name in ("text", "simp"):
        found, = [found for found in read_losses(done[0]) if found["name"] == name]
        row, = [line.split() for line in lines if line.startswith(f"{name} ")]
        assert row == [name, "7", f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", f"{found['kl']:.4f}"]
    assert loss_table([found | {"kl": None}]).splitlines()[1].endswith("–")


def test_two_processes_give_the_same(done, words, tmp_path):
    run_script(*words, "--out", tmp_path, launcher=2)
    for one, two in zip(read_losses(done[0]), read_losses(tmp_path), strict=True):
        for name in ("nll", "kl"):
            assert two["items"].pop(name) == pytest.approx(one["items"].pop(name), rel=1e-5)
        assert two["items"] == one["items"]
        assert two["run"] == one["run"]


def test_existing_losses_are_kept(done, words, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "eval")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    without = [word for word in words if word not in (words[3], words[4])]
    assert "--reference" not in without
    for again in (words, without):  # losses with KL also serve a run without a reference
        printed = run_script(*again, "--out", out).stdout
        assert printed.count("already exists, with the same model, data and settings") == 2
        assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    run_script(*words, "--text_length", WINDOW // 2, "--out", out)
    assert read_json(out / "losses-text.json")["items"]["tokens"] == [WINDOW // 2] * 7
    assert read_json(out / "losses-task-simp.json") == read_json(done[0] / "losses-task-simp.json")


def test_kl_is_added_later(done, words, tmp_path):
    without = [word for word in words if word not in (words[3], words[4])]
    run_script(*without, "--out", tmp_path)
    assert [(found["kl"], found["items"]["kl"]) for found in read_losses(tmp_path)] == [(None, None)] * 2
    run_script(*words, "--out", tmp_path)
    for one, two in zip(read_losses(done[0]), read_losses(tmp_path), strict=True):
        assert two == one


def test_documents_of_a_text_file(checkpoint, reference, by_transformers, tmp_path):
    """A long document is cut into windows and is one item; all of its tokens are targets once."""
    texts = sample_texts()
    documents = ["short é", " ".join(texts[:4]), "  ", texts[5]]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    out = tmp_path / "eval"
    run_script("evaluate.py", "--checkpoint", checkpoint, "--reference", reference, "--text", path, "--text_length", 40,
               "--out", out, "--dtype", "fp32")
    found, = read_losses(out)
    tokenizer, documents = AutoTokenizer.from_pretrained(checkpoint), [text for text in documents if text.strip()]
    for number, text in enumerate(documents):
        ids = [2, *tokenizer(text)["input_ids"]]  # the end-of-text token precedes a document in pretraining
        parts = [by_transformers(ids[start:start + 41], 1) for start in range(0, len(ids) - 1, 40)]
        nll, kl = map(sum, zip(*parts))
        assert found["items"]["nll"][number] == pytest.approx(nll, rel=1e-5)
        assert found["items"]["kl"][number] == pytest.approx(kl, rel=1e-5)
        assert found["items"]["tokens"][number] == len(ids) - 1
        assert found["items"]["bytes"][number] == len(text.encode())
    assert (found["samples"], len(documents), found["run"]["seq_length"]) == (3, 3, 40)
    assert found["items"]["tokens"][1] > 80


def prepared(checkpoint, **settings):
    return open_text(EvaluateConfig(checkpoint=str(checkpoint), **settings), open_checkpoint(checkpoint), {})


def test_how_much_of_the_text_is_used(checkpoint, shards, tmp_path):
    def sizes(text, **settings):
        loss_set = prepared(checkpoint, text=str(text), **settings)
        tokens = np.bincount(loss_set.items, [len(ids) - first for ids, first in loss_set.samples])
        return len(loss_set.num_bytes), tokens.tolist(), loss_set.settings["seq_length"]

    val = sum(shard["tokens"] for name, shard in read_json(shards / "meta.json")["shards"].items() if name[0] == "v")
    assert sizes(shards) == ((val - 1) // 256, [256] * ((val - 1) // 256), 256)
    assert sizes(shards, text_tokens=100, text_length=32)[:2] == (3, [32, 32, 32])
    assert sizes(shards, text_tokens=100, text_length=32, limit=2)[:2] == (2, [32, 32])
    with pytest.raises(UserError, match="text_tokens is 31, less than a window of 32 tokens: raise it, or lower"):
        sizes(shards, text_tokens=31, text_length=32)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in sample_texts()[:6]))
    lengths = [len(ids) for ids in Tokenizer(checkpoint).encode_batch(sample_texts()[:6])]
    assert sizes(path) == (6, lengths, 2048)
    assert sizes(path, text_tokens=sum(lengths[:4]) + 1)[:2] == (4, lengths[:4])
    assert sizes(path, text_tokens=7)[:2] == (1, [7])  # a file without line ends is one document
    assert sizes(path, limit=2)[:2] == (2, lengths[:2])


@pytest.fixture
def refused(checkpoint, reference, shards, simp_file, tmp_path):
    """A function that returns the error of an evaluation's checks."""
    flags = {"checkpoint": str(checkpoint), "reference": str(reference), "text": str(shards), "out": str(tmp_path),
             "tasks": ("simp",), "data": str(simp_file.parent), "limit": 7, "text_length": WINDOW, "decode": False,
             "dtype": "fp32"}

    def call(**given):
        with pytest.raises(UserError) as error:
            prepare_evaluation(EvaluateConfig(**flags | given))
        return str(error.value)
    return call


def test_texts_and_references_that_do_not_fit(refused, checkpoint, shards, tokenizer_dir, tmp_path):
    assert "text_length is 4000, more than the model's max_position_embeddings 2048: lower it" in \
        refused(text_length=4000)
    assert "max_source_length 1900 + max_target_length 256 of simp is more than the model's" in \
        refused(max_source_length=1900)
    assert f"{tmp_path} is not a directory of token shards" in refused(text=str(tmp_path))
    (tmp_path / "a.md").write_text("text")
    assert "a.md is neither a directory of token shards nor a .txt or .jsonl file" in refused(
        text=str(tmp_path / "a.md"))
    (tmp_path / "a.txt").write_text("  \n")
    assert "a.txt holds no document with text" in refused(text=str(tmp_path / "a.txt"))
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(sample_texts("empd"), 512, other)
    model = random_model()
    write_checkpoint(tmp_path / "stranger", model.config, model.named_parameters(), other)
    assert "was made with a tokenizer other than that of" in refused(checkpoint=str(tmp_path / "stranger"),
                                                                     reference=None)
    assert "has another vocabulary or tokenizer than" in refused(reference=str(tmp_path / "stranger"))
    model = random_model(vocab_size=520)
    write_checkpoint(tmp_path / "wide", model.config, model.named_parameters(), tokenizer_dir)
    assert "has another vocabulary or tokenizer than" in refused(reference=str(tmp_path / "wide"))
    model = random_model(max_position_embeddings=512)
    write_checkpoint(tmp_path / "short", model.config, model.named_parameters(), tokenizer_dir)
    assert "has a context of 512 tokens, less than the 2048" in refused(reference=str(tmp_path / "short"))
    assert "is neither a checkpoint directory nor a Hub id" in refused(reference="./nowhere")


def test_damaged_shards(refused, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    content = (folder / "val-00000.npy").read_bytes()
    (folder / "val-00000.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "val-00000.npy is not the shard that meta.json describes: its SHA-256 differs" in refused(text=str(folder))
    ids = np.load(shards / "val-00000.npy")
    ids[3] = 600
    np.save(folder / "val-00000.npy", ids)
    meta = read_json(folder / "meta.json")
    meta["shards"]["val-00000.npy"]["sha256"] = digest([folder / "val-00000.npy"])
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "holds the token id 600, but the vocabulary has 512 tokens" in refused(text=str(folder))


def test_losses_that_would_be_lost(done, refused, checkpoint, tmp_path):
    for path in done[0].iterdir():
        shutil.copy(path, tmp_path)
    assert "losses-text.json has results of 7 items, which would be replaced by those of 3: remove this file, or" in \
        refused(limit=3)
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": f"Text {number} of eight."}) + "\n" for number in range(8)))
    assert "losses-text.json has the losses of another text, which would be replaced: choose another --out" in \
        refused(text=str(text))
    assert "losses-text.json has a KL divergence, which would be lost: give --reference, or choose another" in \
        refused(reference=None, text_length=WINDOW // 2)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    save_file(dict(random_model(seed=2).named_parameters()), other / "model.safetensors")
    assert "has results of other weights: remove this file, or choose another --out" in refused(checkpoint=str(other))


@pytest.mark.parametrize("change", [
    {"loss": 1.0}, {"kl": None}, {"bits_per_byte": "many"}, {"samples": 6}, {"name": "empd"}, {"kind": "text"},
    {"items": {}}, {"items": {"nll": [-1.0]}}, {"items": {"nll": None}}, {"items": {"kl": None}},
    {"items": {"tokens": [0]}}, {"items": {"bytes": [True]}}, {"items": {"nll": [1e308, 1e308]}}, {"run": 3},
    {"run": "removed"}, {"loss": "removed"}, {"items": "removed"}])
def test_damaged_losses(change, done, refused, tmp_path):
    path = tmp_path / "losses-task-simp.json"
    content = read_json(done[0] / path.name)
    if isinstance(change.get("items"), dict) and change["items"]:
        name, values = *change["items"], *change["items"].values()
        values = values if values is None else values + content["items"][name][len(values):]
        change = {"items": content["items"] | {name: values}}
    path.write_text(json.dumps({key: value for key, value in (content | change).items() if value != "removed"}))
    line = refused()
    assert line.startswith(str(path))
    assert line.endswith(": remove this file, or choose another --out")


@pytest.mark.parametrize("name", ["nll", "kl"])
def test_numbers_that_are_not_finite_are_not_written(name, tmp_path):
    items = {"nll": [1.0, 2.0], "tokens": [1, 2], "bytes": [3, 4], "kl": [0.1, 0.2]}
    with pytest.raises(UserError, match="was not written: the results hold numbers that are not finite"):
        write_losses(tmp_path, "text", "text", items | {name: [1.0, math.nan]}, {})
    assert not list(tmp_path.iterdir())
    written = write_losses(tmp_path, "simp", "task", items, {"dtype": "fp32"})
    assert read_losses(tmp_path) == [written]
    assert (written["loss"], written["kl"]) == (1.0, pytest.approx(0.1))
    assert written["bits_per_byte"] == pytest.approx(3 / math.log(2) / 7)


def test_contradictions(refusal):
    line = refusal((EvaluateConfig, None), "--checkpoint", "x", "--reference", "y", "--text_length", "0")
    assert "--reference needs --text or --tasks" in line
    assert "text_length is 0" in line
    line = refusal((EvaluateConfig, None), "--checkpoint", "x", "--suite", "y", "--text_length", "8")
    assert "text_length is that of windows of a text: give --text" in line
    line = refusal((EvaluateConfig, None), "--checkpoint", "x", "--text", "y", "--posterior_samples", "2",
                   "--suite_files", "z")
    assert "posterior_samples is for benchmarks: give --suite; suite_files is for benchmarks: give --suite" in line
