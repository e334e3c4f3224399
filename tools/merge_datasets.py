#!/usr/bin/env python3
"""Merge all indexed datasets of a directory, with the flags of Megatron-LM's tools/merge_datasets.py.

    python tools/merge_datasets.py --input data/parts --output-prefix data/whole

Datasets are taken in the order of their names. The work is done by megascratch.data.merge.
"""

import argparse
import sys
from pathlib import Path

from megascratch.data.indexed import IndexedDataset
from megascratch.data.merge import merge_datasets
from megascratch.errors import DataError, Problem, exit_code_of
from megascratch.log import make_console


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Return Megatron's flags, and the one that we add."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--input", required=True, help="directory of .bin and .idx pairs")
    parser.add_argument("--output-prefix", required=True, help="<prefix>.bin and <prefix>.idx are written")
    parser.add_argument("--multimodal", action="store_true", help="the datasets must have modes")
    parser.add_argument("--overwrite", action="store_true", help="(not Megatron's) replace a dataset that exists")
    return parser.parse_args(argv)


def datasets_in(directory: Path) -> list[Path]:
    """Return the prefixes of the datasets in a directory, in the order of their names.

    Raises: DataError: if there is no such directory, or nothing in it.
    """
    if not directory.is_dir():
        problem = Problem(f"--input {directory}", "no such directory", "give the directory of the .bin and .idx pairs")
        raise DataError(problem, "the flags of merge_datasets.py")
    prefixes = sorted({path.with_suffix("") for path in directory.iterdir() if path.suffix in (".bin", ".idx")})
    if not prefixes:
        problem = Problem(f"--input {directory}", "holds no .bin and no .idx", "give the directory of the datasets")
        raise DataError(problem, "the flags of merge_datasets.py")
    return prefixes


def run(flags: argparse.Namespace) -> None:
    """Do what the flags say, and print what was done."""
    prefixes = datasets_in(Path(flags.input))
    if flags.multimodal and IndexedDataset(prefixes[0]).modes is None:
        problem = Problem("--multimodal", f"{prefixes[0]} has no modes", "leave the flag out")
        raise DataError(problem, "the flags of merge_datasets.py")
    merged = merge_datasets(prefixes, flags.output_prefix, overwrite=flags.overwrite, console=make_console())
    kept = " (with modes)" if merged.modes is not None else ""
    print(f"{merged.prefix}: {merged.n_documents:,} documents, {merged.n_tokens:,} tokens{kept}")


def main(argv: list[str]) -> int:
    """Return the exit code: 2 when the user's input is wrong."""
    return exit_code_of(lambda: run(parse_flags(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
