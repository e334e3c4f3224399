"""Blending: samples of several datasets in given proportions, in Megatron's order.

Weights 0.5, 0.3 and 0.2; each step takes the next sample of the dataset that lags furthest behind its share:

    step      0  1  2  3  4  5  6  7  8  9
    dataset   0  1  2  0  1  0  2  0  1  0
    sample    0  0  0  1  1  2  1  3  2  4

The order is the same at every prefix of training, so any stretch of it has about the right proportions.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megascratch.data._sample_index import fill_blend
from megascratch.data.checks import check_all
from megascratch.data.index_cache import load_or_build
from megascratch.data.indexed import IndexedDataset
from megascratch.data.merge import open_datasets
from megascratch.data.samples import EodRules, GPTDataset, Sample, SampleDataset, require_one_sample
from megascratch.data.splits import SPLITS, split_ranges
from megascratch.data.token_ids import check_token_ids
from megascratch.errors import DataError, Problem

SURPLUS = 0.005  # more samples than its share that each dataset is cut into: it decides its epochs, so its order
_MAX_DATASETS = np.iinfo(np.int16).max
_NO_LIMIT = np.iinfo(np.int64).max


class Datasets(NamedTuple):
    """The three parts of a corpus; None where no samples were asked for."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


class BlendedDataset:
    """Samples of several datasets in one order.

    Args:
        datasets: what is blended.
        dataset_index: which dataset each sample comes from, [n] int16.
        sample_index: which of its samples it is, [n] int64.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        dataset_index: NDArray[np.int16],
        sample_index: NDArray[np.int64],
    ) -> None:
        self.datasets = list(datasets)
        self.dataset_index = dataset_index
        self.sample_index = sample_index

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, sample: int) -> Sample:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return self.datasets[int(self.dataset_index[sample])][int(self.sample_index[sample])]


def build_datasets(
    paths: Sequence[Path | str],
    weights: Sequence[float] | None,
    split: str,
    seq_length: int,
    seed: int,
    n_samples: tuple[int | None, int | None, int | None],
    cache_dir: Path | str | None = None,
    *,
    rules: EodRules | None = None,
    vocab_size: int | None = None,
) -> Datasets:
    """Open indexed datasets and make the train, valid and test samples.

    Args:
        paths: prefixes of the datasets.
        weights: share of each in the samples, of any sum; None: in proportion to their sizes, each sample at most once.
        split: Megatron's `--split`: weights of train, valid and test, as in "969,30,1".
        seq_length: tokens in a sample.
        seed: of the shuffles.
        n_samples: samples of train, valid and test that are needed; 0: no such dataset; None: every sample of the
            split once (weights then play no part), or no such dataset when its share is 0.
        cache_dir: where index arrays are kept; None: `index_cache` beside the first dataset.
        rules: what an end-of-document token does.
        vocab_size: token ids must be below it; None: not checked.

    Returns: datasets of at least `n_samples` samples.

    Raises: DataError: for everything that is wrong with the files, the weights and the amount of data.

    Source: megatron-core 0.16 `BlendedMegatronDatasetBuilder`.
    """
    indexed = open_datasets(paths)
    if weights is not None:
        _require_weights(weights, paths)
    directory = Path(cache_dir) if cache_dir is not None else indexed[0].prefix.parent / "index_cache"
    ranges = [split_ranges(split, len(dataset)) for dataset in indexed]
    wanted = [
        None if needed == 0 or (needed is None and ranges[0][part] is None) else part
        for part, needed in enumerate(n_samples)
    ]
    _check_data(indexed, ranges, [part for part in wanted if part is not None], split, seq_length, vocab_size)

    def samples(dataset: int, part: int, n: int | None) -> GPTDataset:
        sequences = ranges[dataset][part]
        assert sequences is not None
        return GPTDataset(indexed[dataset], sequences, seq_length, n, seed, directory, rules, vocab_size)

    train, valid, test = (
        None if part is None else _blend(partial(samples, part=part), len(indexed), weights, n_samples[part], directory)
        for part in wanted
    )
    return Datasets(train, valid, test)


def blend_indices(
    weights: NDArray[np.float64], limits: NDArray[np.int64], size: int, cache_dir: Path
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Decide which dataset each sample comes from: always the one furthest behind its share.

    Args:
        weights: shares that add up to 1, [n_datasets].
        limits: samples that each dataset has, [n_datasets].
        size: samples in the blend.
        cache_dir: where the arrays are kept.

    Returns: dataset index, [size]; index of the sample in that dataset, [size].

    Source: megatron-core 0.16 `build_blending_indices` and `build_exhaustive_blending_indices`.
    """

    def build() -> dict[str, NDArray]:
        dataset_index, sample_index = np.empty(size, np.int16), np.empty(size, np.int64)
        fill_blend(weights, limits, dataset_index, sample_index)
        return {"dataset_index": dataset_index, "dataset_sample_index": sample_index}

    description = {
        "index": "blend, version 1",
        "weights": weights.tolist(),
        "limits": limits.tolist(),
        "size": size,
    }
    arrays = load_or_build(cache_dir, description, ("dataset_index", "dataset_sample_index"), build)
    return arrays["dataset_index"], arrays["dataset_sample_index"]


