"""Which checkpoints of a directory are complete, and which of them stay."""

import os
import re
from contextlib import suppress
from pathlib import Path

from megascratch.checkpoint.format import MANIFEST, STATE
from megascratch.checkpoint.places import flush_directory, is_local, remove_tree

STEP_NAME = re.compile(r"step_(\d{8,18})(\.\d{1,4})?")


def complete_steps(root: Path) -> list[Path]:
    """Return the complete checkpoints of a directory, the newest last."""
    found = [path for path in root.glob("step_*") if STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))


def aside(path: Path) -> Path:
    """Return where a checkpoint goes while one of the same step takes its place."""
    return path.with_name(path.name + ".old")


def spare(root: Path) -> Path:
    """Return where the files of a deleted checkpoint lie whose space the next one is to take."""
    return root / "spare.tmp"


def take_spare(root: Path, folder: Path) -> bool:
    """Make the directory that `prune` left for its space a new, unfinished checkpoint.

    Returns: whether there was one.
    """
    if not _is_plain(spare(root)):
        return False
    spare(root).rename(folder)
    for name in (MANIFEST, STATE):
        (folder / name).unlink(missing_ok=True)
    # Should the power fail, what is written over from here on must not come back under a complete checkpoint's name.
    flush_directory(folder)
    flush_directory(root)
    return True


def _is_plain(path: Path) -> bool:
    """Return whether a path is a directory of files alone, and no link to one: what else there is, is the user's."""
    if path.is_symlink() or not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return all(entry.is_file(follow_symlinks=False) for entry in entries)


def prune(root: Path, keep: int, saved: Path, *, keep_every: int = 0, recycle: bool = False) -> None:
    """Delete all but the `keep` newest checkpoints and every `keep_every`-th, and never the one just saved.

    Newest is last written, not highest step: after a run was set back, the abandoned higher steps go first. What cannot
    be deleted is tried again after the next save. `recycle` leaves one for its space, which the next save writes over.
    """
    remove_tree(aside(saved))
    complete = [path for path in complete_steps(root) if path != saved]
    older = complete[: max(0, len(complete) - (keep - 1))] if keep > 0 else []
    surplus = [path for path in older if keep_every == 0 or step_of(path) % keep_every]
    for path in dict.fromkeys([*surplus, *(path for path in complete if step_of(path) == step_of(saved))]):
        with suppress(OSError):
            if is_local(path):
                doomed = path.with_name(path.name + ".tmp")  # from here on it does not look complete
                remove_tree(doomed)
                path = path.rename(doomed)
                if recycle and _is_plain(path) and not os.path.lexists(spare(root)):
                    path.rename(spare(root))
                    continue
            else:
                (path / MANIFEST).unlink()
            remove_tree(path)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's directory is named after."""
    found = STEP_NAME.match(path.name)  # of one set aside, too
    assert found is not None
    return int(found[1])
