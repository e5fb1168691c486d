"""Token shards as samples for pretraining."""
import json
import resource
from contextlib import nullcontext

import numpy as np
import pytest

from common.files import UserError, digest
from corpus import shards as module
from corpus.shards import ShardDataset, check_shards, is_held_out, shards_exist, write_shards
from model.tokenizer import Tokenizer, copy_tokenizer

DOCUMENTS = [f"Document number {n} tells of {n * n}." for n in range(400)]


def write_meta(folder, **changes):
    """Writes meta.json for the .npy files in a folder."""
    files = {path.name: {"tokens": np.load(path).size, "sha256": digest([path])} for path in folder.glob("*.npy")}
    meta = {"settings": {}, "documents": 1, "vocab_size": 512, "shards": files} | changes
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def folder(tmp_path, tokenizer_dir):
    """A directory with six train shards and one val shard."""
    folder = tmp_path / "d[1]"
    folder.mkdir()
    copy_tokenizer(tokenizer_dir, folder)
    for split, count in (("train", 6), ("val", 1)):
        for number in range(count):
            np.save(folder / f"{split}-{number:05}.npy", np.arange(number, number + 300, dtype=np.uint16))
    write_meta(folder)
    return folder


def test_samples_cover_each_token_of_the_shards_once(tmp_path):
    np.save(tmp_path / "train-00000.npy", np.arange(0, 95, dtype=np.uint16))
    np.save(tmp_path / "train-00001.npy", np.arange(1000, 1041, dtype=np.uint16))
    write_meta(tmp_path)
    data = ShardDataset(tmp_path, "train", 10)
    samples = [data[index] for index in range(len(data))]
    assert len(samples) == 9 + 4
    targets = [token for tokens, first in samples for token in tokens[first:].tolist()]
    assert targets == [*range(1, 91), *range(1001, 1041)]
    assert all(len(tokens) == 11 for tokens, _ in samples)
    with pytest.raises(UserError, match="holds no token shards val"):
        ShardDataset(tmp_path, "val", 10)
    with pytest.raises(UserError, match=r"train-\*\.npy have at most 95 tokens, and a sample has 201"):
        ShardDataset(tmp_path, "train", 200)


def test_written_shards_pass_the_check(tmp_path, tokenizer_dir):
    copy_tokenizer(tokenizer_dir, tmp_path)
    meta = write_shards(tmp_path, DOCUMENTS, Tokenizer(tmp_path), {"source": "x"})
    check_shards(tmp_path)
    assert set(meta["shards"]) == {"train-00000.npy", "val-00000.npy"}
    assert shards_exist(tmp_path, {"source": "x"})


def damaged(change):
    """A function that applies a change to the array of the third train shard."""
    def spoil(folder):
        path = folder / "train-00002.npy"
        np.save(path, change(np.load(path)))
    return spoil


def rewrite(content):
    """A function that replaces the third train shard's file, given a function of its bytes."""
    def spoil(folder):
        path = folder / "train-00002.npy"
        path.write_bytes(content(path.read_bytes()))
    return spoil


HEADERS = {  # what opening finds, in either way
    "longer": (damaged(lambda ids: np.append(ids, ids)), r"train-00002\.npy holds uint16 numbers of shape \(600,\)"),
    "two axes": (damaged(lambda ids: ids.reshape(2, 150)), r"train-00002\.npy holds uint16 numbers of shape \(2, 150"),
    "float": (damaged(lambda ids: ids.astype(np.float32)), r"train-00002\.npy holds float32 numbers"),
    "signed": (damaged(lambda ids: ids.astype(np.int16)), r"train-00002\.npy holds int16 numbers"),
    "cut": (rewrite(lambda data: data[:-1]), r"train-00002\.npy is damaged or not a NumPy array"),
    "empty": (rewrite(lambda data: b""), r"train-00002\.npy is damaged or not a NumPy array"),
    "text": (rewrite(lambda data: b"no array"), r"train-00002\.npy is damaged or not a NumPy array"),
    "header": (rewrite(lambda data: data.replace(b"{'descr'", b"{('desc")), r"train-00002\.npy is damaged"),
    "missing": (lambda folder: (folder / "train-00002.npy").unlink(),
                r"meta\.json lists shards that do not exist: train-00002\.npy"),
    "unlisted": (lambda folder: np.save(folder / "train-00006.npy", np.arange(5, dtype=np.uint16)),
                 r"meta\.json does not list the shards: train-00006\.npy"),
    "meta": (lambda folder: (folder / "meta.json").write_text("[]"), r"meta\.json: expected an object, found a list"),
    "shards": (lambda folder: write_meta(folder, shards=[]), r"meta\.json is damaged or not the description of token"),
    "names": (lambda folder: write_meta(folder, shards={"../x.npy": {"tokens": 5, "sha256": ""}}),
              r"meta\.json is damaged .*'\.\./x\.npy'"),
    "tokens": (lambda folder: write_meta(folder, shards={"train-00000.npy": {"tokens": "5", "sha256": ""}}),
               r"meta\.json is damaged .*'train-00000\.npy'"),
    "vocabulary": (lambda folder: write_meta(folder, vocab_size=512.0), r"meta\.json is damaged"),
    "settings": (lambda folder: write_meta(folder, settings=[]), r"meta\.json is damaged"),
}


