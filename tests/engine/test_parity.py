"""Layout is not physics: every layout computes the same loss, gradient norm and weights, to 1e-9 in float64."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from combinations import completions, why_not, world_of
from layouts import GIVEN, MODELS, Layout, Trained, make_config, run_layout, whole_weights
from matrix import matrix

from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec
from megascratch.dist.testing import RankPool, run_ranks
from megascratch.nn import Placement

N_STEPS = 5
SUM_OVER = comm.sum_over
LAYOUTS, IMPOSSIBLE = matrix()


@functools.cache
def one_rank(model: str, packed: bool = False, n_layers: int = 4, optim: str = "adamw") -> Trained:
    """The reference: the same steps on one rank, one micro-batch after another."""
    torch.set_num_threads(1)
    return run_layout(make_config(model, packed=packed, n_layers=n_layers, optim=optim), N_STEPS)


def assert_equal_runs(ranks: list[Trained], reference: Trained) -> None:
    for rank, trained in enumerate(ranks):
        for step, (got, want) in enumerate(zip(trained.reports, reference.reports, strict=True), start=1):
            where = f"rank {rank}, step {step}"
            assert got.loss == pytest.approx(want.loss, rel=1e-9), where
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-9), where
            assert got.lr == want.lr
    weights = whole_weights(ranks)
    for name, want in whole_weights([reference]).items():
        error = (weights[name] - want).norm() / want.norm().clamp_min(1e-30)
        assert error < 1e-9, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("layout", [*LAYOUTS, *GIVEN], ids=lambda layout: layout.name)
def test_a_layout_computes_what_one_rank_computes(layout: Layout, pool: RankPool) -> None:
    ranks = pool.run(layout.world, run_layout, layout.config(), N_STEPS)
    assert_equal_runs(ranks, one_rank(layout.model, layout.packed, layout.n_layers, layout.optim))


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_goes_down_and_clipping_is_at_work(model: str) -> None:
    """Parity of a model that learns nothing, or never clips, would prove little."""
    reports = one_rank(model).reports
    assert all(report.grad_norm > 0.5 for report in reports), "the gradient is never clipped"
    assert reports[0].loss == pytest.approx(4.1, abs=0.8)


def _without_norm_gradient_sync(config, n_steps: int) -> Trained:  # type: ignore[no-untyped-def]
    Placement.token_axes = property(lambda self: ())  # type: ignore[assignment]
    return run_layout(config, n_steps)


def test_a_mutant_without_the_gradient_sync_of_norm_weights_is_caught() -> None:
    """Under sequence parallelism each rank sees a part of the tokens; forgetting to sum a norm's gradient must show."""
    ranks = run_ranks(2, _without_norm_gradient_sync, make_config("llama", {"tp": 2}, n_layers=2), N_STEPS)
    with pytest.raises(AssertionError):
        assert_equal_runs(ranks, one_rank("llama", n_layers=2))


def _with_experts_summed_over_all_of_dp(config, n_steps: int) -> Trained:  # type: ignore[no-untyped-def]
    ParamSpec.data_axis = property(lambda self: "data")  # type: ignore[assignment,method-assign]
    return run_layout(config, n_steps)


def _with_balance_of_own_tokens(config, n_steps: int) -> Trained:  # type: ignore[no-untyped-def]
    comm.sum_over = lambda x, axis: x if axis.name == "cp" else SUM_OVER(x, axis)
    return run_layout(config, n_steps)


@pytest.mark.parametrize(
    ("mutant", "model", "parallel"),
    [
        (_with_experts_summed_over_all_of_dp, "moe", {"dp": 2, "ep": 2, "zero": 1}),
        (_with_balance_of_own_tokens, "moe-capacity", {"cp": 2}),
    ],
)
def test_mutants_of_the_experts_are_caught(
    mutant: Callable[..., Trained], model: str, parallel: dict[str, Any]
) -> None:
    """Different experts' gradients summed over ep; a sequence's load counted on each rank of cp by itself."""
    ranks = run_ranks(2, mutant, make_config(model, parallel, n_layers=4), N_STEPS)
    with pytest.raises(AssertionError):
        assert_equal_runs(ranks, one_rank(model, n_layers=4))


def test_the_matrix_is_what_it_promises() -> None:
    """At least 120 layouts of up to 8 ranks, no two alike; what no layout has is refused or needs more ranks."""
    assert len(LAYOUTS) >= 120
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert max(layout.world for layout in LAYOUTS) == 8
    assert {layout.model for layout in LAYOUTS} == set(MODELS)
    for combination in IMPOSSIBLE:
        for values in completions(dict(combination)):
            assert world_of(values) > 8 or why_not(values) is not None, f"{combination} should be possible"
