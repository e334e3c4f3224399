"""Copies of each rank's own state on its own node, for a quick restart on the same layout.

A copy is a checkpoint of one rank: its tensors as they lie in its memory, whatever they are part of. So nothing is
gathered, shared or resharded, and RAM disks serve, which a killed process leaves as they are:

    <local_dir>/<run>/rank_00003/step_00000040/…

A node that was lost has none. Then, or when the layout changed, or a copy is damaged, the persistent checkpoint counts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megascratch.checkpoint import Shard, complete_steps, load, read_state, save, step_of
from megascratch.checkpoint.format import whole
from megascratch.dist import comm
from megascratch.dist.layout import Extent
from megascratch.dist.mesh import Axis
from megascratch.engine.engine import Engine
from megascratch.engine.state import engine_shards, optimizer_shards, restore_counters
from megascratch.errors import CheckpointError

_ALONE = Axis("alone")


class LocalCopies:
    """The local copies of one rank; two are kept, since ranks may have come to different steps when one is killed.

    Args:
        engine: whose state is copied.
        folder: of this rank.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder

    @classmethod
    def of(cls, engine: Engine, run_id: str) -> "LocalCopies | None":
        """Return the copies that a recipe asks for, or None."""
        local_dir = engine.config.checkpoint.local_dir
        if local_dir is None:
            return None
        return cls(engine, Path(local_dir) / (run_id or "run") / f"rank_{engine.mesh.rank:05d}")

    def save(self, state: Mapping[str, Any], console: Console) -> None:
        """Copy this rank's state. A copy that fails is told, and training goes on: it only saves time."""
        try:
            state = {**state, "layout": self._layout()}
            save(self.folder, self.engine.step, self._shards(), state, _ALONE, keep=2, recycle=True)
        except CheckpointError as error:
            console.print(f"after step {self.engine.step}: no local copy: {error}")

    def load(self, newer_than: int, console: Console) -> dict[str, Any] | None:
        """Load the newest step that every rank has a good copy of, if it is newer than a step.

        Returns: its state, or None.
        """
        mesh = self.engine.mesh
        own = [step_of(path) for path in complete_steps(self.folder) if self._fits(path)]
        everyones = comm.gather_bytes(json.dumps(own).encode(), mesh.world, mesh.device)
        common = set.intersection(*(set(json.loads(steps)) for steps in everyones))
        for step in sorted((step for step in common if step > newer_than), reverse=True):
            path = self.folder / f"step_{step:08d}"
            try:
                load(path, self._shards())
                state, failed = read_state(path), False
            except CheckpointError as error:
                console.print(f"local copy: {error}")
                failed = True
            if not any(comm.gather_flags(failed, mesh.world, mesh.device)):
                restore_counters(self.engine, state)
                console.print(f"resumed from the local copies after step {step}")
                return state
        return None

    def _shards(self) -> Sequence[Shard]:
        """Return this rank's tensors as whole tensors; a number tells apart the copies of a tied one."""
        shards = [*engine_shards(self.engine), *optimizer_shards(self.engine)]
        return [
            Shard(f"{i}/{s.name}", tuple(s.tensor.shape), s.tensor, [Extent(box, box)])
            for i, s in enumerate(shards)
            for box in [whole(s.tensor.shape)]
        ]

    def _layout(self) -> dict[str, Any]:
        config = self.engine.config
        return {
            "rank": self.engine.mesh.rank,
            "parallel": config.parallel.model_dump(mode="json"),
            "model": config.model.model_dump(mode="json"),
            "optim": config.optim.model_dump(mode="json"),
            "dtype": config.train.dtype,
        }

    def _fits(self, path: Path) -> bool:
        try:
            return read_state(path).get("layout") == self._layout()
        except CheckpointError:
            return False
