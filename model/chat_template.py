"""The chat template of a tokenizer: a Jinja template that turns messages into the text of a prompt.

It is rendered in a sandbox, with the variables and functions that transformers provides. Two differences keep prompts
short and equal from day to day: `enable_thinking` is false, so that models that can reason answer at once, and the
current date is CHAT_DATE.
"""
import datetime
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.files import UserError, first_line, read_json, read_text
from model.tokenizer import Tokenizer

CHAT_DATE = datetime.datetime(2024, 7, 26)  # the date in the template of Llama 3.1 if none is given
Messages = Sequence[dict[str, str]]  # {"role", "content"}
END = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a message; without the space if the template trims it


class GenerationTag(Extension):
    """The tags {% generation %} and {% endgeneration %} around replies, which do not change the text."""
    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The chat template of a checkpoint directory. Raises UserError if it has none, or one that is not valid."""

    def __init__(self, tokenizer: Tokenizer):
        self.directory = tokenizer.directory
        self.source = read_chat_template(tokenizer)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[GenerationTag, loopcontrols])
        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": CHAT_DATE.strftime}
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
        ids |= {name: own for name in ("eos", "pad", "unk") if (own := tokenizer.own_id(name)) is not None}
        self.variables = tokenizer.named_tokens() | {
            f"{name}_token": tokenizer.token(index) for name, index in ids.items() if index is not None}
        try:
            self.template = environment.from_string(self.source)
        except Exception as error:  # of any kind, such as recursion
            raise UserError(f"{self.directory}: the chat template is not valid: {first_line(error)}") from error

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Returns the text of messages, with the beginning of a reply if `add_generation_prompt` is set. Raises
        UserError if the template rejects them."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                        documents=None, enable_thinking=False, **self.variables)
        except Exception as error:  # of any kind: the template is a program
            raise UserError(f"{self.directory}: the chat template fails: {first_line(error):.200}") from error

    def render_open(self, messages: Messages) -> str:
        """Returns the text of messages up to the end of the last one, to be continued."""
        *earlier, last = messages
        text = self.render([*earlier, last | {"content": last["content"] + END}])
        text, end, rest = text.rpartition(END.rstrip())
        if not end:
            raise UserError(f"{self.directory}: the chat template leaves out the content of the last message")
        return text if rest.startswith(" ") else text.rstrip()


def read_chat_template(tokenizer: Tokenizer) -> str:
    """Returns the text of a checkpoint's chat template: chat_template.jinja, or the entry in tokenizer_config.json (the
    one with the name "default", if there are several)."""
    path = tokenizer.directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    config = tokenizer.directory / "tokenizer_config.json"
    template: Any = read_json(config, dict).get("chat_template") if config.exists() else None
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template
                         if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if template is None:
        raise UserError(f"{tokenizer.directory} has no chat template: use --template alpaca, or a checkpoint that was "
                        "tuned for chats")
    if not isinstance(template, str):
        raise UserError(f"{config}: chat_template is {template!r:.80}, expected text")
    return template


def raise_exception(message: str) -> None:
    """Raises TemplateError. Templates call this to reject messages."""
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Returns a value as JSON. Jinja's own filter escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
