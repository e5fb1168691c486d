"""The decoder-only language model and what belongs to it: configuration, weights, tokenizer, decoding.

Nothing in this package knows of tasks or of training.
"""
