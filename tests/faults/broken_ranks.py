"""Real ranks, one of which is killed, stopped or made to hang at a chosen place."""

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_run import pretrain_on_ranks

from megascratch.cli.ranks import run_rank
from megascratch.config import Config
from megascratch.dist.launch import Environment

TIMEOUT_S = 2  # of a collective


@dataclass(frozen=True)
class Break:
    """What happens to a rank: `what` (kill, stop, hang, raise) when it comes to `place` in `step`."""

    what: str
    place: str
    rank: int = 1
    step: int = 3


@dataclass(frozen=True)
class Ended:
    """How ranks ended: exit codes, what they wrote to stderr, and seconds from the fault to the end of each of them."""

    codes: list[int | None]
    said: str
    seconds: list[float]


def run_broken(config: Config, world: int, broken: Break | None, folder: Path) -> Ended:
    """Train on `world` processes, one of which breaks."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith("megascratch")))
    folder.mkdir(exist_ok=True)
    processes = [
        context.Process(target=_rank, args=(config, rank, world, store.port, broken, folder), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    ends: list[float] = [0.0] * world
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if not ends[rank] and not process.is_alive():
                ends[rank] = time.time()
        time.sleep(0.02)
    for rank, process in enumerate(processes):
        ends[rank] = ends[rank] or time.time()
        process.kill()
        process.join()
    broke = folder / "broke"
    started = float(broke.read_text()) if broke.exists() else ends[0]
    said = "".join((folder / f"stderr_{rank}").read_text() for rank in range(world))
    return Ended([process.exitcode for process in processes], said, [end - started for end in ends])


def _rank(config: Config, rank: int, world: int, port: int, broken: Break | None, folder: Path) -> None:
    torch.set_num_threads(1)
    descriptor = os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
    wait = timedelta(seconds=TIMEOUT_S if broken else 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    if broken is not None and broken.rank == rank:
        _break_at(broken, folder)

    def work(request: Config, _: Environment | None) -> int:
        return pretrain_on_ranks(request)

    os._exit(run_rank(work, config))


def _break_at(broken: Break, folder: Path) -> None:
    """Put the fault in front of what the place calls."""
    import importlib

    from megascratch.engine.engine import Engine
    from megascratch.optim import Optimizer
    from megascratch.pipeline import Action, Kind

    save = importlib.import_module("megascratch.checkpoint.save")
    kinds = {"forward": (Kind.F,), "backward": (Kind.B, Kind.I)}
    steps = [0]

    def before(owner: Any, name: str, applies: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def replaced(*arguments: Any, **options: Any) -> Any:
            if steps[0] == broken.step and applies(*arguments):
                _break(broken.what, folder)
            return original(*arguments, **options)

        setattr(owner, name, replaced)

    original_step = Engine.train_step

    def counted(engine: Engine, *arguments: Any, **options: Any) -> Any:
        steps[0] = engine.step + 1
        return original_step(engine, *arguments, **options)

    Engine.train_step = counted  # type: ignore[method-assign]
    if broken.place in kinds:

        def is_there(_: Any, __: Any, action: Action, starts: bool) -> bool:
            return starts and action.kind in kinds[broken.place]

        before(Engine, "_on_event", is_there)
    elif broken.place == "optimizer":
        before(Optimizer, "step", lambda *_: True)
    else:
        before(save, "write_pieces", lambda *_: True)


def _break(what: str, folder: Path) -> None:
    (folder / "broke").write_text(str(time.time()))
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "raise":
        raise ValueError("a bug")
    hang(60)


def hang(seconds: float) -> None:
    """Do nothing for long."""
    time.sleep(seconds)
