"""Generation on the weights in training: every layout hands them over whole, and completes the same."""

import functools
from typing import Any

import pytest
import torch
from layouts import Layout, local_weights, make_config, make_engine, train_steps, whole_weights
from layouts import Trained as Weights

from megascratch.align.generator import Generator
from megascratch.dist.layout import extents, spec_of
from megascratch.dist.testing import RankPool
from megascratch.errors import LayoutError
from megascratch.infer import Sampling

LAYOUTS = [
    (Layout("pp2-tp2-sp", {"pp": 2, "tp": 2}), None),
    (Layout("pp2-tp2-to-tp1", {"pp": 2, "tp": 2}, "tied"), 1),
    (Layout("cp2-dp2-zero3", {"cp": 2, "dp": 2, "zero": 3}, "gpt2"), None),
    (Layout("pp2-dp2-zero3-to-tp4", {"pp": 2, "dp": 2, "zero": 3}, "tied"), 4),
    (Layout("dualpipe-tp2", {"pp": 2, "tp": 2, "schedule": "dualpipe"}, "tied"), 2),
    (Layout("pp2-vp2-zero1", {"pp": 2, "vp": 2, "dp": 2, "zero": 1}, "qwen"), 2),
    (Layout("ep2-tp2", {"dp": 2, "ep": 2, "tp": 2}, "moe"), 1),
    (Layout("tp4-to-tp2", {"tp": 4}, "mla"), 2),
]


def _run(config: Any, tp: int | None) -> tuple[list[Any], list[Any], list[tuple[list[int], list[float], bool]]]:
    """Return the weights before a step, the generator's after one and a sync, and what it completes then."""
    engine = make_engine(config)
    generator = Generator(engine, tp)
    train_steps(engine, 1)
    generator.sync()
    copied = [
        (spec_of(p).name, spec_of(p).shape, extent.logical, p.detach()[extent.local].clone())
        for p in generator.stage.parameters()
        for extent in extents(spec_of(p), generator.mesh.spec.sizes, generator.mesh.coords)
    ]
    done = generator.complete(
        [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]],
        Sampling(temperature=1.5, seed=3),
        max_tokens=8,
        stop_ids=range(0, 61, 9),
        n_ids=None,
        samples=3,
        first_sequence=100,
        batch=6,
    )
    return local_weights(engine), copied, [(c.tokens.tolist(), c.logprobs.tolist(), c.stopped) for c in done]


@functools.cache
def _one_rank(model: str, n_layers: int) -> Any:
    torch.set_num_threads(1)
    return _run(make_config(model, n_layers=n_layers), None)


@pytest.mark.parametrize(("layout", "tp"), LAYOUTS, ids=[layout.name for layout, _ in LAYOUTS])
def test_a_layout_generates_what_one_rank_does(layout: Layout, tp: int | None, pool: RankPool) -> None:
    _, _, expected = _one_rank(layout.model, layout.n_layers)
    ranks = pool.run(layout.world, _run, layout.config(), tp)
    trained = whole_weights([Weights([], [], weights) for weights, _, _ in ranks])
    copied = whole_weights([Weights([], [], copied) for _, copied, _ in ranks])
    assert copied.keys() == trained.keys()
    for name, want in trained.items():
        assert torch.equal(copied[name], want), name
    assert len({len(tokens) for tokens, _, _ in expected}) > 2
    for _, _, done in ranks:
        for (tokens, logprobs, stopped), (their_tokens, their_logprobs, their_stopped) in zip(
            done, expected, strict=True
        ):
            assert (tokens, stopped) == (their_tokens, their_stopped)
            assert logprobs == pytest.approx(their_logprobs, rel=1e-9)


def test_one_rank_shares_its_weights() -> None:
    engine = make_engine(make_config("tied", n_layers=2))
    generator = Generator(engine)
    theirs = {p.data_ptr() for p in engine.parameters()}
    assert {p.data_ptr() for p in generator.stage.parameters()} == theirs


def test_a_layout_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"parallel.tp = 3 +must divide model.n_heads = 8"):
        Generator(make_engine(make_config("tied", n_layers=2)), tp=3)
