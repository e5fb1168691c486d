"""Tokenization compared with transformers."""
import json
import shutil
import time
from unittest import mock

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from common.files import UserError
from model.tokenizer import Tokenizer, copy_special_ids, copy_tokenizer, train_tokenizer
from tests.conftest import sample_texts


@pytest.fixture(scope="module")
def texts():
    extra = ["", " two  spaces ", "line\nbreak\t tab", "naïve café — 東京 🙂", "</s> inside", "x" * 300]
    return sample_texts("simp") + sample_texts("empd") + sample_texts("inqqg") + extra


@pytest.fixture(scope="module")
def spm_dir(tmp_path_factory, texts):
    """A directory with a SentencePiece model like that of Llama: BPE, byte fallback, a dummy prefix."""
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=800, model_type="bpe",
        byte_fallback=True, character_coverage=0.999, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    return folder


def test_tokenizer_json_equals_transformers(tokenizer_dir, texts):
    ours, theirs = Tokenizer(tokenizer_dir), AutoTokenizer.from_pretrained(tokenizer_dir)
    assert len(texts) > 450
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.encode_batch(texts) == expected
    assert [ours.encode(text) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (0, 1, 2, None, len(theirs))


def test_bos_and_eos(tokenizer_dir, spm_dir, tmp_path):
    assert not Tokenizer(tokenizer_dir).adds_bos
    assert Tokenizer(spm_dir).adds_bos
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tokenizer_dir / "tokenizer_config.json", tmp_path)
    assert Tokenizer(tmp_path).adds_bos
    assert [Tokenizer(tmp_path).token(index) for index in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert [Tokenizer(spm_dir).token(index) for index in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert set(Tokenizer(tmp_path).eos_ids) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert set(Tokenizer(tmp_path).eos_ids) == {7, 2}


def test_sentencepiece_equals_transformers(spm_dir, texts):
    ours, theirs = Tokenizer(spm_dir), LlamaTokenizer.from_pretrained(spm_dir)
    # transformers 5 differs from sentencepiece on these texts: it reads "</s>" in a text as the end token, and adds no
    # dummy prefix to a text that begins with a space.
    texts = [text for text in texts if "</s>" not in text and not text.startswith(" ")]
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert sum(map(len, expected)) > 10_000
    assert ours.encode_batch(texts) == expected
    assert [ours.encode(text) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (0, 1, 2, None, 800)


def test_a_bos_that_only_config_json_names(tokenizer_dir, tmp_path):
    """transformers writes bos_token_id 1 for every Llama, and no key into the file of a tokenizer without bos."""
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    for added, expected in (({}, None), ({"bos_token": "<s>"}, 1)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | added))
        assert Tokenizer(tmp_path).bos_id == AutoTokenizer.from_pretrained(tmp_path).bos_token_id == expected


@pytest.mark.parametrize(("config", "generation"), [
    ({"eos_token_id": 2}, None), ({"bos_token_id": 1, "eos_token_id": [2, 0]}, {"temperature": 0.6}),
    ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": 0}), ({}, None)])
def test_a_copy_keeps_the_ids_that_only_config_json_names(tokenizer_dir, tmp_path, config, generation):
    source, copy = tmp_path / "source", tmp_path / "copy"
    for folder in (source, copy):
        folder.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", source)
    (source / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if generation:
        (source / "generation_config.json").write_text(json.dumps(generation))
    copy_tokenizer(source, copy)
    copy_special_ids(source, copy)
    theirs, ours = Tokenizer(source), Tokenizer(copy)
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (theirs.bos_id, theirs.eos_id, theirs.eos_ids)
    assert (copy / "generation_config.json").exists() == bool(config)
    if generation:
        assert generation.items() <= json.loads((copy / "generation_config.json").read_text()).items()


def test_bos_of_the_post_processor(tokenizer_dir, tmp_path):
    """It precedes texts in transformers even if no file calls it bos."""
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a")[0] == 1
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).adds_bos, Tokenizer(tmp_path).start_id) == (1, True, 1)


def test_tokens_that_only_tokenizer_config_adds(tokenizer_dir, tmp_path):
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    path, config = tmp_path / "tokenizer_config.json", json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    options = {"lstrip": False, "normalized": False, "rstrip": True, "single_word": False}

    def write(*ids, **further):
        entries = zip(ids, ("<|im_start|>", "<tool>"), (True, False))
        added = {index: options | {"content": content, "special": special} for index, content, special in entries}
        path.write_text(json.dumps(config | {"added_tokens_decoder": added} | further))

    write("512", "513", pad_token="<|im_start|>")
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("<|im_start|> a <tool> b")
    assert ids == theirs.encode("<|im_start|> a <tool> b", add_special_tokens=False)
    assert {512, 513} <= set(ids)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) != ours.decode(ids[1:-1])
    assert (ours.vocab_size, ours.pad_id) == (len(theirs), 512)
    write(added_tokens_decoder={"1": options | {"content": "<s>", "special": False}, "7": options | {"content": ""},
                                "2": options | {"content": "</s>", "special": True, "lstrip": True},
                                "9": options | {"content": "</s>", "special": True, "lstrip": True}})
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("a  <s>  b  </s> c")
    assert ids == theirs.encode("a  <s>  b  </s> c", add_special_tokens=False)
    assert ids != Tokenizer(tokenizer_dir).encode("a  <s>  b  </s> c")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    write("512", "600")
    with pytest.raises(UserError, match="the added token '<tool>' has the id 600, but would have 513 in"):
        Tokenizer(tmp_path)
    for entry in (5, {"special": True}):
        write(added_tokens_decoder={"512": entry})
        with pytest.raises(UserError, match="added_tokens_decoder has .*, expected an object with content"):
            Tokenizer(tmp_path)
    write("512", "513", pad_token="[PAD]")
    assert Tokenizer(tmp_path).pad_id is None


def test_tokens_outside_the_vocabulary(tokenizer_dir, tmp_path):
    """They do no harm where ids are given."""
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": "", "eos_token": "<|gone|>"}))
    with pytest.raises(UserError, match="bos_token '' is not in the vocabulary"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id, Tokenizer(tmp_path).start_id) == (None, 2, 2)
    path.write_text("{}")
    (tmp_path / "config.json").unlink()
    assert (Tokenizer(tmp_path).eos_ids, Tokenizer(tmp_path).vocab_size) == (set(), 512)


def test_special_ids_come_from_the_directorys_own_files(spm_dir, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((spm_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}, "pad_token": "<unk>"}))
    assert (Tokenizer(tmp_path).eos_id, Tokenizer(tmp_path).pad_id) == (1, 0)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "pad_token_id": None}))
    assert (Tokenizer(tmp_path).eos_id, Tokenizer(tmp_path).pad_id) == (7, 0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert Tokenizer(tmp_path).eos_id == 9


def test_special_tokens_that_are_not_pieces(spm_dir, tmp_path):
    """sentencepiece returns unk for them. Fine-tuned checkpoints list them in added_tokens.json."""
    (tmp_path / "tokenizer.model").write_bytes((spm_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    assert Tokenizer(tmp_path).pad_id is None
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 800}))
    assert Tokenizer(tmp_path).pad_id == 800


