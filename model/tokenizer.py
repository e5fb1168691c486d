"""One tokenizer over either file that checkpoints carry: `tokenizer.json` or `tokenizer.model`."""
import shutil
import sys
from pathlib import Path

from common.files import UserError, read_json, write_json

# Everything of a checkpoint directory that belongs to its tokenizer, copied with every checkpoint made from it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


class Tokenizer:
    """Text to token ids and back, for one checkpoint directory.

    `bos_id`, `eos_id`, `pad_id` and `unk_id` are None where the directory names no such token; `eos_ids` are all those
    that end a text, of which `eos_id` is the model's own. The ids in `generation_config.json` and `config.json` come
    before the tokens in `tokenizer_config.json`, since decoding stops at the former. Raises UserError when there is no
    tokenizer file, or one that cannot be read.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        fast, spm = self.directory / "tokenizer.json", self.directory / "tokenizer.model"
        if not fast.exists() and not spm.exists():
            raise UserError(f"{directory} holds no tokenizer: expected tokenizer.json or tokenizer.model")
        self.fast = self.spm = None
        try:
            if fast.exists():
                import tokenizers
                self.fast = tokenizers.Tokenizer.from_file(str(fast))
                self.fast.no_truncation()
                self.fast.no_padding()
            else:
                import sentencepiece
                self.spm = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError
            raise UserError(f"{fast if fast.exists() else spm} cannot be read: {error}") from None
        ids = {name: self._special_ids(name) for name in ("bos", "eos", "pad", "unk")}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (found[0] if found else None for found in ids.values())
        self.eos_ids = set(ids["eos"])

    @property
    def adds_bos(self):
        """Whether transformers begins the ids of a text with bos: the post-processor of tokenizer.json says so, and for
        a tokenizer.model `add_bos_token` of tokenizer_config.json, which is true where it is not given."""
        if self.fast:
            return self.bos_id is not None and self.fast.encode("").ids[:1] == [self.bos_id]
        path = self.directory / "tokenizer_config.json"
        return self.bos_id is not None and bool((read_json(path) if path.exists() else {}).get("add_bos_token", True))

    @property
    def vocab_size(self):
        """The largest id that encoding can give, plus one; a model's vocabulary may be larger, but not smaller."""
        return max(self.fast.get_vocab().values()) + 1 if self.fast else self.spm.vocab_size()

    def encode(self, text):
        """Token ids of a text, with no bos or eos around them."""
        return self.fast.encode(text, add_special_tokens=False).ids if self.fast else self.spm.encode(text)

    def encode_batch(self, texts):
        """Token ids of many texts, in parallel where the library can."""
        if self.fast:
            return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        return self.spm.encode(texts)

    def decode(self, ids):
        """The text of token ids; special tokens, and ids that the tokenizer does not know, leave no trace."""
        if self.fast:
            return self.fast.decode(ids, skip_special_tokens=True)
        return self.spm.decode([index for index in ids if index < self.spm.vocab_size()])

    def token(self, index):
        """The text of one token, special ones included."""
        return self.fast.id_to_token(index) if self.fast else self.spm.id_to_piece(index)

    def _special_ids(self, name):
        for file in ("generation_config.json", "config.json"):
            path = self.directory / file
            index = read_json(path).get(f"{name}_token_id") if path.exists() else None
            if index is not None:
                return index if isinstance(index, list) else [index]
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.directory / file
            token = read_json(path).get(f"{name}_token") if path.exists() else None
            if token is not None:
                token = token["content"] if isinstance(token, dict) else token
                index = self._token_id(token)
                if index is None:
                    raise UserError(f"{path}: {name}_token {token!r} is not in the vocabulary")
                return [index]
        index = getattr(self.spm, f"{name}_id")() if self.spm else -1
        return [index] if index >= 0 else []

    def _token_id(self, token):
        """The id of a token, None where there is none; sentencepiece itself answers unk for what it does not know."""
        if self.fast:
            return self.fast.token_to_id(token)
        index = self.spm.piece_to_id(token)
        if self.spm.id_to_piece(index) == token:
            return index
        added = self.directory / "added_tokens.json"
        return read_json(added).get(token) if added.exists() else None


def copy_tokenizer(source, directory):
    """Copies the tokenizer's files of one checkpoint directory into another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(directory) / name)


def same_tokenizer(first, second):
    """Whether two directories hold the same tokenizer: the same file, byte for byte, of those that Tokenizer reads."""
    name = next(name for name in TOKENIZER_FILES if (Path(first) / name).exists())
    return (Path(second) / name).exists() and (Path(first) / name).read_bytes() == (Path(second) / name).read_bytes()


def train_tokenizer(documents, vocab_size, folder):
    """Trains a byte-level BPE vocabulary on some documents; <unk>, <s> and </s> are ids 0, 1 and 2, as in Llama."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    special = ["<unk>", "<s>", "</s>"]
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=sys.stderr.isatty(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(documents, trainer)
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": special[0], "bos_token": special[1],
        "eos_token": special[2], "clean_up_tokenization_spaces": False})
    return Tokenizer(folder)
