"""Reads the files of evaluated runs, makes tables and figures. May import common and evaluation."""
