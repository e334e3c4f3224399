"""Resharding in memory: ranks that hold tensors in one layout hand them to ranks that want them in another.

It is loading where the checkpoint is the memory of the other ranks. Every rank says once which boxes of which logical
tensors it holds and wants; from then on each knows who sends what to whom, and nothing but the elements travels.

By hand: a weight of rows 0 … 7 is trained with its halves on ranks 0 and 1 (tp 2), both of which want all of it (tp 1):

    rank 0 holds 0:4, rank 1 holds 4:8      rank 0 sends 0:4 to rank 1, rank 1 sends 4:8 to rank 0; each keeps its own

Where several ranks hold a box, one that wants it takes its own copy, or that of the replica whose turn it is.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megascratch.checkpoint.format import DTYPE_NAMES, DTYPES, Shard, whole
from megascratch.dist import comm
from megascratch.dist.layout import Box, Extent, intersect, lengths, shift
from megascratch.dist.mesh import Axis

_ROUND_NUMEL = 1 << 25  # elements that travel together between all ranks


@dataclass(frozen=True)
class _Transfer:
    """A box of a logical tensor that rank `source` holds and rank `target` wants."""

    name: str
    box: Box
    source: int
    target: int

    @property
    def numel(self) -> int:
        return math.prod(lengths(self.box))


@dataclass
class _Round:
    """Transfers of one dtype that travel together: what this rank copies, sends to each rank, and gets from each."""

    dtype: torch.dtype
    numel: int = 0
    kept: list[_Transfer] = field(default_factory=list)
    sent: dict[int, list[_Transfer]] = field(default_factory=lambda: defaultdict(list))
    received: dict[int, list[_Transfer]] = field(default_factory=lambda: defaultdict(list))

    def add(self, transfer: _Transfer, rank: int) -> None:
        """Take a transfer into the round; every rank adds all of them, in the same order."""
        self.numel += transfer.numel
        if transfer.source == transfer.target:
            if transfer.source == rank:
                self.kept.append(transfer)
        elif transfer.source == rank:
            self.sent[transfer.target].append(transfer)
        elif transfer.target == rank:
            self.received[transfer.source].append(transfer)


class Exchange:
    """A plan, made once, to fill the shards of one layout from those of another. Every rank of the axis makes it.

    Args:
        sources: what this rank holds. Those that all ranks together mark with `writes` cover each tensor once.
        targets: what this rank wants, by the same names, of the same dtypes.
        axis: of all ranks that take part.
        device: of the tensors.
    """

    def __init__(self, sources: Sequence[Shard], targets: Sequence[Shard], axis: Axis, device: torch.device) -> None:
        self.axis, self.device = axis, device
        self._held, self._wanted = _by_name(sources), _by_name(targets)
        own = {"holds": [_told(shard) for shard in sources], "wants": [_told(shard) for shard in targets]}
        everyone = [json.loads(said) for said in comm.gather_bytes(json.dumps(own).encode(), axis, device)]
        self._rounds: list[_Round] = []
        for dtype, transfer in _transfers(everyone):
            last = self._rounds[-1] if self._rounds else None
            if last is None or last.dtype != dtype or last.numel + transfer.numel > _ROUND_NUMEL:
                self._rounds.append(_Round(dtype))
            self._rounds[-1].add(transfer, axis.rank)

    @torch.no_grad()
    def run(self) -> None:
        """Fill the targets with what the sources hold now. Every rank of the axis calls this."""
        for each in self._rounds:
            for transfer in each.kept:
                _put(self._wanted, transfer, _taken(self._held, transfer))
            if self.axis.size == 1:
                continue
            ranks = range(self.axis.size)
            parts = [
                torch.cat([_taken(self._held, transfer).flatten() for transfer in each.sent[other]])
                if each.sent[other]
                else torch.empty(0, dtype=each.dtype, device=self.device)
                for other in ranks
            ]
            sizes = [sum(transfer.numel for transfer in each.received[other]) for other in ranks]
            for other, values in enumerate(comm.exchange(parts, sizes, self.axis)):
                coming = each.received[other]
                for transfer, part in zip(coming, values.split([transfer.numel for transfer in coming])):
                    _put(self._wanted, transfer, part.view(lengths(transfer.box)))


Shards = dict[str, list[Shard]]


def _by_name(shards: Sequence[Shard]) -> Shards:
    named: Shards = defaultdict(list)
    for shard in shards:
        named[shard.name].append(shard)
    return named


def _told(shard: Shard) -> list[Any]:
    """Return what the other ranks have to know of a shard."""
    boxes = [[[s.start, s.stop] for s in extent.logical] for extent in shard.extents]
    return [shard.name, DTYPE_NAMES[shard.tensor.dtype], shard.writes, boxes]


def _transfers(everyone: Sequence[dict[str, Any]]) -> Iterator[tuple[torch.dtype, _Transfer]]:
    """Yield, in an order that all ranks share, what travels."""
    holders: dict[str, dict[tuple[Any, ...], list[int]]] = defaultdict(dict)
    dtypes: dict[str, torch.dtype] = {}
    for written in (True, False):  # other copies are replicas of those that are written, where the boxes are the same
        for rank, told in enumerate(everyone):
            for name, dtype, writes, boxes in told["holds"]:
                dtypes[name] = DTYPES[dtype]
                for box in (_hashable(b) for b in boxes):
                    if writes and written:
                        holders[name].setdefault(box, []).append(rank)
                    elif not writes and not written and rank not in holders[name].get(box, [rank]):
                        holders[name][box].append(rank)
    wants = [
        (dtypes[name], name, rank, _box(box))
        for rank, told in enumerate(everyone)
        for name, _, _, boxes in told["wants"]
        for box in boxes
    ]
    for dtype, name, target, wanted in sorted(wants, key=lambda want: (str(want[0]), want[1], want[2])):
        for box, ranks in holders[name].items():
            common = intersect(wanted, _box(box))
            if common is not None:
                source = target if target in ranks else ranks[target % len(ranks)]
                yield dtype, _Transfer(name, common, source, target)


def _hashable(box: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(pair) for pair in box)


def _box(pairs: Sequence[Sequence[int]]) -> Box:
    return tuple(slice(start, stop) for start, stop in pairs)


def _taken(held: Shards, transfer: _Transfer) -> Tensor:
    """Return a view of the box of a transfer."""
    return next(_views(held, transfer))


def _put(wanted: Shards, transfer: _Transfer, values: Tensor) -> None:
    """Write the box of a transfer wherever it is wanted."""
    for view in _views(wanted, transfer):
        view.copy_(values)


def _views(shards: Shards, transfer: _Transfer) -> Iterator[Tensor]:
    for shard in shards[transfer.name]:
        for extent in shard.extents:
            if intersect(transfer.box, extent.logical) == transfer.box:
                yield _part(shard, extent, transfer.box)


def _part(shard: Shard, extent: Extent, box: Box) -> Tensor:
    return shard.part(extent)[shift(box, extent.logical, whole(lengths(extent.logical)))]
