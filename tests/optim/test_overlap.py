"""Buckets travel when they should: reductions start inside the backward, and ZeRO-3 has two layers at a time."""

from collections import Counter
from typing import Any

import pytest
import torch
from layouts import make_batches, make_config, make_engine

from megascratch.dist.testing import RankPool
from megascratch.engine import Engine, next_token
from megascratch.optim import BUCKETS_UNDER_WAY
from megascratch.optim.buckets import Bucket
from megascratch.pipeline import Action, Kind


def _record(engine: Engine) -> list[Any]:
    """Record, during a second step, the reductions that start and the actions around them."""
    batches = make_batches(engine.config, engine.mesh)
    engine.train_step(batches.at(0), next_token)
    events: list[Any] = []
    start = Bucket.start_reduction

    def note(bucket: Bucket) -> None:
        events.append(engine.optimizer.buckets.index(bucket))
        start(bucket)

    Bucket.start_reduction = note  # type: ignore[method-assign]
    try:
        engine.train_step(
            batches.at(8), next_token, on_event=lambda a, starts: events.append(f"{'+' if starts else '-'}{a}")
        )
    finally:
        Bucket.start_reduction = start  # type: ignore[method-assign]
    return events


def _reductions(parallel: dict[str, Any]) -> tuple[list[Any], int]:
    engine = make_engine(make_config("llama", parallel))
    return _record(engine), len(engine.optimizer.buckets)


def test_zero_1_reduces_inside_the_last_backward_and_once(pool: RankPool) -> None:
    results = pool.run(2, _reductions, {"dp": 2, "zero": 1})
    assert results[0] == results[1], "in the one order that all ranks have"
    for events, n_buckets in results:
        last = events.index("+0B3"), events.index("-0B3")
        inside = events[last[0] + 1 : last[1]]
        assert sorted(event for event in events if isinstance(event, int)) == list(range(n_buckets))
        assert sorted(inside) == list(range(n_buckets)), "all start before the last backward ends"


def test_zero_2_reduces_in_every_backward(pool: RankPool) -> None:
    for events, n_buckets in pool.run(2, _reductions, {"dp": 2, "zero": 2}):
        for microbatch in range(4):
            first, last = events.index(f"+0B{microbatch}"), events.index(f"-0B{microbatch}")
            assert Counter(events[first + 1 : last]) == Counter(range(n_buckets))


def test_split_backwards_reduce_with_the_weights(pool: RankPool) -> None:
    for rank, (events, n_buckets) in enumerate(
        pool.run(4, _reductions, {"pp": 2, "dp": 2, "zero": 1, "schedule": "zb-h1"})
    ):
        stage = rank // 2
        weights = [i for i, event in enumerate(events) if isinstance(event, str) and event.startswith(f"-{stage}W")]
        reductions = [i for i, event in enumerate(events) if isinstance(event, int)]
        assert len(reductions) == n_buckets
        assert min(reductions) > max(weights), "what was put off is in the sum"


def _whole_gradients(zero: int) -> int:
    """The most buckets whose gradients are whole at once, in a second step."""
    engine = make_engine(make_config("llama", {"dp": 2, "zero": zero}))
    batches = make_batches(engine.config, engine.mesh)
    engine.train_step(batches.at(0), next_token)
    counts = []

    def count(*_: Any) -> None:
        counts.append(sum(bucket._arrived is not None or bucket._reducing is not None for bucket in buckets))

    buckets = engine.optimizer.buckets
    for param in engine.parameters():
        param.register_post_accumulate_grad_hook(count)
    engine.train_step(batches.at(8), next_token)
    return max(counts)


def test_zero_2_has_few_whole_gradients_at_a_time(pool: RankPool) -> None:
    """Two under way, one per unit of a layer that fills: matrices, and the vectors and ends that wait for the stage."""
    n_buckets = pool.run(2, _reductions, {"dp": 2, "zero": 2})[0][1]
    for most in pool.run(2, _whole_gradients, 2):
        assert most <= BUCKETS_UNDER_WAY + 5 < n_buckets


def _gathered_layers(recompute: str) -> list[int]:
    """How many layers' weights are whole, at every use of a layer: in forward, backward and recomputation."""
    engine = make_engine(make_config("llama", {"dp": 2, "zero": 3, "recompute": recompute}))
    batches = make_batches(engine.config, engine.mesh)
    blocks = list(engine.stages[0].layers.values())
    counts: list[int] = []

    def whole(block: torch.nn.Module) -> bool:
        return block.mlp.down.weight.untyped_storage().size() > 0  # type: ignore[union-attr,operator]

    def count(*_: Any) -> None:
        counts.append(sum(whole(block) for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(lambda *_: count())
        block.register_full_backward_pre_hook(lambda *_: count())
    engine.train_step(batches.at(0), next_token)
    assert not any(whole(block) for block in blocks), "released after the step"
    assert sum(bucket.run.numel() for bucket in engine.optimizer.buckets) <= 0.6 * _n_parameters(engine)
    assert all(bucket.grads.numel() == bucket.run.numel() for bucket in engine.optimizer.buckets)
    with engine.gathered():
        assert all(whole(block) for block in blocks)
    return counts


def _n_parameters(engine: Engine) -> int:
    return sum(param.numel() for param in engine.parameters())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_zero_3_has_two_layers_at_a_time(recompute: str, pool: RankPool) -> None:
    for counts in pool.run(2, _gathered_layers, recompute):
        assert len(counts) >= 2 * 4 * 4
        assert max(counts) == 2, "the one in use, and the next one on its way"


def _shards(parallel: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], set[bool]]:
    engine = make_engine(make_config("llama", parallel))
    return engine.mesh.shard.ranks, engine.mesh.replicas.ranks, {b.counts for b in engine.optimizer.buckets}


def test_hybrid_shards_lie_on_neighbouring_ranks(pool: RankPool) -> None:
    got = pool.run(4, _shards, {"dp": 4, "zero": 2, "zero_ranks": 2})
    assert [shard for shard, *_ in got] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [replicas for _, replicas, _ in got] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [counts for *_, counts in got] == [{True}, {True}, {False}, {False}]


def test_an_action_that_is_no_computation_moves_nothing() -> None:
    engine = make_engine(make_config("llama"))
    engine._on_event(None, Action(0, Kind.SEND_F, 0), True)
