"""Sequences of commands: the targets of make, the chain of stages, jobs, Slurm, cost estimates, the growth study.

May import common, model, corpus, training, evaluation and analysis.
"""
