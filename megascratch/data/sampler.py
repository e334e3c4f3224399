"""Which samples each data-parallel rank reads: a pure function, so that a run resumes on any layout.

A step reads the global batch of samples c to c + G, where c counts the samples consumed so far. G = 8, micro_batch 2:

    dp 1, rank 0   [c+0 c+1] [c+2 c+3] [c+4 c+5] [c+6 c+7]      four microbatches
    dp 2, rank 0   [c+0 c+1]           [c+4 c+5]                two
    dp 2, rank 1             [c+2 c+3]           [c+6 c+7]

The union is the same for every dp: only c has to be saved. No state, no random numbers: the shuffling is in the index.

Legend: `b` micro-batch, `s` sequence length.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.data.samples import SampleDataset
from megascratch.dist.mesh import Axis
from megascratch.errors import DataError, Problem


def microbatch_ids(
    consumed_samples: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int, consecutive: bool = False
) -> list[range]:
    """Return the global sample ids of each microbatch of a rank in the step that follows `consumed_samples`.

    Microbatch m of rank r takes the ids from consumed + (m * dp + r) * micro_batch on, as Megatron's sampler does. With
    `consecutive`, a rank's microbatches follow each other, and ranks take turns once a step.
    """
    assert 0 <= dp_rank < dp_size and global_batch % (micro_batch * dp_size) == 0
    if consecutive:
        part = global_batch // dp_size
        consumed_samples, global_batch, dp_rank, dp_size = consumed_samples + dp_rank * part, part, 0, 1
    starts = range(consumed_samples + dp_rank * micro_batch, consumed_samples + global_batch, micro_batch * dp_size)
    return [range(start, start + micro_batch) for start in starts]


def collate(dataset: SampleDataset, sample_ids: range) -> Microbatch:
    """Read samples into one microbatch of torch tensors on the CPU."""
    samples = [dataset[sample] for sample in sample_ids]
    position_ids = torch.from_numpy(np.stack([sample.position_ids for sample in samples]))
    return Microbatch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        position_ids=position_ids,
        documents=(position_ids == 0).cumsum(1),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
    )


class Batches:
    """The steps of a data-parallel rank, as lists of microbatches.

    Args:
        dataset: samples, in training order.
        global_batch: samples in a step, over all ranks.
        micro_batch: samples in a microbatch.
        dp_rank, dp_size: this rank's place on the data-parallel axis.
        collate: reads samples of this kind of dataset, by their numbers, into one microbatch.
        batch_at: samples in the step that follows so many consumed ones; `global_batch` in all when left out.
        consecutive: whether a rank's part of a step is one run of samples; see `microbatch_ids`.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        collate: Callable[[Any, range], Microbatch] = collate,
        batch_at: Callable[[int], int] | None = None,
        consecutive: bool = False,
    ) -> None:
        self.consecutive = consecutive
        self.dataset, self.collate = dataset, collate
        self.batch_at = batch_at or (lambda consumed_samples: global_batch)
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    @classmethod
    def of(
        cls,
        config: Config,
        dataset: Sized,
        dp: Axis,
        collate: Callable[[Any, range], Microbatch] = collate,
        grows: bool = True,
    ) -> "Batches":
        """Return the batches of a recipe on this rank's data-parallel axis.

        Args:
            config: resolved.
            dataset, collate: as above.
            dp: data-parallel axis.
            grows: whether `train.rampup_batch_size` counts: in training alone.
        """
        train = config.train
        return cls(
            dataset,
            train.global_batch,
            train.micro_batch,
            dp.rank,
            dp.size,
            collate,
            train.batch_at if grows else None,
            config.parallel.deterministic_dp,
        )

    def require(self, n_samples: int) -> None:
        """Check before training that the dataset lasts until `n_samples` are consumed.

        Raises: DataError: if it does not.
        """
        if len(self.dataset) < n_samples:
            remedy = "add data, or train for fewer steps"
            problem = Problem(f"{n_samples:,} samples are needed", f"the dataset has {len(self.dataset):,}", remedy)
            raise DataError(problem, "data.paths")

    def at(self, consumed_samples: int) -> list[Microbatch]:
        """Return the microbatches of the step that follows `consumed_samples`.

        Raises: DataError: if the dataset ends before the step does, or a sample holds an id outside the vocabulary.
        """
        batch = self.batch_at(consumed_samples)
        self.require(consumed_samples + batch)
        ids = microbatch_ids(consumed_samples, batch, self.micro_batch, self.dp_rank, self.dp_size, self.consecutive)
        return [self.collate(self.dataset, sample_ids) for sample_ids in ids]

    def steps(self, consumed_samples: int, n_steps: int, prefetch: int = 2) -> Iterator[list[Microbatch]]:
        """Yield the microbatches of `n_steps` steps; a thread reads `prefetch` steps ahead (0: no thread)."""
        starts = self._starts(consumed_samples, n_steps)
        if prefetch == 0:
            yield from map(self.at, starts)
            return
        thread = ThreadPoolExecutor(1, thread_name_prefix="read-samples")
        under_way: deque[Future[list[Microbatch]]] = deque()
        try:
            for start in starts:
                under_way.append(thread.submit(self.at, start))
                if len(under_way) > prefetch:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _starts(self, consumed_samples: int, n_steps: int) -> Iterator[int]:
        """Yield how many samples are consumed before each of the steps."""
        for _ in range(n_steps):
            yield consumed_samples
            consumed_samples += self.batch_at(consumed_samples)
