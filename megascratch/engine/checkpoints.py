"""When a run saves, what becomes of a save that fails, and where a run goes on from.

    step n      due: copy ─┐                     (asynchronous; otherwise the step waits for the disk)
    step n+1    …          │ a thread writes
    step n+2    …          ┘
    step n+3    every rank has written: publish ─ or tell what failed, and leave the last good one as it is

All that ranks decide together, they decide by what one collective a step brings them: see `Vote`.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megascratch.checkpoint import (
    Saving,
    Shard,
    Staging,
    aligned,
    complete_steps,
    find,
    load,
    place,
    prune,
    read_state,
    shared_pieces,
    step_of,
)
from megascratch.config import Config
from megascratch.dist import comm
from megascratch.engine.engine import Engine
from megascratch.engine.local_copies import LocalCopies
from megascratch.engine.state import (
    companion_name,
    companion_shards,
    engine_shards,
    engine_state,
    load_engine,
    load_weights,
    optimizer_shards,
    restore_counters,
)
from megascratch.errors import CheckpointError, DamagedCheckpoint, Problem


@dataclass(frozen=True)
class Vote:
    """What a rank has to say about saving after a step; ranks agree on the maximum of each."""

    due: bool  # by rank 0's clock
    writing: bool  # an earlier checkpoint, still


class Checkpoints:
    """Saves an engine as `[checkpoint]` asks. Every rank calls each method at the same point.

    Args:
        engine: what is saved.
        console: rank-aware.
        local: copies, besides.
        resumable_every: steps between the points where a run can be resumed; saving waits for one.
        companions: further engines by name, which a checkpoint holds too. Local copies do not, so there are none.

    Attributes:
        saved_step: of the last checkpoint that was published or begun by this process, or None.
    """

    def __init__(
        self,
        engine: Engine,
        console: Console,
        local: LocalCopies | None = None,
        resumable_every: int = 1,
        companions: Mapping[str, Engine] | None = None,
    ) -> None:
        self.resumable_every, self.companions = resumable_every, companions or {}
        self.engine, self.console = engine, console
        self.saved_step: int | None = None
        self.config = engine.config.checkpoint
        assert self.config.dir is not None
        self.root = place(self.config.dir)
        self.local = None if self.companions else local
        self._staging = None
        if self.config.asynchronous:
            n_bytes = sum(aligned(piece.bytes) for piece in shared_pieces(self._shards()))
            self._staging = Staging(n_bytes, pinned=engine.mesh.device.type == "cuda")
        self._pending: Saving | None = None
        self._cleaner: threading.Thread | None = None
        self._last_s = time.monotonic()  # a clock that nobody sets

    def vote(self) -> Vote:
        """Return what this rank has to say."""
        every_s = self.config.every_s
        due = every_s is not None and self.engine.mesh.rank == 0 and time.monotonic() - self._last_s >= every_s
        return Vote(due, self._pending is not None and self._pending.is_writing)

    def after_step(self, agreed: Vote, consumed_samples: int, extra: Mapping[str, Any], *, ending: bool) -> None:
        """Save if it is time to, and publish what has been written meanwhile.

        Args:
            agreed: on by all ranks.
            consumed_samples: where in the data the run stands.
            extra: more for `state.json`.
            ending: whether this is the last step of this process, which is saved whatever `every` says.

        Raises: CheckpointError: on every rank, if a checkpoint could not be written and `on_failure` is stop.
        """
        step, every = self.engine.step, self.config.every_steps
        resumable = step % self.resumable_every == 0
        due = resumable and (agreed.due or (every > 0 and step % every < self.resumable_every))
        try:
            if self._pending is not None and not agreed.writing:
                self._publish()
            if ending or due:
                self._save(consumed_samples, extra, ending)
        except CheckpointError as error:
            self._last_s = time.monotonic()
            if ending or self.config.on_failure == "stop":
                self._finish_copies()
                raise
            self.console.print(f"after step {step}: no checkpoint, training goes on: {error}")
        if self.local is not None and resumable and step % self.config.local_every < self.resumable_every:
            self.local.save(engine_state(self.engine, consumed_samples) | dict(extra))
        if ending:
            self._finish_copies()

    def _finish_copies(self) -> None:
        """See that copies have arrived on other nodes before the ranks part."""
        if self.local is not None:
            self.local.finish()

    def _save(self, consumed_samples: int, extra: Mapping[str, Any], ending: bool) -> None:
        if self._pending is not None:
            self._wait_for_pending(ending)
        state = engine_state(self.engine, consumed_samples) | dict(extra)
        for name, engine in self.companions.items():
            state[companion_name(name)] = engine_state(engine, consumed_samples) | {"step": engine.step}
        mesh, staging = self.engine.mesh, None if ending else self._staging
        self._last_s = time.monotonic()
        recycle = self.config.recycle
        saving = Saving(
            self.root, self.engine.step, self._shards(), state, mesh.world, mesh.device, staging, recycle=recycle
        )
        self._pending = saving
        if staging is not None:
            saving.start()
        else:
            saving.write()
            self._publish()
        if ending and self._cleaner is not None:
            self._cleaner.join()  # before the directory is another job's

    def _shards(self) -> list[Shard]:
        shards = [*engine_shards(self.engine), *optimizer_shards(self.engine)]
        for name, engine in self.companions.items():
            shards += companion_shards(name, engine)
        return shards

    def _wait_for_pending(self, ending: bool) -> None:
        """Wait for the checkpoint before this one, and publish it.

        Raises: CheckpointError: if it is still not written after `deadline_s`, as where storage hangs.
        """
        saving, mesh = self._pending, self.engine.mesh
        assert saving is not None
        saving.wait(self.config.deadline_s)
        stuck = [
            rank for rank, hangs in enumerate(comm.gather_flags(saving.is_writing, mesh.world, mesh.device)) if hangs
        ]
        if not stuck:
            self._publish()
            return
        if ending:
            self._pending = None  # its thread ends with the process
        rule = f"is still being written by ranks {stuck} after {self.config.deadline_s} s"
        raise CheckpointError(Problem(f"step {saving.step}", rule, "look after the storage"), str(self.root))

    def _publish(self) -> None:
        assert self._pending is not None
        saving, self._pending = self._pending, None
        path = saving.publish(clean=self._clean)
        self.saved_step = saving.step
        self.console.print(f"saved {path}")

    def _clean(self, saved: Path) -> None:
        """Delete what `keep` no longer wants, beside the training where saving is too: it takes long on some disks."""
        if self._cleaner is not None:
            self._cleaner.join()
        config = self.config
        clean = partial(prune, self.root, config.keep, saved, keep_every=config.keep_every, recycle=config.recycle)
        self._cleaner = threading.Thread(target=clean)
        self._cleaner.start()
        if self._staging is None:
            self._cleaner.join()


def resume(engine: Engine, config: Config, console: Console, local: LocalCopies | None = None) -> dict[str, Any] | None:
    """Load what the run goes on from: `checkpoint.load`, or else the newest state of its own that is good.

    The local copies win where they are newer and there is one of every rank. A damaged checkpoint is named, and the one
    before it taken: what was trained since is trained again, on the same samples.

    Returns: the state of the run (`consumed_samples` and what the trainer added), or None where there is nothing.

    Raises: CheckpointError: if the one that was asked for, or all of them, cannot be loaded.
    """
    if config.checkpoint.load is not None:
        path = place(config.checkpoint.load)
        consumed_samples = load_engine(engine, path)
        console.print(f"resumed from {path} after step {engine.step}")
        return _weights_alone(read_state(path)) | {"consumed_samples": consumed_samples, "path": str(path)}
    assert config.checkpoint.dir is not None
    root = place(config.checkpoint.dir)
    candidates = _candidates(root)
    newest = candidates[0][0] if candidates else -1
    if local is not None and (state := local.load(newer_than=newest, console=console)) is not None:
        return state
    for i, (_, path) in enumerate(candidates):
        error = _agreed_error(engine, path)
        if error is None:
            console.print(f"resumed from {path} after step {engine.step}")
            return read_state(path) | {"path": str(path)}
        if i + 1 == len(candidates):
            raise error
        console.print(f"{error}\ngoing back to {candidates[i + 1][1]}")
    if config.checkpoint.init is not None:
        load_weights(engine, place(config.checkpoint.init))
        console.print(f"began with the weights of {config.checkpoint.init}")
    return None


def resume_companions(companions: Mapping[str, Engine], state: Mapping[str, Any]) -> None:
    """Load further engines from the checkpoint that the run goes on from.

    Args:
        companions: by name.
        state: from `resume`. One without them, as of the checkpoint that the run began with, leaves them as they are.
    """
    for name, engine in companions.items():
        if (saved := state.get(companion_name(name))) is not None:
            load(find(place(state["path"])), companion_shards(name, engine))
            restore_counters(engine, saved)


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of a run's checkpoints: the one that `latest` names, then what was written before it."""
    if not (root / "latest").exists():
        return []
    newest = find(root)
    others = [path for path in reversed(complete_steps(root)) if path != newest]
    return [(step_of(path), path) for path in (newest, *(p for p in others if step_of(p) < step_of(newest)))]


def _agreed_error(engine: Engine, path: Path) -> DamagedCheckpoint | None:
    """Load a checkpoint; return the damage that any rank met in it, on every rank."""
    mesh, own = engine.mesh, None
    try:
        load_engine(engine, path)
    except DamagedCheckpoint as error:
        own = error
    problems = comm.gather_problems(own.problems if own else [], mesh.world, mesh.device)
    return DamagedCheckpoint(list(dict.fromkeys(problems)), str(path)) if problems else None


def _weights_alone(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a run, or nothing where a checkpoint is one of weights alone, which starts a run."""
    return state if "updates" in state else {}