def test_ids_beyond_the_tokenizer_are_skipped(spm_dir):
    """Fine-tuned checkpoints of the original tool have an additional token for padding. So are special tokens."""
    ours, theirs = Tokenizer(spm_dir), LlamaTokenizer.from_pretrained(spm_dir)
    ids = ours.encode("a small house")
    assert ours.decode([*ids, 800]) == "a small house"
    special = [1, *ids, 0, 2]
    assert ours.decode(special) == theirs.decode(special, skip_special_tokens=True) == "a small house"


@pytest.mark.parametrize(("file", "value", "said"), [
    ("tokenizer_config.json", ["</s>"], "tokenizer_config.json: expected an object, found a list"),
    ("generation_config.json", [2], "generation_config.json: expected an object, found a list"),
    ("config.json", 5, "config.json: expected an object, found a number"),
    ("special_tokens_map.json", None, "special_tokens_map.json: expected an object, found null"),
    ("generation_config.json", {"eos_token_id": "</s>"}, "generation_config.json: eos_token_id is '</s>'"),
    ("generation_config.json", {"eos_token_id": [2, -1]}, "generation_config.json: eos_token_id is [2, -1]"),
    ("generation_config.json", {"bos_token_id": [1]}, "generation_config.json: bos_token_id is [1]"),
    ("config.json", {"eos_token_id": 2.5}, "config.json: eos_token_id is 2.5"),
    ("tokenizer_config.json", {"eos_token": 5}, "tokenizer_config.json: eos_token is 5, expected text or an object"),
    ("tokenizer_config.json", {"eos_token": {"text": "</s>"}}, "tokenizer_config.json: eos_token None is not in"),
    ("added_tokens.json", {"[PAD]": "800"}, "added_tokens.json: [PAD] is '800', expected a number"),
    ("tokenizer.json", [], "tokenizer.json cannot be read"),
])
def test_files_of_another_shape(spm_dir, tmp_path, file, value, said):
    shutil.copy(spm_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 800}))
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        Tokenizer(tmp_path)
    assert said in str(error.value)


