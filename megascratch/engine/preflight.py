"""Preflight: measure every rank and every link before they cost a run, and name what differs from the rest.

A large run is as fast as its slowest rank, and stops with its first broken one. So each rank says what it is (versions,
disk) and how fast (a matrix product, memory, the disk), all of them together how fast they add up, and each pair how
fast it talks. Pairs meet as in a tournament, so that all ranks are busy in each of n − 1 rounds; by hand, for 4 ranks:

    round 0   0–3  1–2        rank 0 stays, the others move on by one place
    round 1   0–2  3–1
    round 2   0–1  2–3

What is slower than `tolerance` times the median is named: a rank where most of its links are slow, a link otherwise.
"""

import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megascratch
from megascratch.dist import comm
from megascratch.dist.agreement import code_digest
from megascratch.dist.mesh import Mesh

_LEAST_FREE_BYTES = 1 << 30
_CPU = {"side": 768, "copy": 64 << 20, "sum": 4 << 20, "sent": 4 << 20}  # of matrices; bytes
_GPU = {"side": 8192, "copy": 2 << 30, "sum": 256 << 20, "sent": 64 << 20}
_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class Finding:
    """What a rank found out.

    Attributes:
        host: its machine.
        facts: what must be equal on all ranks.
        rates: by name with unit, higher is better.
        troubles: what is wrong by itself.
    """

    host: str
    facts: dict[str, str]
    rates: dict[str, float]
    troubles: list[str]


