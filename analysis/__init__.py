"""From the files of evaluated runs to tables and figures. May import common and evaluation."""
