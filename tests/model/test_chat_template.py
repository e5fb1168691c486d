"""Chat templates compared with transformers, and the prompts of tasks that they make."""
import json

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from common.files import UserError
from corpus.prompts import open_template
from corpus.tasks import SFTDataset
from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer, copy_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "a system message by default": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
                                   "{% endif %}" + CHATML,
    "bos, trimmed content": "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n"
                            "{{ message['content'] | trim }}<|im_end|>{% endfor %}\n"
                            "{%- if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "instructions": "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] "
                    "{{ message.content }} [/INST]{% elif message.role == 'assistant' %} {{ message.content }}"
                    "{{ eos_token }}{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}{% endfor %}",
    "text before the end of a reply": "{% for message in messages %}{% if message.role == 'user' %}[INST] "
                                      "{{ message.content }} [/INST]{% else %} {{ message.content }} \" {{ eos_token }}"
                                      "{% endif %}{% endfor %}",
    "thinking": "{% for message in messages %}<|im_start|>{{ message.role }}\n"
                "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
                "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
                "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
                "{% endif %}",
    "tags and filters": "{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
                        "<|im_start|>{{ message.role }} {{ {'é': '<'} | tojson }}\n"
                        "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
                        "{% if tools is none and add_generation_prompt %}"
                        "<|im_start|>assistant {{ {'é': '<'} | tojson }}\n{% endif %}",
}
USER, REPLY = {"role": "user", "content": " Say it {{ plainly }}. "}, {"role": "assistant", "content": "It is é."}


