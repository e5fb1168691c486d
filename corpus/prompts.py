"""The prompts of fine-tuning: the text around a source, and the token that ends a reply."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.files import UserError
from common.provenance import TemplateName
from model.tokenizer import Tokenizer

# The Alpaca prompt (Taori et al., 2023). A source that already ends with the marker is used as the whole prompt.
RESPONSE = "### Response:"

PROMPT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
          "Write a response that appropriately completes the request.\n\n{source}\n\n" + RESPONSE)

SOURCE, REPLY = "SOURCE_TEXT", "REPLY_TEXT"  # stand for a source and its reply in a rendered chat


@dataclass(frozen=True)
class PromptTemplate:
    """A template that turns a source into a prompt, and a target into a reply."""
    tokenizer: Tokenizer
    render: Callable[[str], str]  # returns the prompt of a source
    bos: Sequence[int]  # token ids that precede the prompt
    ending: str | None  # the text of the prompt after the source; None: the source is the whole prompt
    beginning: str  # the text of the reply before the target
    trailing: str  # the text of the reply after the target, before the token that ends it
    end_id: int | None  # the token that ends the reply
    follows_prompt: bool  # whether a reply is tokenized together with its prompt

    def check_length(self, max_length: int) -> None:
        """Raises UserError if prompts of `max_length` tokens have no room for a source."""
        if (size := len(self.bos) + len(self.tokenizer.encode(self.render("x")))) > max_length:
            raise UserError(f"max_source_length is {max_length}, but the template needs {size} tokens with a source of "
                            "one letter: raise it")

    def encode_prompts(self, sources: Sequence[str], max_length: int) -> list[list[int]]:
        """Returns the token ids of the prompt of each source, at most `max_length` of them.

        A long prompt loses the end of its source but keeps what follows it; without the marker of the response, the
        model would continue the source. A source that is the whole prompt loses its beginning. Raises UserError if
        there is no room for a source.
        """
        return self.truncate(self.tokenizer.encode_batch(list(map(self.render, sources))), max_length)

    def encode_samples(self, sources: Sequence[str], targets: Sequence[str],
                       max_length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Returns the token ids of the prompts, as `encode_prompts`, and of the replies, without the token that ends
        them.

        In a chat the ids of a reply are those that follow the prompt in the conversation. They differ from those of
        the target alone where a tokenizer marks the beginning of a text.
        """
        texts = list(map(self.render, sources))
        prompts = self.tokenizer.encode_batch(texts)
        answers = [self.beginning + target + self.trailing for target in targets]
        replies = self.tokenizer.encode_batch(answers)
        if self.follows_prompt:
            together = self.tokenizer.encode_batch([text + answer for text, answer in zip(texts, answers)])
            replies = [ids[len(prompt):] if ids[:len(prompt)] == prompt else alone
                       for prompt, ids, alone in zip(prompts, together, replies)]
        return self.truncate(prompts, max_length), replies

    def truncate(self, prompts: Sequence[list[int]], max_length: int) -> list[list[int]]:
        """Returns prompts with bos, cut to `max_length` tokens. Raises UserError if one has no tokens."""
        self.check_length(max_length)
        bos = list(self.bos)
        prompts = [ids if ids[:len(bos)] == bos else bos + ids for ids in prompts]
        if not all(prompts):
            raise UserError("the input of an item is empty, and this tokenizer has no token that begins a text: remove "
                            "the item, or use --template alpaca")
        if self.ending is None:
            return [ids if len(ids) <= max_length else bos + ids[len(bos) - max_length:] for ids in prompts]
        start, whole = self.tokenizer.encode_batch(["x", "x" + self.ending])  # the ending as it follows a source
        ending = whole[len(start):] if whole[:len(start)] == start else self.tokenizer.encode(self.ending)
        return [ids if len(ids) <= max_length else ids[:max_length - len(ending)] + ending for ids in prompts]


def open_template(name: TemplateName, tokenizer: Tokenizer) -> PromptTemplate:
    """Returns the Alpaca prompt, the source alone ("plain"), or the prompt of the tokenizer's chat template, with the
    source as the user's message.

    Raises UserError if there is no chat template, or if it does not end its replies with an end-of-text token.
    """
    if name in WITHOUT_CHAT:
        render_prompt, ending = WITHOUT_CHAT[name]
        return PromptTemplate(
            tokenizer, render=render_prompt, bos=[] if tokenizer.bos_id is None else [tokenizer.bos_id], ending=ending,
            beginning="", trailing="", end_id=tokenizer.eos_id, follows_prompt=False)
    if not tokenizer.fast:
        raise UserError(f"{tokenizer.directory}: a chat template needs tokenizer.json; with tokenizer.model alone, "
                        "special tokens in a text are plain text")
    from model.chat_template import ChatTemplate  # importing jinja2 takes a tenth of a second
    chat = ChatTemplate(tokenizer)

    def render(source: str) -> str:
        return chat.render([{"role": "user", "content": source}], add_generation_prompt=True)

    prompt = render(SOURCE)
    answered = chat.render([{"role": "user", "content": SOURCE}, {"role": "assistant", "content": REPLY}])
    beginning, reply, end = answered.removeprefix(prompt).partition(REPLY)
    if SOURCE not in prompt or not answered.startswith(prompt) or not reply:
        raise UserError(f"{tokenizer.directory}: with the chat template a reply does not continue the prompt "
                        f"{prompt[-60:]!r}: use --template alpaca")
    end_ids = [index for index in tokenizer.encode(end) if index in tokenizer.eos_ids]
    if end.strip() and not end_ids:
        raise UserError(f"{tokenizer.directory}: the chat template ends a reply with {end[:60]!r} (ids "
                        f"{tokenizer.encode(end)[:9]}), which holds no end-of-text token: add it to eos_token_id in "
                        "generation_config.json")
    trailing, is_named, _ = end.partition(tokenizer.token(end_ids[0])) if end_ids else ("", "", "")
    return PromptTemplate(
        tokenizer, render=render, bos=[], ending=prompt.rpartition(SOURCE)[2], beginning=beginning,
        trailing=trailing if is_named else "", end_id=end_ids[0] if end_ids else tokenizer.eos_id, follows_prompt=True)


def alpaca_prompt(source: str) -> str:
    """Returns the Alpaca prompt of a source."""
    return source if source.rstrip().endswith(RESPONSE) else PROMPT.format(source=source)


# `render` and `ending` of the templates without a chat, see PromptTemplate.
WITHOUT_CHAT: dict[TemplateName, tuple[Callable[[str], str], str | None]] = {
    "alpaca": (alpaca_prompt, "\n\n" + RESPONSE), "plain": (lambda source: source, None)}
