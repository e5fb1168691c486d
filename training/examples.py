"""Decoded test examples of a run."""
from collections.abc import Sequence
from typing import Any

from corpus.prompts import open_template
from model.generation import GenerationConfig, generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.train_config import TrainConfig


def decode_examples(model: Transformer, tokenizer: Tokenizer, items: Sequence[dict[str, Any]],
                    cfg: TrainConfig) -> list[dict[str, str]]:
    """Decodes test items greedily; returns a list of {input, output, prediction}."""
    if not items:
        return []
    inputs = [item["input"] for item in items]
    prompts = open_template(cfg.template, tokenizer).encode_prompts(inputs, cfg.max_source_length)
    outputs = generate(model, prompts, GenerationConfig(min(64, cfg.max_target_length)), tokenizer.eos_ids)
    return [{"input": item["input"], "output": item["output"], "prediction": tokenizer.decode(ids).strip()}
            for item, ids in zip(items, outputs)]
