"""The model as a language model of lm-eval."""
import functools
import json
from array import array
from collections.abc import Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from common.files import UserError
from evaluation.parallel import ParallelModel
from evaluation.test_sets import make_generation_config
from model.chat_template import ChatTemplate
from model.generation import GenerationConfig

MAX_NEW_TOKENS, TOP_K = 256, 50  # defaults of lm-eval's Hugging Face backend, and of transformers if it samples
TOKENIZER_BATCH = 1000  # texts


class HarnessModel(TemplateLM):
    """A ParallelModel as lm-eval's model: texts in, log-likelihoods and texts out.

    It tokenizes, truncates and stops exactly as lm-eval's Hugging Face backend does with single requests; in a batch,
    the backend misses stop strings that are special tokens. The backend also takes what a task does not set, such as a
    repetition penalty, from the checkpoint's generation_config.json; here all models are decoded alike.
    """

    def __init__(self, model: ParallelModel):
        super().__init__()
        self.parallel_model, self.text_tokenizer = model, model.tokenizer
        self.max_length = model.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        eos_id = self.text_tokenizer.eos_id
        assert eos_id is not None  # the checkpoint was opened with require_eos
        return eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without a context."""
        return self.text_tokenizer.start_id

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template of the tokenizer."""
        return ChatTemplate(self.text_tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in lm-eval's cache of requests."""
        return str(self.text_tokenizer.directory)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages, with the beginning of a reply, or up to the end of the last message. If the template
        rejects a system message, such as the description of a task, it is left out."""
        try:
            return self.chat.render(chat_history, True) if add_generation_prompt else \
                self.chat.render_open(chat_history)
        except UserError:
            if not (without := [message for message in chat_history if message["role"] != "system"]) or \
                    len(without) == len(chat_history):
                raise
            return self.apply_chat_template(without, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of one text."""
        return self.encode([string], add_special_tokens)[0]

    def encode(self, texts: list[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Token ids of texts. bos is prepended if the tokenizer adds it and the text does not begin with it."""
        ids, bos = self.text_tokenizer.encode_batch(texts), self.text_tokenizer.bos_id
        if add_special_tokens is False or bos is None or not self.text_tokenizer.adds_bos:
            return ids
        bos_text = self.text_tokenizer.token(bos)
        return [one if add_special_tokens is None and text.startswith(bos_text) else [bos, *one]
                for text, one in zip(texts, ids)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Same as TemplateLM.loglikelihood, but tokenizes in batches, and each context once."""
        pairs = [request.args for request in requests]
        encoded: dict[str, array] = {}
        batches = (pairs[start:start + TOKENIZER_BATCH] for start in range(0, len(pairs), TOKENIZER_BATCH))
        return self._loglikelihood_tokens([row for batch in batches for row in self._encode_pairs(batch, encoded)])

    def _encode_pairs(self, pairs: list[tuple[str, str]], encoded: dict[str, array]) -> Iterator[tuple]:
        """Yields (pair, token ids of its context, token ids of its continuation). `encoded` caches those of contexts.

        Token ids are arrays, since the requests of a large suite hold hundreds of millions.
        """
        split = []  # white space at the end of a context is tokenized with the continuation
        for context, continuation in pairs:
            stripped = context.rstrip()
            split.append((stripped, context[len(stripped):] + continuation))
        new = list(dict.fromkeys(context for context, _ in split if context not in encoded))
        encoded.update(zip(new, (array("I", ids) for ids in self.encode(new))))
        joined = self.encode([context + continuation for context, continuation in split])
        without_context = iter(self.encode([text for context, text in split if not context], False))
        for pair, (context, _), ids in zip(pairs, split, joined):
            if context:
                yield pair, encoded[context], array("I", ids[len(encoded[context]):])
            else:
                ids = next(without_context)
                ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
                yield pair, array("I", [self.prefix_token_id]), array("I", ids)

    def _loglikelihood_tokens(self, requests: list[tuple], **_: Any) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not ids:
                raise UserError(f"an empty continuation has no log-likelihood; its context is {context[-60:]!r}")
            if len(ids) > self.max_length:
                raise UserError(f"a continuation of {len(ids):,} tokens is longer than the model's context of "
                                f"{self.max_length:,}: {' '.join(continuation.split())[:60]!r}…")
        return self.parallel_model.log_likelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in disjoint windows of the context's length."""
        windows = [[make_disjoint_window(window) for window in
                    get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)]
                   for ids in self.encode([request.args[0] for request in requests])]
        scores = iter(self.parallel_model.log_likelihoods([window for text in windows for window in text]))
        return [sum((next(scores)[0] for _ in text), 0.0) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, each up to the first of its stop strings. Requests of a task with equal settings form one
        batch, so that sampled texts do not depend on the other tasks."""
        texts = [""] * len(requests)
        groups: dict[tuple[str | None, str], list[int]] = {}
        for index, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault((request.task_name, settings), []).append(index)
        for indices in groups.values():
            config, stops = generation_settings(requests[indices[0]].args[1])
            stops = handle_stop_sequences(stops, self.text_tokenizer.token(self.eot_token_id))
            check_room(config, self.max_length)
            max_prompt = self.max_length - config.max_new_tokens
            prompts = [ids[-max_prompt:] or [self.prefix_token_id]
                       for ids in self.encode([requests[index].args[0] for index in indices])]
            for index, ids in zip(indices, self.parallel_model.generate(prompts, config, tuple(stops))):
                texts[index] = postprocess_generated_text(self.text_tokenizer.decode(ids), stops, None)
        return texts


def check_room(config: GenerationConfig, max_length: int | None) -> None:
    """Raises UserError if the new tokens leave no room for a prompt in the model's context; None: any length."""
    if max_length is not None and config.max_new_tokens >= max_length:
        raise UserError(f"{config.max_new_tokens:,} new tokens leave no room for a prompt in the model's context of "
                        f"{max_length:,}")


def generation_settings(kwargs: dict[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """The GenerationConfig and the stop strings for lm-eval's generation settings.

    Raises UserError for unsupported settings.
    """
    options = {name: value for name, value in normalize_gen_kwargs(kwargs, MAX_NEW_TOKENS).items() if value is not None}
    stops, options["max_new_tokens"] = options.pop("until"), options.pop("max_gen_toks")
    if options["do_sample"]:
        options.setdefault("top_k", TOP_K)
    else:
        for name in ("temperature", "top_k", "top_p"):
            options.pop(name, None)
    return make_generation_config(options, "lm-eval's generation settings"), stops