@pytest.fixture
def chat_dir(tokenizer_dir, tmp_path):
    """A tokenizer with the special tokens of chats, of which the second ends a text."""
    fast = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    fast.add_special_tokens(SPECIAL)
    fast.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    ids = [2, fast.token_to_id("<|im_end|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return tmp_path


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES)
def folder(request, chat_dir):
    """The tokenizer with each template."""
    (chat_dir / "chat_template.jinja").write_text(request.param)
    return chat_dir


@pytest.mark.parametrize("messages", [[USER], [USER, REPLY], [USER, REPLY, USER]], ids=len)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendered_text_equals_transformers(folder, messages, add_generation_prompt):
    theirs = AutoTokenizer.from_pretrained(folder)
    text = ChatTemplate(Tokenizer(folder)).render(messages, add_generation_prompt)
    assert text == theirs.apply_chat_template(messages, tokenize=False, enable_thinking=False,
                                              add_generation_prompt=add_generation_prompt)
    assert Tokenizer(folder).encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("content", ["It is é.", "The answer is ", ""])
def test_a_message_that_is_to_be_continued(folder, content):
    theirs, messages = AutoTokenizer.from_pretrained(folder), [USER, REPLY | {"content": content}]
    assert ChatTemplate(Tokenizer(folder)).render_open(messages) == theirs.apply_chat_template(
        messages, tokenize=False, enable_thinking=False, continue_final_message=True)


def test_a_sample_is_the_conversation_up_to_the_end_of_the_reply(folder):
    tokenizer, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    source = "Say it plainly."
    messages = [{"role": "user", "content": source}, REPLY]
    (ids, first), = SFTDataset([{"input": source, "output": REPLY["content"]}], tokenizer, 200, 50, template="chat")
    prompt = theirs.apply_chat_template(messages[:1], tokenize=False, enable_thinking=False, add_generation_prompt=True)
    assert theirs.decode(ids[:first]) == prompt
    conversation = theirs.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    assert theirs.decode(ids) == conversation.rstrip()
    assert ids[-1] in tokenizer.eos_ids
    assert not any(index in tokenizer.eos_ids for index in ids[first:-1])


@pytest.mark.parametrize("normalizer", [True, False])
def test_a_reply_is_tokenized_with_its_prompt(normalizer, tmp_path):
    """A tokenizer in the manner of Llama 2 marks the beginning of a text with ▁, which a reply in a chat is not."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False, unk_token="<unk>"))
    if normalizer:
        fast.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                           tokenizers.normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.train_from_iterator(["user: say it", "fine, I say it", "okay fine"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}:{{ message.content }}{% if message.role == 'assistant' %}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (ids, first), = SFTDataset([{"input": "say it", "output": "fine"}], Tokenizer(tmp_path), 200, 50, template="chat")
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "fine"}]
    assert ids.tolist() == theirs.encode(theirs.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert 0 < first < len(ids) - 1


def test_a_chat_needs_a_tokenizer_that_knows_special_tokens(tmp_path):
    SentencePieceTrainer.train(sentence_iterator=iter(["say it plainly"] * 9), model_prefix=str(tmp_path / "tokenizer"),
                               vocab_size=20, model_type="bpe", minloglevel=2)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(UserError, match="a chat template needs tokenizer.json"):
        open_template("chat", Tokenizer(tmp_path))


def test_a_template_that_is_not_text(chat_dir):
    (chat_dir / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja is not UTF-8 text"):
        ChatTemplate(Tokenizer(chat_dir))


def test_a_long_source_is_cut_and_keeps_what_ends_it_and_a_long_target_has_no_end(chat_dir):
    (chat_dir / "chat_template.jinja").write_text(TEMPLATES["thinking"])
    tokenizer = Tokenizer(chat_dir)
    items = [{"input": "x " * 500, "output": "y " * 500}]
    (ids, first), = SFTDataset(items, tokenizer, 60, 40, template="chat")
    assert (len(ids), first) == (100, 60)
    assert ids[60:].tolist() == tokenizer.encode("y " * 500)[:40]
    ending = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert ids[60 - len(ending):60].tolist() == ending
    with pytest.raises(UserError, match="max_source_length is 16, but the template needs .. tokens with a source of"):
        open_template("chat", tokenizer).encode_prompts(["x"], 16)


def test_special_tokens_of_a_template_are_those_of_the_tokenizer(chat_dir):
    """Not those whose ids the files of the model name."""
    config = json.loads((chat_dir / "tokenizer_config.json").read_text())
    (chat_dir / "tokenizer_config.json").write_text(json.dumps(config | {
        "pad_token": "<|im_start|>", "cls_token": "<s>", "image_token": {"content": "[INST]"}}))
    (chat_dir / "config.json").write_text(json.dumps({"model_type": "llama", "pad_token_id": 0, "eos_token_id": 2}))
    (chat_dir / "generation_config.json").unlink()
    (chat_dir / "chat_template.jinja").write_text("{{ bos_token }} {{ eos_token }} {{ pad_token }} {{ unk_token }} "
                                                  "{{ cls_token }}")
    theirs = AutoTokenizer.from_pretrained(chat_dir).apply_chat_template([USER], tokenize=False)
    assert ChatTemplate(Tokenizer(chat_dir)).render([USER]) == theirs == "<s> <|im_end|> <|im_start|> <unk> <s>"
    assert Tokenizer(chat_dir).named_tokens()["image_token"] == "[INST]"


def test_the_date_does_not_change(chat_dir):
    (chat_dir / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}")
    assert ChatTemplate(Tokenizer(chat_dir)).render([USER]) == "26 July 2024"


def test_places_of_a_template(chat_dir):
    path = chat_dir / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "one"}))
    assert ChatTemplate(Tokenizer(chat_dir)).source == "one"
    path.write_text(json.dumps(config | {"chat_template": [{"name": "tool_use", "template": "two"},
                                                           {"name": "default", "template": "three"}]}))
    assert ChatTemplate(Tokenizer(chat_dir)).source == "three"
    (chat_dir / "chat_template.jinja").write_text("four")
    assert ChatTemplate(Tokenizer(chat_dir)).source == "four"


@pytest.mark.parametrize(("template", "said"), [
    (None, "has no chat template: use --template alpaca"),
    (5, "chat_template is 5, expected text"),
    ([{"name": "rag", "template": "x"}], "has no chat template"),
    ("{% for %}", "the chat template is not valid: Expected"),
    ("{{ raise_exception('only pairs') }}", "the chat template fails: only pairs"),
    ("{{ messages[7].role.x }}", "the chat template fails"),
    ("{{ messages.append(1) }}", "the chat template fails"),
    ("{{ ''.__class__.__mro__ }}", "the chat template fails"),
    ("hello", "with the chat template a reply does not continue the prompt 'hello'"),
    ("{% for message in messages %}{{ message.content }}[/INST]{% endfor %}",
     "ends a reply with '[/INST]' (ids [515]), which holds no end-of-text token: add it to eos_token_id"),
    ([{"name": ["x"], "template": "y"}], "has no chat template"),
    ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "the chat template is not valid"),
    ("{{ " + "9" * 5000 + " }}", "the chat template is not valid"),
])
def test_templates_that_cannot_be_used(chat_dir, template, said):
    path = chat_dir / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(UserError) as error:
        open_template("chat", Tokenizer(chat_dir))
    assert said in str(error.value)


def test_the_end_of_a_reply_may_be_a_token_of_the_vocabulary(chat_dir):
    """Whose name in a byte-level tokenizer is not its text."""
    newline, = Tokenizer(chat_dir).encode("\n")
    (chat_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [newline]}))
    (chat_dir / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    (ids, first), = SFTDataset([{"input": "say", "output": "yes"}], Tokenizer(chat_dir), 200, 50, template="chat")
    assert Tokenizer(chat_dir).decode(ids[first:]) == "yes\n"


def test_the_end_of_a_reply(chat_dir):
    (chat_dir / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    assert open_template("chat", Tokenizer(chat_dir)).end_id == Tokenizer(chat_dir).eos_id != 2
    (chat_dir / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}</s>{% endfor %}")
    assert open_template("chat", Tokenizer(chat_dir)).end_id == 2  # of the end tokens, the one that the template writes


def test_a_template_is_copied_with_the_tokenizer(chat_dir, tmp_path):
    (chat_dir / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "copy").mkdir()
    copy_tokenizer(chat_dir, tmp_path / "copy")
    assert ChatTemplate(Tokenizer(tmp_path / "copy")).source == CHATML