def test_add_bos_token_is_a_boolean(spm_dir, tmp_path):
    shutil.copy(spm_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": "false"}')
    with pytest.raises(UserError, match="add_bos_token is 'false', expected true or false"):
        Tokenizer(tmp_path).adds_bos  # noqa: B018
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not Tokenizer(tmp_path).adds_bos


def test_special_ids_beyond_the_pieces(spm_dir, tmp_path):
    shutil.copy(spm_dir / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 802}')
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 801}')
    ours = Tokenizer(tmp_path)
    assert ours.vocab_size == 803
    assert ours.token(801) == "<|end|>"
    with pytest.raises(UserError, match="no token with the id 802"):
        ours.token(802)


class PanicException(BaseException):
    """Derives from BaseException, as the panics of Rust code do."""


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_an_error_inside_the_library_is_one_line(tokenizer_dir, method):
    ours = Tokenizer(tokenizer_dir)
    ours.fast = mock.Mock()
    ours.fast.encode_batch_fast.side_effect = ours.fast.decode.side_effect = PanicException("index out of bounds\nmore")
    with pytest.raises(UserError) as error:
        getattr(ours, method)([1])
    assert str(error.value) == f"{tokenizer_dir}: the tokenizer fails: index out of bounds"
    ours.fast.encode_batch_fast.side_effect = ours.fast.decode.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        getattr(ours, method)([1])


def test_pieces_that_are_not_text(spm_dir, tmp_path):
    content = (spm_dir / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content.replace(b"<unk>", b"<\xebnk>"))
    with pytest.raises(UserError, match="the tokenizer fails: 'utf-8' codec can't decode"):
        Tokenizer(tmp_path).token(0)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(UserError, match="the tokenizer fails: 'utf-8' codec can't decode"):
        Tokenizer(tmp_path)


def test_a_tokenizer_is_trained_on_a_text_without_spaces(tmp_path):
    """The time of tokenizers' trainer is quadratic in the length of a word: without a limit this takes 20 seconds."""
    start = time.process_time()
    ours = train_tokenizer(["the tide " * 10, "abcd" * 50_000], 512, tmp_path)
    assert time.process_time() - start < 5
    assert ours.decode(ours.encode("abcd" * 3000)) == "abcd" * 3000
    assert (ours.unk_id, ours.bos_id, ours.eos_id) == (0, None, 2)  # pretraining has no <s>, see ShardWriter.add
    assert json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"


def test_bad_directories(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer: expected tokenizer\.json or tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


GPT4_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
PRE_TOKENIZERS = {  # of tokenizer.json; Mistral's is that of Llama 2, whose tokenizer.model is tested above
    "Llama 3, SmolLM3 and OLMo 2": (GPT4_WORDS.replace("DIGITS", r"\p{N}{1,3}"), None),
    "Qwen": (GPT4_WORDS.replace("DIGITS", r"\p{N}"), tokenizers.normalizers.NFC()),
    "SmolLM2": (None, None),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_of_families(name, texts, tmp_path):
    """Qwen has no bos, although config.json names one, and two end tokens; transformers has its own class for it."""
    pattern, normalizer = PRE_TOKENIZERS[name]
    pre, fast = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)] if pattern else
        [pre.Digits(True), pre.ByteLevel(False)])
    fast.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        fast.normalizer = normalizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [*texts, "it's 12345 o'CLOCK, we'LL see", "e\u0301 decomposed", "<|im_start|>user\nx<|im_end|>\n"]
    fast.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer" if name == "Qwen" else "PreTrainedTokenizerFast", "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": int(1e30)}))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, 2]}))
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert ours.encode_batch(texts) == expected
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
    assert (ours.bos_id, ours.eos_id, ours.eos_ids, ours.adds_bos) == (None, 2, {0, 2}, False)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (None, 2)
