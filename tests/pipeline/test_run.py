"""The runner: gradients of a pipeline equal those of one serial model, and what it did equals what the checker said."""

import weakref
from collections import deque

import pytest
import torch

from megascratch.dist import comm
from megascratch.dist.mesh import Axis, Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import WeightGradients
from megascratch.nn.linear import column_linear
from megascratch.pipeline import (
    Action,
    Boundary,
    Kind,
    Schedule,
    add_communication,
    check,
    forward_only,
    looped,
    make_schedule,
    mirrored,
    parse_schedule,
    run,
    simulate,
    v_shaped,
)

WIDTH, ROWS = 6, 3
BOUNDARY = Boundary((ROWS, WIDTH), torch.float64, torch.device("cpu"))


def make_layers(n_stages):
    """Two layers a stage, the same on every rank."""
    generator = torch.Generator().manual_seed(n_stages)
    weights = torch.randn(n_stages, 2, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    return [[w.clone().requires_grad_() for w in pair] for pair in weights]


def make_data(m):
    generator = torch.Generator().manual_seed(1000 + m)
    return torch.randn(2, m, ROWS, WIDTH, generator=generator, dtype=torch.float64)


def make_stage(stage, n_stages, weights, data, losses, later=None):
    """Residual two-layer perceptron; the last stage ends in a squared error."""

    def forward(x, microbatch):
        assert (x is None) == (stage == 0)
        assert x is None or x.requires_grad == torch.is_grad_enabled()
        x = data[0, microbatch] if x is None else x
        inner = torch.tanh(column_linear(x, weights[0], Axis("tp"), False, later))
        y = x + column_linear(inner, weights[1], Axis("tp"), False, later)
        if stage < n_stages - 1:
            return y
        losses[microbatch] = (y - data[1, microbatch]).square().sum()
        return losses[microbatch]

    return forward


def serial(n_stages, m):
    """Return losses and weight gradients of the whole model in one piece."""
    layers, data, losses = make_layers(n_stages), make_data(m), {}
    for microbatch in range(m):
        x = None
        for stage, weights in enumerate(layers):
            x = make_stage(stage, n_stages, weights, data, losses)(x, microbatch)
        x.backward()
    return losses, [[weight.grad for weight in weights] for weights in layers]


def run_and_compare(pp, schedule, backward=True):
    """Run a schedule on this rank and compare everything that can be observed."""
    m, n_stages, own = schedule.n_microbatches, schedule.n_stages, schedule.stages_of(pp.rank)
    report = check(schedule, backward=backward)
    layers, data, losses, events = make_layers(n_stages), make_data(m), {}, []
    later = WeightGradients()
    done = run(
        schedule,
        {stage: make_stage(stage, n_stages, layers[stage], data, losses, later) for stage in own},
        pp,
        BOUNDARY,
        backward=backward,
        weight_gradients=later,
        on_event=lambda action, start: events.append((action, start)),
    )
    simulated = [event.action for event in simulate(schedule).events[pp.rank]]
    assert list(done.executed) == simulated
    assert events == [(action, start) for action in simulated for start in (True, False)]
    assert done.peak_in_flight == (report.peak_in_flight[pp.rank] if backward else 0)
    true_losses, true_grads = serial(n_stages, m)
    last = [a.microbatch for a in schedule.actions[pp.rank] if a.stage == n_stages - 1 and a.kind is Kind.F]
    assert sorted(losses) == sorted(last)
    for microbatch, loss in losses.items():
        torch.testing.assert_close(loss.detach(), true_losses[microbatch].detach(), rtol=1e-12, atol=0)
        assert loss.requires_grad == backward
    for stage in range(n_stages):
        for weight, true_grad in zip(layers[stage], true_grads[stage]):
            assert (weight.grad is not None) == (backward and stage in own)
            if backward:  # two copies of a stage have a part each
                total = comm.sum_over(torch.zeros_like(true_grad) if weight.grad is None else weight.grad, pp)
                torch.testing.assert_close(total, true_grad, rtol=1e-12, atol=1e-12)


def run_all(pp):
    """Every schedule, more and fewer microbatches than ranks, one after the other on the same group."""
    cases = [
        ("gpipe", 1, 9),
        ("1f1b", 1, 1),
        ("1f1b", 1, 9),
        ("interleaved", 2, 2 * pp.size),
        ("interleaved", 3, pp.size + 1),
        ("zb-h1", 1, 9),
        ("zb-h2", 1, 2),
        ("zb-v", 2, 3),
        ("zb-v", 2, 9),
        ("v-half", 2, 7),
        ("v-min", 2, 7),
        ("dualpipe-v", 2, 2 * pp.size),
    ]
    if pp.size % 2 == 0:
        cases += [("dualpipe", 1, 2 * pp.size), ("dualpipe", 1, 2 * pp.size + 2)]
    for name, vp, m in cases:
        run_and_compare(pp, add_communication(make_schedule(name, pp.size, vp, m)))
    routes = [looped(pp.size, 1), looped(pp.size, 2), v_shaped(pp.size)]
    routes += [mirrored(pp.size)] if pp.size % 2 == 0 else []
    for route in routes:
        run_and_compare(pp, add_communication(forward_only(route, 7)), backward=False)


@distributed(world=2)
def test_two_ranks_equal_the_serial_model():
    run_all(Mesh.create(MeshSpec(pp=2), torch.device("cpu")).pp)


@distributed(world=4)
def test_four_ranks_equal_the_serial_model():
    run_all(Mesh.create(MeshSpec(pp=4), torch.device("cpu")).pp)


@distributed(world=4)
def test_two_pipelines_side_by_side():
    run_all(Mesh.create(MeshSpec(pp=2, tp=2), torch.device("cpu")).pp)


@distributed(world=2)
def test_a_list_a_user_wrote_with_early_receives():
    """The runner follows the list, whatever wrote it: here every backward of the last rank comes at its end."""
    schedule = add_communication(parse_schedule("0F0 0F1 0F2 0B2 0B0 0B1\n1F0 1F1 1B1 1F2 1B2 1B0"))
    run_and_compare(Mesh.create(MeshSpec(pp=2), torch.device("cpu")).pp, schedule)


@distributed(world=2)
def test_a_list_a_user_wrote_with_stages_anywhere():
    """Stages 0 and 1 on the second rank, 2 and 3 on the first; some backwards are split."""
    text = """
        2F0 3F0 3I0 2I0 3W0 2F1 3F1 2W0 3B1 2B1  # hands over on its own rank
        0F0 1F0 0F1 1F1 1B0 0I0 1I1 0B1 1W1 0W0
    """
    run_and_compare(Mesh.create(MeshSpec(pp=2), torch.device("cpu")).pp, add_communication(parse_schedule(text)))


def test_one_rank_is_the_serial_model():
    run_all(Axis("pp"))


def test_weight_gradients_are_owed_until_w_and_then_freed():
    """Between I and W each layer's input lives on, and no longer; the gradient comes with W."""
    later, inputs = WeightGradients(), []
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)

    def stage(x, microbatch):
        x = torch.ones(ROWS, WIDTH, dtype=torch.float64)
        inputs.append(weakref.ref(x))
        return column_linear(x, weight, Axis("tp"), False, later).sum()

    def on_event(action, start):
        if not start and action.kind is Kind.I:
            assert inputs[0]() is not None
            assert weight.grad is None
        if not start and action.kind is Kind.W:
            assert inputs[0]() is None
            torch.testing.assert_close(weight.grad, torch.full_like(weight, ROWS))

    schedule = parse_schedule("0F0 0I0 0W0")
    run(schedule, {0: stage}, Axis("pp"), BOUNDARY, weight_gradients=later, on_event=on_event)
    assert not later.is_collecting


