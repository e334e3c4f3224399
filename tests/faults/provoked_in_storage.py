"""Storage that is full, read-only, lost or slow, and jobs that share it."""

import importlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fault_table import EXACT, fault
from ground import Ground
from tiny_run import losses

from megascratch.checkpoint import complete_steps, place
from megascratch.engine import pretrain
from megascratch.engine.metrics import RunDirectory

STORAGE = "Storage"
save_module = importlib.import_module("megascratch.checkpoint.save")


def fail_after(ground: Ground, step: int, error: OSError) -> None:
    """Let every save from a step on fail where it writes pieces."""
    original = save_module.write_pieces

    def write(path: Path, *rest: Any, **options: Any) -> Any:
        if int(path.parent.name[5:13]) >= step:
            raise error
        return original(path, *rest, **options)

    ground.monkeypatch.setattr(save_module, "write_pieces", write)


def newest(ground: Ground) -> str:
    return (ground.folder / "run/checkpoints/latest").read_text().strip()


@fault(STORAGE, "a full disk (a tmpfs of 300 kB)", "rank 0: … cannot be written: No space left on device … make room")
def full_disk(ground: Ground) -> str:
    small = ground.folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        config = ground.config(checkpoint={"dir": str(small / "checkpoints"), "every": 1})
        said = ground.said_by(lambda: pretrain(config, None))
        assert not list(small.glob("checkpoints/*.tmp")), "a full disk does not stay full of half a checkpoint"
    finally:
        subprocess.run(["umount", str(small)], check=True)
    return said


@fault(STORAGE, "a full disk, checkpoint.on_failure = stop", "rank 0: … cannot be written: No space left on device")
def full_and_stop(ground: Ground) -> str:
    fail_after(ground, 4, OSError(28, "No space left on device"))
    said = ground.said_by(lambda: pretrain(ground.config(), None))
    assert newest(ground) == "step_00000002"
    return said


@fault(STORAGE, "a full disk for a while, on_failure = continue", "after step 4: no checkpoint, training goes on: …")
def full_and_continue(ground: Ground) -> str:
    original = save_module.write_pieces

    def write(path: Path, *rest: Any, **options: Any) -> Any:
        if path.parent.name.startswith("step_00000004"):
            raise OSError(28, "No space left on device")
        return original(path, *rest, **options)

    ground.monkeypatch.setattr(save_module, "write_pieces", write)
    config = ground.config(checkpoint={"on_failure": "continue"})
    assert pretrain(config, None) == 0
    assert losses(config) == ground.trained.losses
    assert newest(ground) == "step_00000006"
    return ground.captured()


@fault(STORAGE, "a disk that becomes read-only", "rank 0: … cannot be written: Read-only file system")
def read_only(ground: Ground) -> str:
    fail_after(ground, 4, OSError(30, "Read-only file system"))
    return ground.said_by(lambda: pretrain(ground.config(checkpoint={"asynchronous": True}), None))


@fault(STORAGE, "a run stopped by a full disk, and the same command again", EXACT)
def resumed_after_full(ground: Ground) -> str:
    with ground.patch() as patched:
        original = save_module.write_pieces

        def write(path: Path, *rest: Any, **options: Any) -> Any:
            if path.parent.name.startswith("step_00000004"):
                raise OSError(28, "No space left on device")
            return original(path, *rest, **options)

        patched.setattr(save_module, "write_pieces", write)
        ground.said_by(lambda: pretrain(ground.config(), None))
    return ground.resumes()


@fault(STORAGE, "the folder of checkpoints is deleted while training", "saved …step_00000006")
def lost_folder(ground: Ground) -> str:
    fold = ground.folder / "run/checkpoints"
    original = save_module.write_contents

    def write(folder: Path, *rest: Any) -> Any:
        if folder.name.startswith("step_00000004"):
            shutil.rmtree(fold)
        return original(folder, *rest)

    ground.monkeypatch.setattr(save_module, "write_contents", write)
    assert pretrain(ground.config(checkpoint={"on_failure": "continue"}), None) == 0
    said = ground.captured()
    assert "after step 4: no checkpoint" in said
    return said


