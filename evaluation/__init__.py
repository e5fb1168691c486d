"""Evaluation of a checkpoint: text metrics of generated test sets, and benchmarks through lm-eval.

May import common, model and corpus. Must not import training.
"""
