"""What preflight measures, and whom it names."""

import itertools
from pathlib import Path

import pytest
import torch

from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import RankPool
from megascratch.engine import preflight as module
from megascratch.engine.preflight import Finding, outliers, preflight, rounds


@pytest.mark.parametrize("n", range(1, 10))
def test_each_two_ranks_meet_once_and_nobody_is_in_two_pairs_of_a_round(n: int) -> None:
    played = list(rounds(n))
    for pairs in played:
        ranks = list(itertools.chain.from_iterable(pairs))
        assert len(ranks) == len(set(ranks))
    met = [frozenset(pair) for pairs in played for pair in pairs]
    assert len(met) == len(set(met)) == n * (n - 1) // 2


def finding(rank: int, rate: float = 10.0, torch_version: str = "2.13", troubles: tuple[str, ...] = ()) -> Finding:
    return Finding(f"node{rank // 2}", {"torch": torch_version}, {"memory GB/s": rate}, list(troubles))


LINKS = {(a, b): 5.0 for a in range(4) for b in range(a + 1, 4)}


def test_equal_ranks_are_well() -> None:
    assert outliers([finding(rank, 9 + rank / 4) for rank in range(4)], LINKS, 0.5) == []


def test_who_differs_is_named() -> None:
    findings = [finding(0), finding(1, troubles=("runs cannot be written: Read-only file system",))]
    findings += [finding(2, torch_version="2.12"), finding(3, rate=4.0)]
    assert outliers(findings, LINKS, 0.5) == [
        "rank 1 on node0: runs cannot be written: Read-only file system",
        "rank 2 on node1: torch is 2.12, elsewhere 2.13",
        "rank 3 on node1: memory GB/s 4, the median is 10",
    ]


def test_a_slow_link_is_a_link_and_a_rank_of_slow_links_a_rank() -> None:
    findings = [finding(rank) for rank in range(4)]
    one = {**LINKS, (0, 2): 1.0}
    assert outliers(findings, one, 0.5) == ["ranks 0 on node0 and 2 on node1: transfers 1 GB/s, the median is 5"]
    many = {pair: 1.0 if 3 in pair else rate for pair, rate in {**LINKS, (0, 1): 6.0, (0, 2): 6.0}.items()}
    assert outliers(findings, many, 0.5) == ["rank 3 on node1: transfers 1 GB/s, the median is 3"]


def _measure(folder: Path, slow: int | None) -> tuple[list[str], list[str]]:
    module._CPU.update(side=64, copy=1 << 20, sum=1 << 16, sent=1 << 16)
    mesh = Mesh.create(MeshSpec(dp=3), torch.device("cpu"))
    if mesh.rank == slow:
        folder = folder / "file"
        folder.write_text("mine")
    return preflight(mesh, folder, 0.0)


def test_ranks_measure_each_other(tmp_path: Path, pool: RankPool) -> None:
    results = pool.run(3, _measure, tmp_path, None)
    assert results[0] == results[1] == results[2], "all ranks come to the same end"
    lines, wrong = results[0]
    assert wrong == []
    assert lines[0] == "3 ranks on 1 host"
    for name in ("matrix product TFLOP/s", "memory GB/s", "disk GB/s", "all-reduce GB/s", "pairs GB/s"):
        assert any(line.startswith(name) for line in lines)
    assert list(tmp_path.iterdir()) == []
    _, wrong = pool.run(3, _measure, tmp_path, 1)[0]
    assert len(wrong) == 1
    assert wrong[0].startswith("rank 1 on ")
    assert wrong[0].endswith("cannot be written: File exists")
