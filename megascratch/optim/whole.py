"""Whole tensors from the runs of many ranks, and back: what a rule needs that does not act element by element.

Tensor parallelism divides a weight, and ZeRO-1 cuts a bucket anywhere: a rank's run begins in the middle of one
weight's part and ends in the middle of another's. `WholeTensors` deals the tensors out, brings the pieces of each to
one rank, and takes what that rank makes of them back to where the pieces came from. By hand, on tp 2 × dp 2, weights A
and B of which tensor-parallel rank t has 4 and 2 elements, in one bucket of which each data-parallel rank owns 3:

    rank (dp, tp)   its run               collect      distribute
    (0, 0)          A_0[0:3]              A, whole     the three elements of what became of A, …
    (0, 1)          A_1[0:3]              B, whole     … and so on each rank: what became of its run
    (1, 0)          A_0[3:4]  B_0[0:2]
    (1, 1)          A_1[3:4]  B_1[0:2]

Each way is one all-to-all, in which an element travels once. Tensors are taken in rounds, so that a rank has few whole
ones at a time.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.layout import Extent, ParamSpec, lengths, run_extents
from megascratch.dist.mesh import Axis, Mesh
from megascratch.optim.rule import OwnedRun

_ROUND_NUMEL = 1 << 24  # elements that a rank takes whole in one round, or one tensor where that is larger


@dataclass(frozen=True)
class Held:
    """Where a run of this rank holds a piece of a tensor: elements `piece` of run number `run`."""

    run: int
    piece: slice


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor: [numel], whose elements lie in the logical tensor as the extents say."""

    numel: int
    extents: list[Extent]


class WholeTensors:
    """The tensors that some runs hold pieces of, dealt out over the ranks that hold each whole among them.

    Args:
        runs: of this rank. Every tensor must have one name, on this rank and the others of the axis.
        mesh: this rank's place.
        axis: ranks that hold all pieces together. Each of them calls this at the same point.
        dtype: of what travels.

    Attributes:
        rounds: names, each tuple in order; within a round, the i-th tensor belongs to rank i of the axis, and round
            again.
        held: by name, where this rank's runs hold a piece; only tensors of which they do.
    """

    def __init__(self, runs: Sequence[OwnedRun], mesh: Mesh, axis: Axis, dtype: torch.dtype) -> None:
        self.axis, self.dtype, self.device = axis, dtype, mesh.device
        self.specs: dict[str, ParamSpec] = {}
        self.held: dict[str, Held] = {}
        ends: dict[str, tuple[int, int]] = {}  # of this rank's piece, in its part of the tensor
        for index, run in enumerate(runs):
            bucket = run.bucket
            for span in bucket.spans:
                name = span.spec.name
                assert name not in self.specs, f"{name} is there twice"
                self.specs[name] = span.spec
                first, last = max(span.start, bucket.start), min(span.stop, bucket.stop)
                if first < last:
                    self.held[name] = Held(index, slice(first - bucket.start, last - bucket.start))
                    ends[name] = (first - span.start, last - span.start)
        tables = comm.gather_bytes(json.dumps(ends).encode(), axis, mesh.device)
        self.pieces = [
            {name: self._piece(name, mesh, rank, *table[name]) for name in self.specs if name in table}
            for rank, table in zip(axis.ranks, map(json.loads, tables))
        ]
        self.rounds = self._deal()

    def _piece(self, name: str, mesh: Mesh, rank: int, first: int, last: int) -> Piece:
        return Piece(last - first, run_extents(self.specs[name], mesh.spec.sizes, mesh.spec.coords(rank), first, last))

    def _deal(self) -> list[tuple[str, ...]]:
        """Sort by size, so that the tensors of a round are alike, and take as many a rank as a round may hold."""
        numel = {name: math.prod(spec.shape) for name, spec in self.specs.items()}
        names = sorted(numel, key=lambda name: (-numel[name], name))
        rounds, start = [], 0
        while start < len(names):
            per_rank = max(1, _ROUND_NUMEL // numel[names[start]])
            stop = start + per_rank * self.axis.size
            rounds.append(tuple(names[start:stop]))
            start = stop
        return rounds

    def collect(self, names: tuple[str, ...], pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring the tensors of a round together.

        Args:
            names: one of `rounds`.
            pieces: this rank's pieces of them, each [numel].

        Returns: the whole tensors that this rank owns, in logical shape.
        """
        own = self._shares(names)[self.axis.rank]
        sent = [self._cat([pieces[name] for name in share if name in pieces]) for share in self._shares(names)]
        sizes = [sum(held[name].numel for name in own if name in held) for held in self.pieces]
        wholes = {name: self._empty(*self.specs[name].shape) for name in own}
        for held, received in zip(self.pieces, comm.exchange(sent, sizes, self.axis)):
            for name, piece in self._split(received, own, held).items():
                for extent in held[name].extents:
                    wholes[name][extent.logical] = piece[extent.local].view(lengths(extent.logical))
        return wholes

    def distribute(self, names: tuple[str, ...], wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take tensors of the shapes that `collect` gave back to the ranks, each its piece.

        Args:
            names: one of `rounds`.
            wholes: the tensors of the round that this rank owns, in logical shape.

        Returns: this rank's pieces of the round's tensors, each [numel].
        """
        mine, shares = self.pieces[self.axis.rank], self._shares(names)
        sent = [
            self._cat([self._cut(wholes[name], held[name]) for name in wholes if name in held]) for held in self.pieces
        ]
        sizes = [sum(mine[name].numel for name in share if name in mine) for share in shares]
        pieces: dict[str, Tensor] = {}
        for share, received in zip(shares, comm.exchange(sent, sizes, self.axis)):
            pieces |= self._split(received, share, mine)
        return pieces

    def _shares(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return, for each rank of the axis, which of a round's tensors it owns."""
        return [names[rank :: self.axis.size] for rank in range(self.axis.size)]

    def _split(self, received: Tensor, names: tuple[str, ...], held: Mapping[str, Piece]) -> dict[str, Tensor]:
        here = [name for name in names if name in held]
        return dict(zip(here, received.split([held[name].numel for name in here])))

    def _cut(self, whole: Tensor, piece: Piece) -> Tensor:
        flat = self._empty(piece.numel)
        for extent in piece.extents:
            flat[extent.local] = whole[extent.logical].reshape(-1)
        return flat

    def _cat(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else self._empty(0)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
