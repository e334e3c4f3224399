"""Checkpoints beside torch DCP: saving, loading and resharding the same state on the same ranks, in turn.

    python tools/bench/checkpoint.py --folder /dev/shm/bench --gib 2 --disk /tmp/bench

Every rank holds half the rows of 16 float32 matrices. Loading is on the same layout, resharding into half the columns.
Checksums are on, as always; DCP has none. Each figure is the best of the rounds, in GB/s of the whole state. A save
takes new pages. In the steady state it takes the files of the checkpoint that `keep` has just given up, as a run with
`checkpoint.recycle` does after its first few, and as local copies always do; DCP, which keeps none, is given its own
last checkpoint to write over.
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded

from megascratch.checkpoint import Saving, Shard, Staging, load, save
from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec, Split, extents
from megascratch.dist.mesh import Axis, Mesh, MeshSpec

RANKS, TENSORS, COLUMNS = 2, 16, 4096
CHUNK = 4 << 20


class State:
    """16 matrices [rows, columns], of which this rank holds half the rows, or half the columns."""

    def __init__(self, rows: int, dim: int, mesh: Mesh) -> None:
        self.rows, self.dim, self.mesh = rows, dim, mesh
        shape = [rows, COLUMNS]
        shape[dim] //= RANKS
        self.tensors = [torch.full(shape, float(i + mesh.rank)) for i in range(TENSORS)]

    @property
    def bytes(self) -> int:
        """Of all ranks."""
        return RANKS * sum(t.nbytes for t in self.tensors)

    def ours(self) -> list[Shard]:
        spec = ParamSpec("w", (self.rows, COLUMNS), (Split(self.dim, "tp"),))
        place = extents(spec, {"tp": RANKS}, {"tp": self.mesh.rank})
        return [Shard(f"w{i}", (self.rows, COLUMNS), tensor, place) for i, tensor in enumerate(self.tensors)]

    def dcps(self) -> dict[str, Tensor]:
        device_mesh = init_device_mesh("cpu", (RANKS,))
        shards = [Sharded(self.dim)]
        return {f"w{i}": DTensor.from_local(t, device_mesh, shards) for i, t in enumerate(self.tensors)}


def plain_write(folder: Path, state: State) -> None:
    """Write the same bytes with nothing around them, and flush them to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"plain_{state.mesh.rank}").open("wb", buffering=0) as file:
        for tensor in state.tensors:
            data = tensor.view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK):
                file.write(data[start : start + CHUNK])
        os.fsync(file.fileno())


def timed(work: Callable[[], object], world: Axis) -> float:
    """Return the seconds until all ranks are through."""
    comm.barrier(world)
    start = time.perf_counter()
    work()
    comm.barrier(world)
    return time.perf_counter() - start


def blocked(folder: Path, state: State, staging: Staging) -> tuple[float, float]:
    """Return the seconds that an asynchronous save holds a step up for: when it begins, and when it is published."""
    world = state.mesh.world
    saving: list[Saving] = []

    def begin() -> None:
        saving.append(Saving(folder, 1, state.ours(), {}, world, staging=staging))
        saving[0].start()

    beginning = timed(begin, world)
    saving[0].wait()
    return beginning, timed(lambda: saving[0].publish(clean=lambda path: None), world)


def on_rank(rank: int, store: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = Mesh.create(MeshSpec(tp=RANKS), torch.device("cpu"))
    rows = int(arguments.gib * 2**30) // (TENSORS * COLUMNS * 4)
    state, other = State(rows, 0, mesh), State(rows, 1, mesh)
    world, folder = mesh.world, Path(arguments.folder)
    steps = itertools.count(1)
    work: dict[str, Callable[[], object]] = {
        "save": lambda: save(folder / "ours", next(steps), state.ours(), {}, world),
        "save dcp": partial(dcp.save, state.dcps(), checkpoint_id=folder / "dcp"),
        "steady save": lambda: save(folder / "ours", next(steps), state.ours(), {}, world, keep=1, recycle=True),
        "steady save dcp": partial(dcp.save, state.dcps(), checkpoint_id=folder / "dcp"),
        "load": partial(load, folder / "ours", state.ours()),
        "load dcp": partial(dcp.load, state.dcps(), checkpoint_id=folder / "dcp"),
        "reshard": partial(load, folder / "ours", other.ours()),
        "reshard dcp": partial(dcp.load, other.dcps(), checkpoint_id=folder / "dcp"),
    }
    best: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, run in work.items():
            if name in ("save", "save dcp") and rank == 0:
                shutil.rmtree(folder / ("dcp" if "dcp" in name else "ours"), ignore_errors=True)
            if name == "steady save":
                run()  # makes the first one spare
            best[name] = min(best.get(name, 1e9), timed(run, world))
    if rank == 0:
        shutil.rmtree(folder / "dcp")
    staging = Staging(state.bytes // RANKS)
    staging.copy([])  # waits until the memory is there, as it is after the first steps of a run
    blocks = [blocked(folder / "ours", state, staging) for _ in range(2)]
    if arguments.disk is not None:
        disk = Path(arguments.disk)
        work = {
            "plain": partial(plain_write, disk, state),
            "disk": partial(save, disk / "ours", 1, state.ours(), {}, world),
        }
        for _ in range(arguments.disk_rounds):
            for name, run in work.items():
                best[name] = min(best.get(name, 1e9), timed(run, world))
                if rank == 0:
                    shutil.rmtree(disk)
    if rank == 0:
        report(state, best, blocks, staging)
        shutil.rmtree(folder)
    comm.barrier(world)
    dist.destroy_process_group()


def report(state: State, best: dict[str, float], blocks: list[tuple[float, float]], staging: Staging) -> None:
    gb = state.bytes / 1e9
    print(f"{gb:.2f} GB on {RANKS} ranks, GB/s         ours    dcp   ratio")
    for name in ("save", "steady save", "load", "reshard"):
        ours, theirs = gb / best[name], gb / best[f"{name} dcp"]
        print(f"{name:30} {ours:6.2f} {theirs:6.2f} {ours / theirs:6.2f}×")
    for which, (beginning, publishing) in zip(("first", "next"), blocks):
        a_gb = (beginning + publishing) / (gb / RANKS)
        print(f"{which} asynchronous save blocks {beginning:.3f} + {publishing:.3f} s: {a_gb:.2f} s a GB of a rank")
    print(f"memory held {staging.bytes / (state.bytes / RANKS):.3f} × the shard")
    if "disk" in best:
        print(f"on disk {best['plain'] / best['disk']:.0%} of a plain fsynced write ({gb / best['plain']:.2f} GB/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/dev/shm/megascratch-bench", help="emptied at the end")
    parser.add_argument("--gib", type=float, default=2.0, help="of state in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", help="a folder on a disk, for the plain write; emptied at the end")
    parser.add_argument("--disk-rounds", type=int, default=2)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (str(Path(folder) / "store"), parser.parse_args()), nprocs=RANKS)


if __name__ == "__main__":
    main()
