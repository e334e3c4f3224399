"""The runner: gradients of a pipeline equal those of one serial model, and what it did equals what the checker said."""

import weakref
from collections import deque

import pytest
import torch

from megascratch.dist import comm
from megascratch.dist.mesh import Axis, Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.pipeline import (
    SCHEDULES,
    Action,
    Boundary,
    ScheduleError,
    add_communication,
    check,
    forward_only,
    run,
)

WIDTH, ROWS = 6, 3
BOUNDARY = Boundary((ROWS, WIDTH), torch.float64, torch.device("cpu"))


def make_layers(n_stages):
    """Two layers a stage, the same on every rank."""
    generator = torch.Generator().manual_seed(n_stages)
    weights = torch.randn(n_stages, 2, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    return [w.clone().requires_grad_() for w in weights]


def make_data(m):
    generator = torch.Generator().manual_seed(1000 + m)
    return torch.randn(2, m, ROWS, WIDTH, generator=generator, dtype=torch.float64)


def make_stage(stage, n_stages, weight, data, losses):
    """Residual two-layer perceptron; the last stage ends in a squared error."""

    def forward(x, microbatch):
        assert (x is None) == (stage == 0)
        assert x is None or x.requires_grad == torch.is_grad_enabled()
        x = data[0, microbatch] if x is None else x
        y = x + torch.tanh(x @ weight[0]) @ weight[1]
        if stage < n_stages - 1:
            return y
        losses[microbatch] = (y - data[1, microbatch]).square().sum()
        return losses[microbatch]

    return forward


def serial(n_stages, m):
    """Return losses and weight gradients of the whole model in one piece."""
    weights, data, losses = make_layers(n_stages), make_data(m), {}
    for microbatch in range(m):
        x = None
        for stage, weight in enumerate(weights):
            x = make_stage(stage, n_stages, weight, data, losses)(x, microbatch)
        x.backward()
    return losses, [weight.grad for weight in weights]


def run_and_compare(pp, schedule, n_stages, m, backward=True):
    """Run a schedule on this rank and compare everything that can be observed."""
    report = check(schedule, n_stages, m, backward=backward)
    weights, data, losses, events = make_layers(n_stages), make_data(m), {}, []
    own = range(pp.rank, n_stages, pp.size)
    stages = {stage: make_stage(stage, n_stages, weights[stage], data, losses) for stage in own}
    done = run(
        schedule[pp.rank],
        stages,
        pp,
        BOUNDARY,
        n_stages=n_stages,
        backward=backward,
        on_event=lambda action, start: events.append((action, start)),
    )
    assert done.executed == tuple(schedule[pp.rank])
    assert events == [(action, start) for action in schedule[pp.rank] for start in (True, False)]
    assert done.peak_in_flight == (report.peak_in_flight[pp.rank] if backward else 0)
    true_losses, true_grads = serial(n_stages, m)
    assert sorted(losses) == (list(range(m)) if n_stages - 1 in own else [])
    for microbatch, loss in losses.items():
        torch.testing.assert_close(loss.detach(), true_losses[microbatch].detach(), rtol=1e-12, atol=0)
        assert loss.requires_grad == backward
    for stage in own:
        if backward:
            torch.testing.assert_close(weights[stage].grad, true_grads[stage], rtol=1e-12, atol=1e-12)
        else:
            assert weights[stage].grad is None


def run_all(pp):
    """Every schedule, more and fewer microbatches than ranks, one after the other on the same group."""
    cases = [
        ("gpipe", 1, 9),
        ("1f1b", 1, 1),
        ("1f1b", 1, 9),
        ("interleaved", 2, 2 * pp.size),
        ("interleaved", 3, pp.size),
    ]
    for name, vp, m in cases:
        n_stages = vp * pp.size
        run_and_compare(pp, add_communication(SCHEDULES[name](pp.size, vp, m), n_stages), n_stages, m)
    for vp, m in [(1, 7), (2, 3)]:
        n_stages = vp * pp.size
        run_and_compare(pp, add_communication(forward_only(pp.size, vp, m), n_stages), n_stages, m, backward=False)


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
    texts = ["0F0 0F1 0F2 0B2 0B0 0B1", "1F0 1F1 1B1 1F2 1B2 1B0"]
    schedule = add_communication([[Action.parse(word) for word in text.split()] for text in texts], 2)
    run_and_compare(Mesh.create(MeshSpec(pp=2), torch.device("cpu")).pp, schedule, 2, 3)


def test_one_rank_is_the_serial_model():
    run_all(Axis("pp"))


def test_a_split_backward_is_refused_before_anything_runs():
    def never(x, microbatch):
        raise AssertionError("ran")

    actions = [Action.parse(word) for word in ("0F0", "0I0", "0W0")]
    with pytest.raises(ScheduleError, match=r"0I0 +splits the backward, which no stage here supports"):
        run(actions, {0: never}, Axis("pp"), BOUNDARY, n_stages=1)


def test_a_stage_of_the_wrong_shape_is_caught():
    actions = [Action.parse(word) for word in ("0F0", "1F0")]
    stages = {0: lambda x, microbatch: torch.zeros(2, 2), 1: lambda x, microbatch: x}
    with pytest.raises(AssertionError, match=r"0F0 gives \(2, 2\), not \(3, 6\)"):
        run(actions, stages, Axis("pp"), BOUNDARY, n_stages=2, backward=False)


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
    schedule = add_communication(forward_only(2, 1, 20), 2)
    stages = {0: lambda x, microbatch: torch.zeros(ROWS, WIDTH, dtype=torch.float64)}
    run(schedule[0], stages, Axis("pp", size=2, ranks=(0, 1)), BOUNDARY, n_stages=2, backward=False)
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

    (actions,) = SCHEDULES["gpipe"](1, 1, 3)
    assert run(actions, {0: stage}, Axis("pp"), BOUNDARY, n_stages=1, on_event=on_event).peak_in_flight == 3
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 3 * ROWS))
