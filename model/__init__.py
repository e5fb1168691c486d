"""The decoder-only language model and what belongs to it: configuration, weights, tokenizer, growth, decoding.

Nothing in this package knows of tasks or of training. It may import common.
"""
import importlib

_EXPORTS = {"Tokenizer": "tokenizer", "ModelConfig": "config", "Transformer": "transformer", "load_model": "hub",
            "GenerationConfig": "generation", "generate": "generation", "grow_model": "growth"}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    """Imports a name at its first use: whoever needs the tokenizer alone does not wait for torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
