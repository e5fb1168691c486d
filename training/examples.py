"""Decoded test examples of a run."""
from collections.abc import Sequence
from typing import Any

from common.provenance import TemplateName
from corpus.prompts import open_template
from model.generation import GenerationConfig, generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer


def decode_examples(model: Transformer, tokenizer: Tokenizer, items: Sequence[dict[str, Any]], max_source_length: int,
                    max_target_length: int, template: TemplateName) -> list[dict[str, str]]:
    """Decodes test items greedily; returns a list of {input, output, prediction}."""
    if not items:
        return []
    prompts = open_template(template, tokenizer).encode_prompts([item["input"] for item in items], max_source_length)
    outputs = generate(model, prompts, GenerationConfig(min(64, max_target_length)), tokenizer.eos_ids)
    return [{"input": item["input"], "output": item["output"], "prediction": tokenizer.decode(ids).strip()}
            for item, ids in zip(items, outputs)]
