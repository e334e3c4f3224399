"""Every schedule passes the checker, holds what its closed form says, and runs in the order that its papers give."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.pipeline import SCHEDULES, ScheduleError, add_communication, check, forward_only
from megascratch.pipeline.action import Kind

GRID = [
    (name, pp, vp, m)
    for name, pp, vp, m in itertools.product(SCHEDULES, (1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 4, 6, 8, 16, 24))
    if (m % pp == 0 if name == "interleaved" else vp == 1)
]


def complete(name, pp, vp, m):
    return add_communication(SCHEDULES[name](pp, vp, m), pp * vp)


def text(actions):
    return " ".join(map(str, actions))


def closed_form_peak(name, pp, vp, m, rank):
    warmup = {"gpipe": m - 1, "1f1b": pp - rank - 1, "interleaved": 2 * (pp - rank - 1) + (vp - 1) * pp}[name]
    return min(vp * m, warmup + 1)


@pytest.mark.parametrize(("name", "pp", "vp", "m"), GRID)
def test_schedule_passes_with_its_closed_form_peak(name, pp, vp, m):
    report = check(complete(name, pp, vp, m), pp * vp, m)
    assert report.peak_in_flight == tuple(closed_form_peak(name, pp, vp, m, rank) for rank in range(pp))


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_any_size_passes(name, pp, vp, m):
    vp, m = (vp, m * pp) if name == "interleaved" else (1, m)
    check(complete(name, pp, vp, m), pp * vp, m)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 13))
@settings(max_examples=60, deadline=None)
def test_forward_only_passes_for_any_number_of_microbatches(pp, vp, m):
    schedule = add_communication(forward_only(pp, vp, m), pp * vp)
    check(schedule, pp * vp, m, backward=False)
    assert {action.kind for actions in schedule for action in actions} <= {Kind.F, Kind.SEND_F, Kind.RECV_F}


def test_one_f_one_b_by_hand():
    assert [text(actions) for actions in SCHEDULES["1f1b"](3, 1, 4)] == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_gpipe_by_hand():
    assert [text(actions) for actions in SCHEDULES["gpipe"](2, 1, 2)] == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]


def test_interleaved_by_hand():
    assert [text(actions) for actions in SCHEDULES["interleaved"](2, 2, 2)] == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


def test_forward_only_by_hand():
    assert [text(actions) for actions in forward_only(2, 2, 3)] == [
        "0F0 0F1 2F0 2F1 0F2 2F2",
        "1F0 1F1 3F0 3F1 1F2 3F2",
    ]


def test_one_rank_accumulates_gradients():
    assert [text(actions) for actions in complete("1f1b", 1, 1, 3)] == ["0F0 0B0 0F1 0B1 0F2 0B2"]


@pytest.mark.parametrize(("pp", "vp", "m"), [(2, 2, 4), (4, 2, 4), (4, 2, 8), (4, 3, 16), (8, 4, 32)])
def test_interleaved_has_megatrons_order(pp, vp, m):
    """Against megatron-core's own table and warm-up counts."""
    megatron = pytest.importorskip("megatron.core.pipeline_parallel.schedules", reason="megatron-core is not installed")
    table = megatron.get_schedule_table(m, vp, pp)

    class Place:
        virtual_pipeline_model_parallel_size = vp

        class pp_group:
            size = staticmethod(lambda: pp)

    for rank, actions in enumerate(SCHEDULES["interleaved"](pp, vp, m)):
        Place.pp_group.rank = staticmethod(lambda rank=rank: rank)
        _, _, warmup, _ = megatron.get_pp_rank_microbatches(m, vp, pp, p2p_communicator=Place)
        kinds = [action.kind for action in actions]
        assert kinds == [Kind.F] * warmup + [Kind.F, Kind.B] * (m * vp - warmup) + [Kind.B] * warmup
        forwards = [(a.microbatch, a.stage // pp) for a in actions if a.kind is Kind.F]
        backwards = [(a.microbatch, vp - 1 - a.stage // pp) for a in actions if a.kind is Kind.B]
        assert forwards == backwards == table


def test_sends_stand_beside_receives_in_the_worked_example():
    assert [text(actions) for actions in complete("1f1b", 2, 1, 2)] == [
        "0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1",
        "1RF0 1F0 1RF1 1B0 1SB0 1F1 1B1 1SB1",
    ]


@pytest.mark.parametrize(("name", "pp", "vp", "m"), [("gpipe", 4, 1, 6), ("1f1b", 4, 1, 9), ("interleaved", 3, 3, 9)])
def test_two_ranks_list_their_messages_in_one_order(name, pp, vp, m):
    """NCCL pairs the messages of two ranks by order alone."""
    messages = {}
    for rank, actions in enumerate(complete(name, pp, vp, m)):
        for action in actions:
            if not action.kind.is_compute:
                step = {Kind.SEND_F: 1, Kind.RECV_F: -1, Kind.SEND_B: -1, Kind.RECV_B: 1}[action.kind]
                peer = (action.stage + step) % pp
                sender = action.stage if action.kind in (Kind.SEND_F, Kind.SEND_B) else action.stage + step
                message = (sender, action.microbatch, action.kind in (Kind.SEND_F, Kind.RECV_F))
                messages.setdefault((rank, peer), []).append(message)
    assert messages
    for (rank, peer), order in messages.items():
        assert order == messages[peer, rank]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_stage_a_rank_is_enforced(name):
    with pytest.raises(ScheduleError, match=f"vp = 2  the {name} schedule runs one stage a rank  use vp = 1"):
        SCHEDULES[name](4, 2, 8)


def test_interleaved_needs_whole_rounds():
    with pytest.raises(ScheduleError, match=r"microbatches = 6  must divide by pp = 4 .* use 8"):
        SCHEDULES["interleaved"](4, 2, 6)
