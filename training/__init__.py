"""The parts of the training loop in train.py: settings, the checked run, data, engine, methods, saved state.

May import common, model and corpus.
"""
