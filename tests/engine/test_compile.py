"""Layers under torch.compile: whole graphs, one for all layers, and the run that there is without it.

Here the graphs are captured and differentiated, and run as they are: making code of them takes a minute a model.
"""

from functools import partial

import pytest
import torch
from layouts import make_config, run_layout
from torch._dynamo.utils import counters

from megascratch.dist.testing import RankPool


@pytest.mark.parametrize("model", ["qwen", "olmo"])
def test_compiled_layers_train_as_they_are(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plain = make_config(model, packed=True, n_layers=4)
    compiled = make_config(model, packed=True, n_layers=4, compile=True)
    got, want = run_layout(compiled, 3), run_layout(plain, 3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for one, other in zip(got.reports, want.reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-9)


def _compiled(steps: int) -> list[float]:
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    try:
        config = make_config(parallel={"dp": 2, "zero": 2}, n_layers=2, compile=True)
        return [report.loss for report in run_layout(config, steps).reports]
    finally:
        torch.compile = torch.compile.func  # type: ignore[attr-defined]


def test_compiled_layers_over_two_ranks(pool: RankPool) -> None:
    want = run_layout(make_config(n_layers=2), 3).reports
    for losses in pool.run(2, _compiled, 3):
        assert losses == pytest.approx([report.loss for report in want], rel=1e-9)