def _blend(
    samples: Callable[..., GPTDataset], n_datasets: int, weights: Sequence[float] | None, n: int | None, cache_dir: Path
) -> SampleDataset:
    """Blend one part of all datasets; `samples(dataset, n=...)` cuts the samples of one of them."""
    if weights is not None and n is not None:
        return _blend_by_weight(samples, weights, n, cache_dir)
    if n_datasets == 1:
        return samples(0, n=n)
    datasets = [samples(dataset, n=None) for dataset in range(n_datasets)]
    sizes = np.array([len(dataset) for dataset in datasets], np.int64)
    total = int(sizes.sum())
    if n is not None and n > total:
        raise DataError(
            Problem(
                f"{n:,} samples are needed",
                f"the {n_datasets} datasets have {total:,} in one epoch, and without weights none is repeated",
                "set data.weights to repeat data, or train for fewer steps",
            ),
            "data.paths",
        )
    return BlendedDataset(datasets, *blend_indices(sizes / total, sizes, total if n is None else n, cache_dir))


def _blend_by_weight(
    samples: Callable[..., GPTDataset], weights: Sequence[float], n: int, cache_dir: Path
) -> BlendedDataset:
    shares = _normalized(np.array(weights, np.float64))
    targets = [math.ceil(n * share) for share in shares.tolist()]
    # Megatron normalises twice; a share can change in its last bit, and a tie with it.
    dataset_index, sample_index = blend_indices(
        _normalized(shares), np.full(len(shares), _NO_LIMIT), sum(targets), cache_dir
    )
    # In a short blend the greedy rule can take more from a dataset than its target and the surplus.
    taken = np.bincount(dataset_index, minlength=len(targets)).tolist()
    sizes = [max(math.ceil(target * (1 + SURPLUS)), count) for target, count in zip(targets, taken)]
    return BlendedDataset([samples(d, n=size) for d, size in enumerate(sizes)], dataset_index, sample_index)


def _normalized(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return weights / np.sum(weights)


def _require_weights(weights: Sequence[float], paths: Sequence[Path | str]) -> None:
    problems = []
    if len(weights) != len(paths):
        rule = f"must have one for each of the {len(paths)} data.paths"
        problems.append(Problem(f"data.weights has {len(weights)} entries", rule, "give a weight for every path"))
    for weight, path in zip(weights, paths):
        if not (math.isfinite(weight) and weight > 0):
            problems.append(Problem(f"data.weights: {weight} for {path}", "must be above 0", "leave the dataset out"))
    if len(paths) > _MAX_DATASETS:
        rule = f"a blend takes at most {_MAX_DATASETS}"
        problems.append(Problem(f"{len(paths)} datasets", rule, "merge some with tools/merge_datasets.py"))
    if problems:
        raise DataError(problems, "data.weights")


def _check_data(
    indexed: Sequence[IndexedDataset],
    ranges: Sequence[Sequence[range | None]],
    parts: Sequence[int],
    split: str,
    seq_length: int,
    vocab_size: int | None,
) -> None:
    """Find everything that is wrong with the tokens and their number, in all datasets and parts, at once."""
    checks: list[Callable[[], None]] = [
        partial(_refuse_empty_part, split, SPLITS[part]) for part in parts if ranges[0][part] is None
    ]
    for dataset, parts_of_dataset in zip(indexed, ranges):
        checks.append(partial(check_token_ids, dataset, vocab_size))
        checks += [
            partial(require_one_sample, dataset, sequences, seq_length, SPLITS[part])
            for part in parts
            if (sequences := parts_of_dataset[part]) is not None
        ]
    check_all(checks, "the datasets")


def _refuse_empty_part(split: str, part: str) -> None:
    remedy = "give it a share, or ask for no samples of it"
    raise DataError(Problem(f"data.split = {split!r}", f"{part} has no share", remedy))
