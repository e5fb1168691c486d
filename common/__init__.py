"""Modules that every other package uses: settings, files, the process group, provenance, the log of a run.

Imports no other package.
"""
