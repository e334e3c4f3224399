"""Merging: several indexed datasets into one, their documents in the order given."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from megascratch.data.checks import check_all
from megascratch.data.indexed import IndexedDataset
from megascratch.data.writer import IndexedDatasetWriter, require_free, require_same_kind
from megascratch.errors import DataError, Problem
from megascratch.log import progress


def open_datasets(prefixes: Sequence[Path | str]) -> list[IndexedDataset]:
    """Open datasets, and report what is wrong with all of them at once.

    Raises: DataError: if there are none, or any of them does not open.
    """
    if not prefixes:
        raise DataError(Problem("no dataset", "at least one is needed", "give the prefix of a .bin and .idx pair"))
    datasets: list[IndexedDataset] = []

    def open_one(prefix: Path | str) -> None:
        datasets.append(IndexedDataset(prefix))

    check_all([partial(open_one, prefix) for prefix in prefixes], "the datasets")
    return datasets


def merge_datasets(
    prefixes: Sequence[Path | str], output_prefix: Path | str, *, overwrite: bool = False, console: Console
) -> IndexedDataset:
    """Write one dataset with all documents of several, reading them as streams.

    Args:
        prefixes: of the datasets, in order.
        output_prefix: of the merged one.
        overwrite: replace a dataset that exists there.
        console: where progress is drawn.

    Returns: the merged dataset, open.

    Raises: DataError: if one does not open, dtypes or modes differ, or the output exists or is one of the inputs.
    """
    datasets = open_datasets(prefixes)
    first = datasets[0]
    if Path(output_prefix).resolve() in {dataset.prefix.resolve() for dataset in datasets}:
        problem = Problem(str(output_prefix), "is also an input", "choose another output prefix")
        raise DataError(problem, f"output {output_prefix}")
    has_modes = first.modes is not None
    checks = [partial(require_same_kind, dataset, first.dtype, has_modes) for dataset in datasets[1:]]
    check_all([*checks, partial(require_free, output_prefix, overwrite)], "the datasets")
    total_bytes = sum(dataset.n_tokens * dataset.dtype.itemsize for dataset in datasets)
    with (
        IndexedDatasetWriter(output_prefix, first.dtype, with_modes=has_modes, overwrite=overwrite) as writer,
        progress(console, f"merge {len(datasets)} datasets", total_bytes, "B") as advance,
    ):
        for dataset in datasets:
            writer.add_dataset(dataset)
            advance(dataset.n_tokens * dataset.dtype.itemsize)
    return IndexedDataset(output_prefix)
