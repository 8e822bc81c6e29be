"""The command line: thin verbs over the library. Results on stdout, progress and messages on stderr.

A module here holds verbs of a kind; each parses (``options``), calls the library and prints (``console``).
"""

# Importing a module registers its verbs, in the order in which `tenpak --help` lists them.
from tenpak.cli import making, planning, measuring, looking, reporting  # noqa: I001
from tenpak.cli.application import app, main

__all__ = ["app", "looking", "main", "making", "measuring", "planning", "reporting"]
