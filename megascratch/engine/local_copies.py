"""Copies of each rank's own state on its own node, and on another one, for a quick restart on the same layout.

A copy is a checkpoint of one rank: its tensors as they lie in its memory, whatever they are part of. So nothing is
gathered, shared or resharded, and RAM disks serve, which a killed process leaves as they are:

    <local_dir>/<run>/rank_00003/step_00000040/…

Under `local_replicate` each rank then sends its copy to the rank at its place on the next node, beside the training.
At a start every rank says which copies its node holds. The newest step of which there is a copy of every rank, all of
one launch, counts; who lacks its own is sent it (`engine/copy_sets.py`). Where there is none such (two neighbours were
lost, the layout changed, a copy is damaged), the persistent checkpoint counts.
"""

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megascratch.checkpoint import (
    Shard,
    complete_steps,
    load,
    read_state,
    receive_directory,
    remove_tree,
    save,
    send_directory,
    step_of,
)
from megascratch.checkpoint.format import whole
from megascratch.dist import comm
from megascratch.dist.layout import Extent
from megascratch.dist.mesh import Axis
from megascratch.engine.copy_sets import (
    CopySet,
    Holdings,
    complete_sets,
    find_nodes,
    heard,
    partners,
    require_partners,
    said,
    transfers,
)
from megascratch.engine.engine import Engine
from megascratch.engine.state import engine_shards, optimizer_shards, restore_counters
from megascratch.errors import CheckpointError
from megascratch.log import tell

_ALONE = Axis("alone")
_KEEP = 2  # ranks may have come to different steps when one is killed