@pytest.mark.parametrize(("spoil", "said"), HEADERS.values(), ids=HEADERS)
def test_shards_that_differ_from_meta_are_named(folder, spoil, said):
    check_shards(folder)
    assert len(ShardDataset(folder, "train", 10)) == 6 * 29
    spoil(folder)
    for use in (check_shards, lambda folder: ShardDataset(folder, "train", 10)):
        with pytest.raises(UserError, match=said):
            use(folder)


def test_the_content_of_shards_is_checked(folder):
    damaged(np.flip)(folder)  # only the digest shows it
    with pytest.raises(UserError, match=r"train-00002\.npy is not the shard that meta\.json describes"):
        check_shards(folder)
    damaged(lambda ids: np.where(ids == 300, 512, ids).astype(np.uint16))(folder)
    write_meta(folder)
    with pytest.raises(UserError, match=r"train-00002\.npy holds the token id 512, but the vocabulary has 512 tokens"):
        check_shards(folder)
    write_meta(folder, vocab_size=1024)
    with pytest.raises(UserError, match=r"the vocabulary has 1024 tokens, but the tokenizer has 512"):
        check_shards(folder)


def test_the_ranks_check_all_shards_together(folder):
    for number, path in enumerate(sorted(folder.glob("*.npy"))):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b"\0\0")
        for rank in range(3):
            with pytest.raises(UserError, match=path.name) if rank == number % 3 else nullcontext():
                check_shards(folder, rank, 3)
        path.write_bytes(content)


def test_shards_with_other_settings_are_not_taken(folder):
    write_meta(folder, settings={"source": "x"})
    assert shards_exist(folder, {"source": "x"})
    assert not shards_exist(folder / "nowhere", {"source": "x"})
    with pytest.raises(UserError, match="made with other settings: source is 'x' there and 'y' here"):
        shards_exist(folder, {"source": "y"})


def test_documents_need_an_end_of_text_token(tmp_path, tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    tokenizer.eos_id = None
    with pytest.raises(UserError, match="names no end-of-text token"):
        write_shards(tmp_path, DOCUMENTS, tokenizer, {"source": "x"})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_with_its_reason(tmp_path, tokenizer_dir):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_shards(tmp_path, DOCUMENTS, Tokenizer(tokenizer_dir), {"source": "x"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_too_few_documents_are_an_error(tmp_path, tokenizer_dir):
    for texts in ([], ["A text."]):
        with pytest.raises(UserError, match=f"x holds {len(texts)} documents, too few to hold out 10 per thousand"):
            write_shards(tmp_path, texts, Tokenizer(tokenizer_dir), {"source": "x"})


def test_documents_are_distributed_over_shards(tmp_path, tokenizer_dir, monkeypatch):
    """A shard ends with the 1,000 documents that reach its size."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 5000)
    texts, tokenizer = [f"Document number {n} tells of {n * n}." for n in range(2500)], Tokenizer(tokenizer_dir)
    meta = write_shards(tmp_path, texts, tokenizer, {"source": "x"})
    shards = [np.load(path) for path in sorted(tmp_path.glob("train-*.npy"))]
    ids = np.concatenate(shards)
    ends = [-1, *np.flatnonzero(ids == tokenizer.eos_id).tolist()]
    found = [tokenizer.decode(ids[start + 1:end].tolist()) for start, end in zip(ends, ends[1:])]
    assert found == [text for text in texts if not is_held_out(text)]
    assert [int((shard == tokenizer.eos_id).sum()) for shard in shards] == [
        sum(not is_held_out(text) for text in texts[start:start + 1000]) for start in (0, 1000, 2000)]
    assert meta["documents"] == 2500
