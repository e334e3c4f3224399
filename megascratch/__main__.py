"""`python -m megascratch` is the `megascratch` command."""

from megascratch.cli import main

main()
