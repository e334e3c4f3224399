"""Ranks that should hold equal weights, and do not, are told before the first step."""

import pytest
import torch
from layouts import make_config, make_engine

from megascratch.dist.agreement import code_digest, tensor_digest
from megascratch.dist.layout import spec_of
from megascratch.dist.testing import RankPool
from megascratch.engine.state import require_equal_replicas


def _check(parallel: dict, model: str, spoil: str | None) -> None:  # type: ignore[type-arg]
    engine = make_engine(make_config(model, parallel))
    for param in engine.parameters():
        if spec_of(param).name == spoil and engine.mesh.rank == engine.mesh.world.size - 1:
            param.data.view(-1)[0] += 2.0**-40
    require_equal_replicas(engine)


@pytest.mark.parametrize(
    ("parallel", "model"),
    [({"dp": 2, "tp": 2}, "tied"), ({"dp": 4, "ep": 2}, "moe"), ({"dp": 2, "cp": 2, "zero": 3}, "llama")],
)
def test_equal_replicas_pass(parallel: dict, model: str, pool: RankPool) -> None:  # type: ignore[type-arg]
    pool.run(4, _check, parallel, model, None)


def test_a_single_bit_on_one_rank_is_named(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 3: layers\.1\.mlp\.down\.weight = \w+ +must be \w+, as on rank 1"):
        pool.run(4, _check, {"dp": 2, "tp": 2}, "llama", "layers.1.mlp.down.weight")


def test_digests_tell_bits_apart() -> None:
    x = torch.zeros(3)
    assert tensor_digest(x) != tensor_digest(-x), "minus zero is another value"
    assert tensor_digest(x) == tensor_digest(x.clone())
    assert code_digest() == code_digest()
