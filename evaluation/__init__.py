"""Evaluation of a checkpoint: losses and divergences, text metrics of decoded test sets, benchmarks through lm-eval.

May import common, model and corpus. Must not import training.
"""
