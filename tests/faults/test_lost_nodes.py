"""A node that is lost with all in its memory, or that cannot be reached any more."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import EXACT, fault_of
from tiny_run import losses, pretrain_on_ranks, records, run_config, write_corpus

from megascratch.config import Config
from megascratch.dist.testing import RankPool
from megascratch.engine.local_copies import LocalCopies


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
