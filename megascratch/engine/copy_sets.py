"""Which node holds copies of which ranks: the arithmetic of local copies, the same on every rank.

A node is the ranks that see the same files, whatever their hosts are called. By hand, ranks 0 1 on one node and 2 3 on
another; the second was replaced by an empty one after both had copies of all four ranks:

    held        rank 0, 1: {0: [A], 1: [A], 2: [A], 3: [A]}    rank 2, 3: {}        A = step 40 of launch 7f…
    complete    A: some node has a copy of every rank
    transfers   0 → 2 and 1 → 3: from one of the ranks that see the copy to the one that lacks it
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.errors import LayoutError, Problem


@dataclass(frozen=True, order=True)
class CopySet:
    """Copies that belong together: one of each rank, made after the same step by the same launch."""

    step: int
    launch: str


Holdings = Mapping[int, Sequence[CopySet]]  # of the node that a rank is on: whose copies, and of which sets
Nodes = Sequence[Sequence[int]]  # the ranks of each


def find_nodes(folder: Path, token: str, mesh: Mesh) -> Nodes:
    """Return the ranks of each node, in order: those that see the same files. Every rank calls this at the same point.

    Args:
        folder: on each node, or on one that they share; made where it is missing.
        token: that no other launch uses.
        mesh: of all ranks.
    """
    own, seen = folder / f"{token}_{mesh.rank}", [mesh.rank]
    with suppress(OSError):  # whoever cannot write has a node of its own
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
    comm.barrier(mesh.world)
    with suppress(OSError):
        seen = sorted({mesh.rank, *(int(path.name.removeprefix(f"{token}_")) for path in folder.glob(f"{token}_*"))})
    nodes = [json.loads(text) for text in comm.gather_bytes(json.dumps(seen).encode(), mesh.world, mesh.device)]
    own.unlink(missing_ok=True)
    return sorted(dict.fromkeys(map(tuple, nodes)))


def require_partners(nodes: Nodes) -> None:
    """Check that each rank has one at its place on the next node.

    Raises: LayoutError: if there is one node only, or they have different numbers of ranks.
    """
    sizes = sorted({len(node) for node in nodes})
    if len(nodes) == 1:
        rule = f"needs another node: all {sizes[0]} ranks see the same checkpoint.local_dir"
        remedy = "leave it out, or name a directory that each node has for itself"
    elif len(sizes) > 1:
        rule = f"needs as many ranks on every node: they have {' or '.join(map(str, sizes))}"
        remedy = "leave it out, or start as many ranks on each node"
    else:
        return
    raise LayoutError(Problem("checkpoint.local_replicate = true", rule, remedy))


def partners(nodes: Nodes, rank: int) -> tuple[int, int]:
    """Return the ranks at this one's place on the next node, which gets its copies, and on the one before."""
    here = next(i for i, node in enumerate(nodes) if rank in node)
    place = nodes[here].index(rank)
    return nodes[(here + 1) % len(nodes)][place], nodes[here - 1][place]


def said(holdings: Holdings) -> bytes:
    """Return what a node holds as JSON."""
    return json.dumps({owner: [[s.step, s.launch] for s in sets] for owner, sets in holdings.items()}).encode()


def heard(text: bytes) -> Holdings:
    """Return what `said` wrote."""
    return {int(owner): [CopySet(*pair) for pair in sets] for owner, sets in json.loads(text).items()}


def complete_sets(held: Sequence[Holdings]) -> list[CopySet]:
    """Return the sets of which some node has a copy of every rank, the latest step first.

    Args:
        held: what each rank's node holds, in the order of ranks.
    """
    of_each = [{found for holdings in held for found in holdings.get(owner, ())} for owner in range(len(held))]
    return sorted(set.intersection(*of_each), reverse=True)


def transfers(copies: CopySet, held: Sequence[Holdings]) -> Iterator[tuple[int, int]]:
    """Yield (from, to) for every rank whose own node has no copy of it; sources take turns."""
    for owner in range(len(held)):
        if copies not in held[owner].get(owner, ()):
            sources = [rank for rank, holdings in enumerate(held) if copies in holdings.get(owner, ())]
            yield sources[owner % len(sources)], owner
