"""One tokenizer class for both file formats of checkpoints: `tokenizer.json` and `tokenizer.model`."""
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import JSON_NAMES, UserError, digest, first_line, read_json
from common.writing import explain_os_errors, write_json
from model.config import special_id_problems

# All tokenizer files of a checkpoint directory. They are copied to every checkpoint made from it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")

# Classes of tokenizer_config.json whose tokenizers have no bos unless the file names one, whatever config.json says:
# transformers writes `bos_token_id` 1 into the config.json of models whose tokenizer has none.
GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")

# Fields of an entry of added_tokens_decoder: how the token is matched.
TOKEN_OPTIONS = "single_word", "lstrip", "rstrip", "normalized", "special"

# The trainer cuts longer words: its time is quadratic in the length of a word.
MAX_TRAINING_WORD = 256


class Tokenizer:
    """Encodes text to token ids and decodes them, with the tokenizer of a checkpoint directory.

    `bos_id`, `eos_id`, `pad_id` and `unk_id` are None if the directory names no such token. `eos_ids` are all ids that
    end a text: those in `generation_config.json` and `config.json` precede the token in `tokenizer_config.json`,
    because decoding stops at them. `eos_id` is the tokenizer's own token if it is one of them, otherwise the first.
    `bos_id` is the tokenizer's own token, too. If `tokenizer_config.json` says null, as with Qwen, or says nothing and
    names a class without a bos of its own, it is None, or what the post-processor of tokenizer.json puts before a text.
    Raises UserError if there is no tokenizer file or it cannot be read.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        fast, spm = self.directory / "tokenizer.json", self.directory / "tokenizer.model"
        if not fast.exists() and not spm.exists():
            raise UserError(f"{directory} holds no tokenizer: expected tokenizer.json or tokenizer.model")
        self.fast: Any = None  # a tokenizers.Tokenizer
        self.spm: Any = None  # a SentencePieceProcessor
        with library_errors(f"{fast if fast.exists() else spm} cannot be read"):
            if fast.exists():
                import tokenizers
                self.fast = tokenizers.Tokenizer.from_file(str(fast))
                self.fast.no_truncation()
                self.fast.no_padding()
                self._add_tokens()
            else:
                import sentencepiece
                self.spm = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        ids = {name: self._special_ids(name) for name in ("bos", "eos", "pad", "unk")}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (values[0] if values else None for values in ids.values())
        self.eos_ids = set(ids["eos"])
        if (own := self.own_id("eos")) in self.eos_ids:
            self.eos_id = own
        config = self._read("tokenizer_config.json")
        if "bos_token" in config or fast.exists() and config.get("tokenizer_class") in GENERAL_CLASSES:
            self.bos_id = self._first_id() if (own := self.own_id("bos")) is None else own
        self._special = {index for values in ids.values() for index in values}

    def _add_tokens(self) -> None:
        """Adds the tokens that the list in tokenizer_config.json has beyond those of tokenizer.json, or with other
        options, as transformers does."""
        from tokenizers import AddedToken
        file = self.directory / "tokenizer_config.json"
        entries = self._entry(file.name, "added_tokens_decoder", dict) or {}
        known, added = {token.content: token for token in self.fast.get_added_tokens_decoder().values()}, []
        ids: dict[str, str] = {}  # of the tokens that are new to the vocabulary
        for index, entry in sorted(entries.items(), key=lambda item: (len(item[0]), item[0])):
            if not (isinstance(entry, dict) and isinstance(content := entry.get("content"), str)):
                raise UserError(f"{file}: added_tokens_decoder has {entry!r:.80}, expected an object with content")
            token = AddedToken(content, **{name: entry[name] for name in TOKEN_OPTIONS if name in entry})
            if content and known.get(content) != token:
                added.append(token)
                if self.fast.token_to_id(content) is None:
                    ids.setdefault(content, index)
        self.fast.add_tokens(added)
        for content, index in ids.items():
            if str(found := self.fast.token_to_id(content)) != index:
                raise UserError(f"{file}: the added token {content!r:.80} has the id {index:.20}, but would have "
                                f"{found} in tokenizer.json: the two files are not of the same tokenizer")

    @property
    def adds_bos(self) -> bool:
        """Whether bos is prepended to the ids of a text: by the post-processor of tokenizer.json, as in transformers 5,
        or for a tokenizer.model by `add_bos_token` in tokenizer_config.json, which defaults to true, as in transformers
        4, with which models of this kind were made (in transformers 5 to false)."""
        if self.fast:
            return self.bos_id is not None and self._first_id() == self.bos_id
        return self.bos_id is not None and self._entry("tokenizer_config.json", "add_bos_token", bool) is not False

    @property
    def start_id(self) -> int:
        """The id that precedes a text without a context: bos, or the end-of-text token if there is no bos. Raises
        UserError if there is neither."""
        start = self.eos_id if self.bos_id is None else self.bos_id
        if start is None:
            raise UserError(f"{self.directory} names neither a bos nor an end-of-text token: one of them begins a text")
        return start

    @property
    def vocab_size(self) -> int:
        """The largest id of the tokenizer, special ids included, plus one. The vocabulary of a model may be larger, but
        not smaller."""
        largest = max(self.fast.get_vocab().values(), default=-1) if self.fast else self.spm.vocab_size() - 1
        return max({largest, *self._special}) + 1

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of many texts, encoded in parallel if the library supports it."""
        with library_errors(f"{self.directory}: the tokenizer fails"):
            if self.fast:
                return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
            return self.spm.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids. Skips special tokens and ids that the tokenizer does not have."""
        with library_errors(f"{self.directory}: the tokenizer fails"):
            if self.fast:
                return self.fast.decode(ids, skip_special_tokens=True)
            return self.spm.decode([index for index in ids
                                    if index < self.spm.vocab_size() and index not in self._special])

    def special_ids(self, texts: Collection[str]) -> set[int]:
        """Returns the ids of the special tokens that have one of these texts."""
        special = self._special if self.fast is None else {
            index for index, token in self.fast.get_added_tokens_decoder().items() if token.special}
        return {index for index in special if self.token(index) in texts}

    def token(self, index: int) -> str:
        """Returns the text of one token, which may be a special token. Raises UserError if there is no such token."""
        with library_errors(f"{self.directory}: the tokenizer fails"):
            if self.fast:
                text = self.fast.id_to_token(index)
            elif index < self.spm.vocab_size():
                text = self.spm.id_to_piece(index)
            else:
                text = next((added for added, value in self._read("added_tokens.json").items() if value == index), None)
        if text is None:
            raise UserError(f"{self.directory}: the tokenizer has no token with the id {index}, which is named as a "
                            "special token")
        return text

    def _read(self, file: str) -> dict[str, Any]:
        path = self.directory / file
        return read_json(path, dict) if path.exists() else {}

    def _entry(self, file: str, name: str, *kinds: type) -> Any:
        """Returns an entry of a JSON file, None without one. Raises UserError if it is not of one of the types."""
        value = self._read(file).get(name)
        if value is not None and type(value) not in kinds:
            expected = " or ".join(JSON_NAMES[kind] for kind in kinds)
            raise UserError(f"{self.directory / file}: {name} is {value!r:.80}, expected {expected}")
        return value

    def _special_ids(self, name: str) -> list[int]:
        """Returns the ids of a special token, such as "eos", from the first file that names it: generation_config.json
        or config.json, which may list several ids, or the tokenizer's own files. Empty if none does.

        Raises UserError for an invalid id, and for a token other than pad that is not in the vocabulary.
        """
        for file in ("generation_config.json", "config.json"):
            if (index := self._read(file).get(f"{name}_token_id")) not in (None, -1):  # -1: none, see ModelConfig
                if problems := special_id_problems(f"{name}_token_id", index):
                    raise UserError(f"{self.directory / file}: {problems[0]}")
                return index if isinstance(index, list) else [index]
        for file, token in self._own_tokens(name):
            if (index := self._token_id(token)) is not None:
                return [index]
            if name != "pad":  # which transformers adds, and nothing here needs
                raise UserError(f"{self.directory / file}: {name}_token {token!r:.80} is not in the vocabulary")
        index = getattr(self.spm, f"{name}_id")() if self.spm else -1
        return [index] if index >= 0 else []

    def _own_tokens(self, name: str) -> Iterator[tuple[str, str]]:
        """Yields the files of the tokenizer that name a special token, and the token."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (token := self._entry(file, f"{name}_token", str, dict)) is not None:
                token = token.get("content") if isinstance(token, dict) else token
                if not isinstance(token, str):
                    raise UserError(f"{self.directory / file}: {name}_token {token!r:.80} is not in the vocabulary")
                yield file, token

    def named_tokens(self) -> dict[str, str]:
        """Returns the special tokens that the tokenizer's files name, such as {"cls_token": "[CLS]"}."""
        found = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            for name, token in self._read(file).items():
                token = token.get("content") if isinstance(token, dict) else token
                if name.endswith("_token") and isinstance(token, str):
                    found[name] = token
        return found

    def own_id(self, name: str) -> int | None:
        """Returns the id of a special token that the tokenizer's files name; None for one that is not in the
        vocabulary."""
        return next((self._token_id(token) for _, token in self._own_tokens(name)), None)

    def _first_id(self) -> int | None:
        """Returns the id that the post-processor of tokenizer.json puts before every text, or None."""
        with library_errors(f"{self.directory}: the tokenizer fails"):
            return next(iter(self.fast.encode("").ids), None) if self.fast else None

    def _token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None for an unknown token, for which sentencepiece itself returns unk."""
        with library_errors(f"{self.directory}: the tokenizer fails"):
            if self.fast:
                return self.fast.token_to_id(token)
            index = self.spm.piece_to_id(token)
            return index if self.spm.id_to_piece(index) == token else self._entry("added_tokens.json", token, int)


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turns an error of tokenizers or sentencepiece into a UserError that begins with `message`."""
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, MemoryError, SystemExit, UserError):
        raise
    except BaseException as error:  # Exception, RuntimeError, or a panic of Rust code, which is only a BaseException
        raise UserError(f"{message}: {first_line(error):.200}") from error


