"""Stands in front of the real package: what users run must work where transformers is not installed."""
raise ImportError("transformers must not be imported by what users run")