def rounds(n: int) -> Iterator[list[tuple[int, int]]]:
    """Yield disjoint pairs, so that over all rounds each two of n ranks meet once."""
    places = list(range(n)) + ([-1] if n % 2 else [])  # with an odd number one rests
    for _ in range(len(places) - 1):
        pairs = [(places[i], places[-1 - i]) for i in range(len(places) // 2)]
        yield [pair for pair in pairs if -1 not in pair]
        places = [places[0], places[-1], *places[1:-1]]


def inspect_rank(mesh: Mesh, folder: Path) -> Finding:
    """Measure this rank by itself.

    Args:
        mesh: its place and device.
        folder: that the run will write to.
    """
    sizes = _GPU if mesh.device.type == "cuda" else _CPU
    x = torch.randn(sizes["side"], sizes["side"], device=mesh.device)
    x = x.bfloat16() if mesh.device.type == "cuda" else x
    source = torch.ones(sizes["copy"], dtype=torch.uint8, device=mesh.device)
    target = torch.empty_like(source)
    rates = {
        "matrix product TFLOP/s": 2 * sizes["side"] ** 3 / _seconds(lambda: x @ x, mesh) / 1e12,
        "memory GB/s": 2 * sizes["copy"] / _seconds(lambda: target.copy_(source), mesh) / 1e9,
    }
    troubles = []
    try:
        rates["disk GB/s"] = _DISK_BYTES / _write_seconds(folder) / 1e9
        if (free := shutil.disk_usage(folder).free) < _LEAST_FREE_BYTES:
            troubles.append(f"{folder} has {free / 1e6:.0f} MB free, less than {_LEAST_FREE_BYTES / 1e9:.1f} GB")
    except OSError as error:
        troubles.append(f"{folder} cannot be written: {error.strerror or error}")
    try:
        with socket.socket() as listener:
            listener.bind(("", 0))
            listener.listen()
    except OSError as error:
        troubles.append(f"no port can be opened: {error.strerror or error}")
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else platform.machine(),
        "megascratch": megascratch.__version__,
        "its code": code_digest(),
    }
    return Finding(socket.gethostname(), facts, rates, troubles)


def measure_links(mesh: Mesh) -> tuple[float, dict[tuple[int, int], float]]:
    """Measure transfers between ranks. Every rank calls this at the same point.

    Returns: GB/s of an all-reduce over the world (bytes of the buffer a second), and of each pair, both ways at once;
        the pairs on every rank.
    """
    world, sizes = mesh.world, _GPU if mesh.device.type == "cuda" else _CPU
    buffer = torch.ones(sizes["sum"], dtype=torch.uint8, device=mesh.device)
    together_s = torch.tensor(_seconds(lambda: comm.sum_over(buffer, world), mesh), device=mesh.device)
    together = sizes["sum"] / comm.max_over(together_s, world).item() / 1e9
    sent = torch.ones(sizes["sent"], dtype=torch.uint8, device=mesh.device)
    received = torch.empty_like(sent)
    own: dict[str, float] = {}
    for pairs in rounds(world.size):
        comm.barrier(world)
        for a, b in pairs:
            if world.rank in (a, b):
                peer = b if world.rank == a else a

                def swap(peer: int = peer) -> None:
                    for work in (comm.isend(sent, world, peer, 0), comm.irecv(received, world, peer, 0)):
                        work.wait()

                rate = sizes["sent"] / _seconds(swap, mesh) / 1e9
                if world.rank == a:
                    own[f"{min(a, b)}-{max(a, b)}"] = rate
    everyones = comm.gather_bytes(json.dumps(own).encode(), world, mesh.device)
    links = {key: rate for data in everyones for key, rate in json.loads(data).items()}
    return together, {(int(a), int(b)): rate for key, rate in links.items() for a, b in [key.split("-")]}


def outliers(findings: Sequence[Finding], links: dict[tuple[int, int], float], tolerance: float) -> list[str]:
    """Return one line for each thing that is broken, or differs from the rest.

    Args:
        findings: of each rank.
        links: rate of each pair.
        tolerance: a rate below this many times the median is named.
    """
    lines = [f"rank {r} on {f.host}: {trouble}" for r, f in enumerate(findings) for trouble in f.troubles]
    for name in findings[0].facts:
        usual, _ = Counter(f.facts[name] for f in findings).most_common(1)[0]
        lines += [
            f"rank {r} on {f.host}: {name} is {f.facts[name]}, elsewhere {usual}"
            for r, f in enumerate(findings)
            if f.facts[name] != usual
        ]
    for name in findings[0].rates:
        rates = {r: f.rates[name] for r, f in enumerate(findings) if name in f.rates}
        usual_rate = statistics.median(rates.values())
        lines += [
            f"rank {r} on {findings[r].host}: {name} {rate:.3g}, the median is {usual_rate:.3g}"
            for r, rate in rates.items()
            if rate < tolerance * usual_rate
        ]
    return lines + _slow_links(findings, links, tolerance)


def _slow_links(findings: Sequence[Finding], links: dict[tuple[int, int], float], tolerance: float) -> list[str]:
    if not links:
        return []
    usual = statistics.median(links.values())
    slow = {pair: rate for pair, rate in links.items() if rate < tolerance * usual}
    lines, told = [], set()
    for rank, finding in enumerate(findings):
        own = [pair for pair in links if rank in pair]
        if len(own) > 1 and 2 * sum(pair in slow for pair in own) > len(own):
            told.add(rank)
            rate = statistics.median(links[pair] for pair in own)
            lines.append(f"rank {rank} on {finding.host}: transfers {rate:.3g} GB/s, the median is {usual:.3g}")
    for (a, b), rate in slow.items():
        if not told & {a, b}:
            hosts = f"{a} on {findings[a].host} and {b} on {findings[b].host}"
            lines.append(f"ranks {hosts}: transfers {rate:.3g} GB/s, the median is {usual:.3g}")
    return lines


def preflight(mesh: Mesh, folder: Path, tolerance: float) -> tuple[list[str], list[str]]:
    """Measure all ranks and links. Every rank calls this at the same point.

    Returns: lines that describe what was measured, and lines that name what is wrong; the same on every rank.
    """
    own = inspect_rank(mesh, folder)
    together, links = measure_links(mesh) if mesh.world.size > 1 else (0.0, {})
    everyones = comm.gather_bytes(json.dumps(vars(own)).encode(), mesh.world, mesh.device)
    findings = [Finding(**json.loads(data)) for data in everyones]
    hosts = len({finding.host for finding in findings})
    lines = [f"{len(findings)} rank{'s' if len(findings) > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"]
    lines += [f"{name:<24} {value}" for name, value in findings[0].facts.items()]
    for name in findings[0].rates:
        lines.append(f"{name:<24} {_range([f.rates[name] for f in findings if name in f.rates])}")
    if links:
        lines += [f"{'all-reduce GB/s':<24} {together:.3g}", f"{'pairs GB/s':<24} {_range([*links.values()])}"]
    return lines, outliers(findings, links, tolerance)


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} (from {min(values):.3g} to {max(values):.3g})"


def _seconds(work: Callable[[], Any], mesh: Mesh, repeats: int = 3) -> float:
    """Return the shortest of a few times, after one that does not count."""
    best = float("inf")
    for repeat in range(repeats + 1):
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        start = time.perf_counter()
        work()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        took = time.perf_counter() - start
        best = min(best, took) if repeat else best
    return best


def _write_seconds(folder: Path) -> float:
    """Return how long it takes to write and flush a file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"preflight_{socket.gethostname()}_{os.getpid()}"
    try:
        start = time.perf_counter()
        with file.open("xb") as out:
            out.write(bytes(_DISK_BYTES))
            out.flush()
            os.fsync(out.fileno())
        return time.perf_counter() - start
    finally:
        file.unlink(missing_ok=True)
