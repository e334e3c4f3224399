"""A node that is lost with all in its memory, or that cannot be reached any more."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import EXACT, fault_of
from tiny_run import losses, pretrain_on_ranks, records, run_config, write_corpus
from two_nodes import NAMES, two_nodes

from megascratch.config import Config, to_toml
from megascratch.dist.testing import RankPool
from megascratch.engine.local_copies import LocalCopies

TIMEOUT_S = 2  # of a collective
_TO_END_S = 4.0  # to be told and to leave, for interpreters on a busy machine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def on_nodes_of_two(config: Config, nodes: list[str]) -> int:
    """Train on ranks that pretend to be on nodes of two ranks, each with a directory of its own."""
    node = nodes[torch.distributed.get_rank() // 2]
    LocalCopies.of = classmethod(  # type: ignore[method-assign, assignment]
        lambda cls, engine, run_id: cls(engine, Path(str(config.checkpoint.local_dir)) / node / run_id)
    )
    return pretrain_on_ranks(config)


def replicated(corpus: Path, folder: Path, **train: Any) -> Config:
    checkpoint = {"every": 2, "local_every": 1, "local_dir": str(folder / "ram"), "local_replicate": True}
    sections = {"parallel": {"dp": 4, "zero": 1}, "train": {"dtype": "bf16", **train}, "eval": {"batches": 1}}
    return run_config(corpus, folder, checkpoint=checkpoint, **sections)


def test_a_lost_node_gets_its_copies_from_the_next_one(corpus: Path, tmp_path: Path) -> None:
    """Four ranks on nodes a and b. Their checkpoint is step 2, their copies are step 3; then something happens."""
    with RankPool() as pool:
        reference = replicated(corpus, tmp_path / "reference")
        pool.run(4, on_nodes_of_two, reference, ["a", "b"])
        killed = replicated(corpus, tmp_path, stop_step=3)
        pool.run(4, on_nodes_of_two, killed, ["a", "b"])
        saved, ram = Path(str(killed.checkpoint.dir)), tmp_path / "ram"
        shutil.rmtree(saved / "step_00000003")  # the save at the end did not happen
        (saved / "latest").write_text("step_00000002\n")
        shutil.copytree(tmp_path, tmp_path.with_name("before"))
        copies = "*/rank_0000{}/step_00000003/rank_00000.safetensors"
        for lost, nodes, start in [
            (["b/*"], ["a", "b"], 3),
            (["a/*"], ["a", "b"], 3),
            ([], ["b", "a"], 3),  # started in another order: each has its own from the other node
            (["b/*", "a/*/rank_00003"], ["a", "b"], 2),
            (["b/*", "a/" + copies.format(2)], ["a", "b"], 2),  # a copy that was damaged is sent, and not believed
            (["b/*"], ["a", "c"], 3),  # a new node
        ]:
            shutil.rmtree(tmp_path)
            shutil.copytree(tmp_path.with_name("before"), tmp_path)
            for path in (path for pattern in lost for path in ram.glob(pattern)):
                path.write_bytes(path.read_bytes()[:-9]) if path.is_file() else shutil.rmtree(path)
            pool.run(4, on_nodes_of_two, replicated(corpus, tmp_path, stop_step=4), nodes)
            assert records(killed)[3]["step"] == start + 1, (lost, nodes)
            assert losses(killed) == {step: loss for step, loss in losses(reference).items() if step <= 4}
            if start == 3:
                fault_of("a node lost with its memory, checkpoint.local_replicate").matches(EXACT)
            for node in set(nodes):
                held = sorted(path.name[-1] for path in ram.glob(f"{node}/*/rank_*") if path.is_dir())
                assert held == ["0", "1", "2", "3"], "its own copies and those of the other node"


def test_replication_without_another_node_is_refused(corpus: Path, tmp_path: Path) -> None:
    with RankPool() as pool, pytest.raises(AssertionError) as caught:
        pool.run(4, on_nodes_of_two, replicated(corpus, tmp_path), ["a", "a"])
    fault_of("copies to be replicated on one node").matches(str(caught.value))


def test_a_link_that_goes_down_is_named_on_both_sides(corpus: Path, tmp_path: Path) -> None:
    """A rank on each of two nodes, started as srun does it; the store of their meeting is on the first."""
    config = run_config(
        corpus,
        tmp_path,
        parallel={"dp": 2},
        train={"steps": 100_000, "timeout_s": TIMEOUT_S},
        data={"split": "100,0,0"},
    )
    recipe = tmp_path / "run.toml"
    recipe.write_text(to_toml(config))
    where = {"MASTER_ADDR": NAMES[0], "MASTER_PORT": "29500", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    said = [tmp_path / f"stderr_{rank}" for rank in range(2)]
    with two_nodes(tmp_path) as nodes:
        ranks = []
        for rank in range(2):
            command = nodes.on(rank, sys.executable, "-m", "megascratch", "pretrain", str(recipe))
            env = {**os.environ, **where, "RANK": f"{rank}"}
            with said[rank].open("w") as file:
                ranks.append(subprocess.Popen(command, env=env, stderr=file))
        metrics = Path(config.log.dir) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert all(rank.poll() is None for rank in ranks), [file.read_text() for file in said]
            time.sleep(0.05)
        nodes.cut()
        start, ends = time.monotonic(), []
        for rank in ranks:
            assert rank.wait(timeout=60) == 1
            ends.append(time.monotonic() - start)
    for node, file in zip("ab", said):
        lines = [line for line in file.read_text().splitlines() if " does not answer" in line]
        assert len(lines) == 1, lines
        fault_of(f"the link between two nodes goes down, as node {node} sees it").matches(lines[0])
    assert "on node-b" in said[0].read_text()
    assert max(ends) < TIMEOUT_S + 1 + _TO_END_S
