"""Debug mode: it lets what is right pass on any layout, and names who leaves a collective out."""

import re
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from layouts import Layout, make_engine, train_steps

from megascratch.dist.testing import RankPool
from megascratch.engine.totals import DeviceTotals
from megascratch.errors import CollectiveError


def _train_in_debug_mode(layout: Layout, astray: bool) -> str:
    """Run two steps in debug mode, and return the message of the error that ends them; rank 1 may leave a sum out."""
    engine = make_engine(layout.config(debug_collectives=True))
    try:
        train_steps(engine, 1)
        alone = DeviceTotals(["", "\t"], torch.tensor([0.0, 1.0], dtype=torch.float64))
        forgotten = patch("megascratch.engine.engine.totals_of", lambda sums, mesh: alone)
        with forgotten if astray and engine.mesh.rank == 1 else nullcontext():
            train_steps(engine, 1)
    except CollectiveError as error:
        return str(error)
    return ""


_EVERYTHING = (
    Layout("tp2-pp2-dp2", {"tp": 2, "pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h1"}, "tied"),
    Layout("cp2-dp4-ep2", {"cp": 2, "dp": 4, "ep": 2, "zero": 3}, "moe"),
    Layout(
        "pp2-cp2-dp2", {"pp": 2, "cp": 2, "dp": 2, "zero": 2, "zero_ranks": 2, "schedule": "dualpipe"}, optim="muon"
    ),
)


@pytest.mark.parametrize("layout", _EVERYTHING, ids=lambda layout: layout.name)
def test_debug_mode_lets_a_step_pass(layout: Layout, pool: RankPool) -> None:
    assert pool.run(layout.world, _train_in_debug_mode, layout, False) == [""] * layout.world


def test_debug_mode_names_the_ranks_the_line_and_the_step(pool: RankPool) -> None:
    layout = Layout("tp2-dp2", {"tp": 2, "dp": 2, "zero": 1})
    messages = pool.run(layout.world, _train_in_debug_mode, layout, True)
    for message in messages:
        assert re.search(r"rank 1  step 2: all_reduce over \w+ .* at optim/", message)
        assert re.search(r"rank 3  step 2: all_reduce over data .* at engine/totals\.py:\d+ totals_of", message)