def test_a_stage_of_the_wrong_shape_is_caught():
    schedule = Schedule([[Action.parse(word) for word in ("0F0", "1F0")]], looped(1, 2), 1)
    stages = {0: lambda x, microbatch: torch.zeros(2, 2), 1: lambda x, microbatch: x}
    with pytest.raises(AssertionError, match=r"0F0 gives \(2, 2\), not \(3, 6\)"):
        run(schedule, stages, Axis("pp"), BOUNDARY, backward=False)


def test_few_sends_are_under_way_at_once(monkeypatch):
    """Send buffers are bounded by four, whatever the number of microbatches; every send is waited for in the end."""
    under_way, counts = deque(), []

    class Sent:
        def wait(self):
            assert under_way.popleft() is self

    def isend(x, axis, peer, tag):
        under_way.append(Sent())
        counts.append((len(under_way), peer, tag))
        return under_way[-1]

    monkeypatch.setattr(comm, "isend", isend)
    schedule = add_communication(forward_only(looped(2, 1), 20))
    stages = {0: lambda x, microbatch: torch.zeros(ROWS, WIDTH, dtype=torch.float64)}
    run(schedule, stages, Axis("pp", size=2, ranks=(0, 1)), BOUNDARY, backward=False)
    assert max(count for count, _, _ in counts) == 4
    assert not under_way
    assert {peer for _, peer, _ in counts} == {1}
    assert len({tag for _, _, tag in counts}) == 20


def test_a_forward_keeps_its_graph_but_not_its_output():
    """The output's buffer is free once sent; the graph lives until the backward."""
    weight, outputs = torch.randn(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True), []

    def stage(x, microbatch):
        y = (torch.ones(ROWS, WIDTH, dtype=torch.float64) @ weight).sum()
        outputs.append(weakref.ref(y))
        return y

    def on_event(action, start):
        assert start or outputs[-1]() is None, f"the output lives on after {action}"

    schedule = make_schedule("gpipe", 1, 1, 3)
    assert run(schedule, {0: stage}, Axis("pp"), BOUNDARY, on_event=on_event).peak_in_flight == 3
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 3 * ROWS))