@fault(
    STORAGE,
    "storage that hangs while saving",
    "step 2 is still being written by ranks [0] after 1 s look after the storage",
)
def hanging(ground: Ground) -> str:
    let_go, original = threading.Event(), save_module.write_pieces

    def write(*arguments: Any, **options: Any) -> Any:
        let_go.wait()
        return original(*arguments, **options)

    ground.monkeypatch.setattr(save_module, "write_pieces", write)
    config = ground.config(checkpoint={"asynchronous": True, "deadline_s": 1})
    said = ground.said_by(lambda: pretrain(config, None))
    let_go.set()
    return said


@fault(STORAGE, "checkpoint.dir is a file", "rank 0: … cannot be written: …")
def a_file(ground: Ground) -> str:
    (ground.folder / "file").write_text("mine")
    said = ground.said_by(lambda: pretrain(ground.config(checkpoint={"dir": str(ground.folder / "file")}), None))
    assert (ground.folder / "file").read_text() == "mine"
    return said


@fault(
    STORAGE,
    "two jobs in one run directory",
    "log.dir = … is in use by process … on … stop that job, or set another log.dir",
)
def two_jobs(ground: Ground) -> str:
    holder = RunDirectory(ground.config(), writes=True)
    try:
        return ground.said_by(lambda: pretrain(ground.config(), None))
    finally:
        holder.close()


@fault(STORAGE, "a URL whose scheme nobody knows", "nowhere://bucket/run is not a URL that can be opened")
def unknown_scheme(ground: Ground) -> str:
    return ground.said_by(lambda: pretrain(ground.config(checkpoint={"dir": "nowhere://bucket/run"}), None))


@fault(STORAGE, "an object store that fails between pieces and manifest, and the same command again", EXACT)
def lost_bucket(ground: Ground) -> str:
    config = ground.config(checkpoint={"dir": f"memory://{ground.folder.name}/checkpoints"})
    with ground.patch() as patched:
        original = save_module.write_contents

        def write(folder: Path, *rest: Any) -> Any:
            if "step_00000004" in folder.name:
                raise OSError(5, "the connection was lost")
            return original(folder, *rest)

        patched.setattr(save_module, "write_contents", write)
        ground.said_by(lambda: pretrain(config, None))
    return ground.resumes(config)


@fault(STORAGE, "the clock jumps back a day while checkpoints are due by minutes", "saved …step_00000006")
def clock_jump(ground: Ground) -> str:
    real, jumped = time.time, [0]

    def now() -> float:
        jumped[0] += 1
        return real() - (86_400 if jumped[0] > 20 else 0)

    ground.monkeypatch.setattr(time, "time", now)
    config = ground.config(checkpoint={"every": "0.0001 min"})
    assert pretrain(config, None) == 0
    root = place(str(config.checkpoint.dir))
    assert len(complete_steps(root)) > 1
    assert losses(config) == ground.trained.losses
    return ground.captured()


@fault(STORAGE, "checkpoints whose times were set back, and keep", EXACT)
def old_times(ground: Ground) -> str:
    path = ground.stopped()
    for file in path.rglob("*"):
        os.utime(file, (0, 0))
    return ground.resumes(ground.config(checkpoint={"keep": 1}))


@fault(STORAGE, "no local copy on one node", EXACT)
def lost_copy(ground: Ground) -> str:
    local = {"local_every": 1, "local_dir": str(ground.folder / "ram")}
    assert pretrain(ground.config(checkpoint=local, train={"stop_step": 4}), None) == 0
    shutil.rmtree(ground.folder / "ram")
    return ground.resumes(ground.config(checkpoint=local))


@fault(STORAGE, "a damaged local copy", EXACT)
def damaged_copy(ground: Ground) -> str:
    local = {"local_every": 1, "local_dir": str(ground.folder / "ram"), "every": 3}
    assert pretrain(ground.config(checkpoint=local, train={"stop_step": 5}), None) == 0
    newest_own = ground.folder / "run/checkpoints/step_00000005"
    shutil.rmtree(newest_own)
    (newest_own.parent / "latest").write_text("step_00000003\n")
    copy = next(ground.folder.glob("ram/*/rank_00000/step_00000005/rank_00000.safetensors"))
    data = bytearray(copy.read_bytes())
    data[-9] ^= 1
    copy.write_bytes(data)
    return ground.resumes(ground.config(checkpoint=local))
