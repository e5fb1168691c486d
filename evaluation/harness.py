"""The model in lm-eval's terms."""
import dataclasses
import json
from array import array

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from common.files import UserError
from model.generation import GenerationConfig

MAX_NEW_TOKENS = 256  # of a generation that says no number, as in lm-eval's own backend

ENCODED_AT_ONCE = 1000  # texts


class HarnessModel(TemplateLM):
    """Our model in lm-eval's terms: texts in, log-likelihoods and texts out, exactly as lm-eval's Hugging Face backend
    tokenizes, truncates and cuts them."""

    def __init__(self, scorer):
        super().__init__()
        self.scorer, self.text_tokenizer = scorer, scorer.tokenizer
        self.max_length = scorer.model.config.max_position_embeddings

    @property
    def eot_token_id(self):
        """The token that ends a text."""
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self):
        """The token that a text without a context follows."""
        return self.eot_token_id if self.text_tokenizer.bos_id is None else self.text_tokenizer.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Token ids of one text."""
        return self.encode([string], add_special_tokens)[0]

    def encode(self, texts, add_special_tokens=None):
        """Token ids of texts; bos comes first where the tokenizer adds one and the text does not begin with it."""
        ids = self.text_tokenizer.encode_batch(texts)
        if add_special_tokens is False or not self.text_tokenizer.adds_bos:
            return ids
        bos = self.text_tokenizer.bos_id
        written = self.text_tokenizer.token(bos)
        return [one if add_special_tokens is None and text.startswith(written) else [bos, *one]
                for text, one in zip(texts, ids)]

    def loglikelihood(self, requests, disable_tqdm=False):
        """As TemplateLM does it, with the texts tokenized in batches, and each context once."""
        pairs, encoded, split = [request.args for request in requests], {}, []
        for start in range(0, len(pairs), ENCODED_AT_ONCE):
            split += self._encode_pairs(pairs[start:start + ENCODED_AT_ONCE], encoded)
        return self._loglikelihood_tokens(split)

    def _encode_pairs(self, pairs, encoded):
        """(pair, its context's token ids, its continuation's) of pairs of texts; encoded: ids of contexts so far.

        The ids are arrays: the requests of a large suite hold hundreds of millions.
        """
        moved = []  # white space at the end of a context is tokenized with the continuation
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept):] + continuation))
        new = list(dict.fromkeys(context for context, _ in moved if context not in encoded))
        encoded.update(zip(new, (array("I", ids) for ids in self.encode(new))))
        whole = self.encode([context + continuation for context, continuation in moved])
        bare = iter(self.encode([text for context, text in moved if not context], False))
        for pair, (context, _), ids in zip(pairs, moved, whole):
            if context:
                yield pair, encoded[context], array("I", ids[len(encoded[context]):])
            else:
                ids = next(bare)
                ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
                yield pair, array("I", [self.prefix_token_id]), array("I", ids)

    def _loglikelihood_tokens(self, requests, **_):
        for (context, continuation), _, ids in requests:
            if not ids:
                raise UserError(f"an empty continuation has no log-likelihood; its context is {context[-60:]!r}")
            if len(ids) > self.max_length:
                raise UserError(f"a continuation of {len(ids):,} tokens is longer than the model's context of "
                                f"{self.max_length:,}: {' '.join(continuation.split())[:60]!r}…")
        return self.scorer.log_likelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of whole texts, in windows of the context's length that do not overlap."""
        windows, owners = [], []
        for index, ids in enumerate(self.encode([request.args[0] for request in requests])):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(index)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [value for value, _ in self.scorer.log_likelihoods(windows)])
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm=False):
        """Texts up to the first of each request's stop strings; those with like settings are decoded together."""
        texts, groups = [None] * len(requests), {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        for indices in groups.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], MAX_NEW_TOKENS)
            stops = handle_stop_sequences(options.pop("until", None), self.text_tokenizer.token(self.eot_token_id))
            decoding = harness_decoding(options)
            room = self.max_length - decoding.max_new_tokens
            if room < 1:
                raise UserError(f"{decoding.max_new_tokens:,} new tokens leave no room for a prompt in the model's "
                                f"context of {self.max_length:,}")
            prompts = [ids[-room:] or [self.prefix_token_id]
                       for ids in self.encode([requests[index].args[0] for index in indices])]
            for index, ids in zip(indices, self.scorer.generate(prompts, decoding, tuple(stops))):
                texts[index] = postprocess_generated_text(self.text_tokenizer.decode(ids), stops, None)
        return texts


def harness_decoding(options):
    """The decoding of lm-eval's generation settings; what is not implemented is refused by name."""
    options = {name: value for name, value in options.items() if value is not None}
    chosen = {"max_new_tokens": options.pop("max_gen_toks")}
    if not options.get("do_sample"):
        options.pop("temperature", None)
    names = {entry.name for entry in dataclasses.fields(GenerationConfig)}
    if unknown := sorted(options.keys() - names):
        raise UserError(f"lm-eval asks for generation settings that are not implemented: {', '.join(unknown)}")
    decoding = GenerationConfig(**chosen | options)
    if problems := decoding.problems():
        raise UserError("lm-eval's generation settings: " + "; ".join(problems))
    return decoding