class LocalCopies:
    """The copies that a node holds, as one of its ranks makes and loads them.

    Args:
        engine: whose state is copied.
        folder: of the run, on this node.

    Raises: LayoutError: on every rank, if copies are to be replicated and there is no node to send them to.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        mesh = engine.mesh
        self.engine, self.folder = engine, folder
        self._world = replace(mesh.world, clock=None, roll_call=None)  # for threads of our own
        self._launch = comm.gather_bytes(uuid.uuid4().hex.encode(), mesh.world, mesh.device)[0].decode()
        self._nodes = find_nodes(folder, self._launch, mesh)
        self._exchanges: list[threading.Thread] = []
        self._failed: list[str] = []
        self._may_have_strays = True
        if engine.config.checkpoint.local_replicate:
            require_partners(self._nodes)

    @classmethod
    def of(cls, engine: Engine, run_id: str) -> "LocalCopies | None":
        """Return the copies that a recipe asks for, or None. Every rank calls this at the same point."""
        local_dir = engine.config.checkpoint.local_dir
        return None if local_dir is None else cls(engine, Path(local_dir) / (run_id or "run"))

    def save(self, state: Mapping[str, Any]) -> None:
        """Copy this rank's state. A copy that fails is told, and training goes on: it only saves time."""
        self.finish()
        rank, path = self.engine.mesh.rank, None
        try:
            state = {**state, "layout": self._layout(rank), "launch": self._launch}
            path = save(self._of_rank(rank), self.engine.step, self._shards(), state, _ALONE, _KEEP, recycle=True)
        except CheckpointError as error:
            tell(rank, f"after step {self.engine.step}: no local copy: {error}")
        if self._may_have_strays:
            self._drop_strays()
        if self.engine.config.checkpoint.local_replicate:
            self._start_exchange(path)

    def finish(self) -> None:
        """Wait until the last copy has arrived where it was sent to, and tell what failed."""
        for thread in self._exchanges:
            thread.join()
        for failure in self._failed:
            tell(self.engine.mesh.rank, f"no copy on another node: {failure}")
        self._exchanges, self._failed = [], []

    def load(self, newer_than: int, console: Console) -> dict[str, Any] | None:
        """Load the newest step that there is a good copy of for every rank, if it is newer than a step.

        Returns: its state, or None.
        """
        mesh = self.engine.mesh
        own = said({rank: self._held(rank) for rank in self._ranks_here()})
        held = [heard(text) for text in comm.gather_bytes(own, mesh.world, mesh.device)]
        for copies in complete_sets(held):
            if copies.step <= newer_than:
                break
            path = self._path(mesh.rank, copies.step)
            try:
                self._fetch(copies, held)
                load(path, self._shards())
                state, failed = read_state(path), False
            except CheckpointError as error:
                tell(mesh.rank, f"local copy: {error}")
                failed = True
            if not any(comm.gather_flags(failed, mesh.world, mesh.device)):
                restore_counters(self.engine, state)
                console.print(f"resumed from the local copies after step {copies.step}")
                return state
        return None

    def _of_rank(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}"

    def _ranks_here(self) -> list[int]:
        """Return the ranks, of any layout, that this node holds copies of."""
        return [int(path.name[5:]) for path in self.folder.glob("rank_*") if path.name[5:].isdecimal()]

    def _path(self, rank: int, step: int) -> Path:
        return self._of_rank(rank) / f"step_{step:08d}"

    def _held(self, rank: int) -> list[CopySet]:
        """Return which sets this node's copies of a rank are of, if they fit the layout."""
        found = []
        for path in complete_steps(self._of_rank(rank)):
            with suppress(CheckpointError):
                state = read_state(path)
                if state.get("layout") == self._layout(rank):
                    found.append(CopySet(step_of(path), str(state.get("launch"))))
        return found

    def _fetch(self, copies: CopySet, held: Sequence[Holdings]) -> None:
        """Send the copies of a set to the ranks whose node has none.

        Each rank goes through the same list, so whoever waits, waits for one that is on the way to it.

        Raises: CheckpointError: if this rank's copy cannot be written.
        """
        rank, failed = self.engine.mesh.rank, None
        for source, owner in transfers(copies, held):
            try:
                if rank == source:
                    send_directory(self._path(owner, copies.step), self._world, owner)
                elif rank == owner:
                    receive_directory(self._of_rank(owner), self._world, source, _KEEP)
            except CheckpointError as error:
                failed = error
        if failed is not None:
            raise failed

    def _start_exchange(self, path: Path | None) -> None:
        """Send this rank's copy to the next node and take that of the node before, both in the background."""
        following, before = partners(self._nodes, self.engine.mesh.rank)
        halves: list[Callable[[], None]] = [
            lambda: send_directory(path, self._world, following),
            lambda: receive_directory(self._of_rank(before), self._world, before, _KEEP),
        ]

        def run(half: Callable[[], None]) -> None:
            try:
                half()
            except (CheckpointError, RuntimeError) as error:  # of the backend, when the peer is gone
                self._failed.append(str(error))

        self._exchanges = [threading.Thread(target=run, args=(half,), daemon=True) for half in halves]
        for thread in self._exchanges:
            thread.start()

    def _drop_strays(self) -> None:
        """Delete copies of ranks that are on other nodes now: what is newer will never be added to them."""
        rank, self._may_have_strays = self.engine.mesh.rank, False
        here = next(node for node in self._nodes if rank in node)
        if rank == here[0]:
            wanted = {*here, *(partners(self._nodes, other)[1] for other in here)}
            for other in set(self._ranks_here()) - wanted:
                remove_tree(self._of_rank(other))

    def _shards(self) -> Sequence[Shard]:
        """Return this rank's tensors as whole tensors; a number tells apart the copies of a tied one."""
        shards = [*engine_shards(self.engine), *optimizer_shards(self.engine)]
        return [
            Shard(f"{i}/{s.name}", tuple(s.tensor.shape), s.tensor, [Extent(box, box)])
            for i, s in enumerate(shards)
            for box in [whole(s.tensor.shape)]
        ]

    def _layout(self, rank: int) -> dict[str, Any]:
        config = self.engine.config
        return {
            "rank": rank,
            "parallel": config.parallel.model_dump(mode="json"),
            "model": config.model.model_dump(mode="json"),
            "optim": config.optim.model_dump(mode="json"),
            "dtype": config.train.dtype,
        }
