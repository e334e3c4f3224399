"""The command line: one module a verb. Results go to stdout, progress and messages to stderr.

A verb's module imports what it runs inside its function, so that `--help`, a wrong option and a wrong recipe answer at
once, before torch is loaded.
"""

from megascratch.cli.app import main

__all__ = ["main"]
