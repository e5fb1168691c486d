"""Used by every other package: settings, files, processes, provenance, the log of a run. Imports no other package."""