def copy_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Copies the tokenizer files of one checkpoint directory into another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            content = (Path(source) / name).read_bytes()
            with explain_os_errors(Path(directory) / name):
                (Path(directory) / name).write_bytes(content)


def copy_special_ids(source: str | Path, directory: str | Path) -> None:
    """Writes the ids of bos and eos that only the config.json of a checkpoint names to the generation_config.json of a
    copy of its tokenizer, which has no config.json."""
    theirs, ours = Tokenizer(source), Tokenizer(directory)
    if (theirs.bos_id, theirs.eos_ids) != (ours.bos_id, ours.eos_ids):
        path, config = Path(directory) / "generation_config.json", read_json(Path(source) / "config.json", dict)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
        write_json(path, ids | (read_json(path, dict) if path.exists() else {}))


def tokenizer_digest(directory: str | Path) -> str:
    """Returns the SHA-256 of the tokenizer files of a checkpoint directory."""
    return digest([path for name in TOKENIZER_FILES if (path := Path(directory) / name).exists()])


def same_tokenizer(first: str | Path, second: str | Path) -> bool:
    """Returns whether two directories hold the same tokenizer file, byte for byte."""
    name = next(name for name in TOKENIZER_FILES if (Path(first) / name).exists())
    return (Path(second) / name).exists() and (Path(first) / name).read_bytes() == (Path(second) / name).read_bytes()


def train_tokenizer(documents: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Trains a byte-level BPE tokenizer and writes it into a folder. <unk>, <s> and </s> are ids 0, 1 and 2, as in
    Llama. Words are cut at MAX_TRAINING_WORD bytes in training, and nowhere else.

    <s> is reserved and not named as bos: in pretraining, documents are separated by </s> alone, so a model would begin
    a text with a token that separates nothing. A text that spells out <s> or </s> gets their ids, as in transformers.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    special = ["<unk>", "<s>", "</s>"]
    fast = Fast(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(MAX_TRAINING_WORD)])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=sys.stderr.isatty(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(documents, trainer)
    fast.pre_tokenizer = byte_level
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": special[0], "eos_token": special[2],
        "clean_up_tokenization_spaces": False})
    return Tokenizer(folder)
