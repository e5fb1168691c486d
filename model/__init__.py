"""The decoder-only language model: configuration, checkpoints, tokenizer, decoding, log-likelihoods, growth.

This package does not know about tasks or training. It may import common.
"""
import importlib
from typing import Any

EXPORTS = {"GenerationConfig": "generation", "ModelConfig": "config", "Tokenizer": "tokenizer",
           "Transformer": "transformer", "generate": "generation", "grow_model": "growth", "load_model": "hub"}


def __getattr__(name: str) -> Any:
    """Imports an exported name at first use, so that `import model.tokenizer` does not import torch."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)
