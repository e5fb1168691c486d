"""Benchmarks by lm-eval and metrics of generated text. May import common, model and corpus; not training."""
