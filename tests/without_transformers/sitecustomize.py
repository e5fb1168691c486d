"""Hides the package transformers: what users run must work where it is not installed."""
import sys


class Hiding:
    """A finder of modules that does not find transformers."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name == "transformers" else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
