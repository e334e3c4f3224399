"""Every schedule passes the checker, holds what its closed form says, and runs in the order that its papers give."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.config.check import CHUNKS
from megascratch.pipeline import (
    SCHEDULES,
    Costs,
    Schedule,
    ScheduleError,
    add_communication,
    check,
    forward_only,
    looped,
    make_schedule,
    mirrored,
    parse_schedule,
    simulate,
    split_backward,
    v_shaped,
)
from megascratch.pipeline.action import Kind


def complete(name, pp, vp, m):
    return add_communication(make_schedule(name, pp, vp, m))


def text(actions):
    return " ".join(map(str, actions))


def closed_form_peak(name, pp, vp, m, rank):
    warmup = {"gpipe": m - 1, "1f1b": pp - rank - 1, "interleaved": 2 * (pp - rank - 1) + (vp - 1) * pp}[name]
    return min(vp * m, warmup + 1)


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_schedule_passes_with_its_closed_form_peak(name, pp):
    chunks = (1, 2, 3) if name == "interleaved" else (1,)
    for vp, m in itertools.product(chunks, (1, 2, 3, 4, 6, 8, 16, 24)):
        if name != "interleaved" or m % pp == 0:
            peaks = check(complete(name, pp, vp, m)).peak_in_flight
            assert peaks == tuple(closed_form_peak(name, pp, vp, m, rank) for rank in range(pp))


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_memory_of_the_zero_bubble_schedules(pp):
    """In activations of a rank's whole layers, 1F1B holds pp; V-Half holds half of that and V-Min a third."""

    def peak(name):
        family = SCHEDULES[name]
        return max(check(complete(name, pp, family.n_chunks, 6 * pp)).peak_in_flight) / family.n_chunks

    assert peak("1f1b") == peak("zb-h1") == peak("zb-v") == pp
    assert peak("zb-h2") == 2 * pp - 1
    assert peak("v-half") == pp / 2 + 1 or pp == 2
    assert peak("v-min") <= pp / 3 + 2
    assert peak("dualpipe-v") == pp + 1 / 2
    assert peak("dualpipe") == pp + 1


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 13), st.booleans())
@settings(max_examples=60, deadline=None)
def test_forward_only_passes_for_any_number_of_microbatches(pp, vp, m, folded):
    schedule = add_communication(forward_only(v_shaped(pp) if folded else looped(pp, vp), m))
    check(schedule, backward=False)
    assert {action.kind for actions in schedule.actions for action in actions} <= {Kind.F, Kind.SEND_F, Kind.RECV_F}


def test_one_f_one_b_by_hand():
    assert [text(actions) for actions in make_schedule("1f1b", 3, 1, 4).actions] == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_gpipe_by_hand():
    assert [text(own) for own in make_schedule("gpipe", 2, 1, 2).actions] == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]


def test_interleaved_by_hand():
    assert [text(actions) for actions in make_schedule("interleaved", 2, 2, 2).actions] == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


def test_interleaved_rounds_are_even_where_pp_does_not_divide_m():
    first = [action.microbatch for action in make_schedule("interleaved", 3, 2, 8).actions[0] if action.kind is Kind.F]
    assert first == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


def test_forward_only_by_hand():
    assert [text(actions) for actions in forward_only(looped(2, 2), 3).actions] == [
        "0F0 0F1 2F0 2F1 0F2 2F2",
        "1F0 1F1 3F0 3F1 1F2 3F2",
    ]


def test_zero_bubble_by_hand():
    """The diagrams in the modules."""
    assert [text(actions) for actions in make_schedule("zb-h1", 2, 1, 3).actions] == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]
    assert [text(actions) for actions in make_schedule("zb-h2", 2, 1, 3).actions] == [
        "0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2",
        "1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2",
    ]
    assert text(make_schedule("zb-v", 2, 2, 4).actions[0]).startswith("0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0")
    assert text(make_schedule("zb-v", 2, 2, 4).actions[1]).startswith("1F0 2F0 1F1 2F1 2I0 2W0 1F2")


def test_one_rank_accumulates_gradients():
    assert [text(actions) for actions in complete("1f1b", 1, 1, 3).actions] == ["0F0 0B0 0F1 0B1 0F2 0B2"]


@pytest.mark.parametrize("name", [name for name, family in SCHEDULES.items() if family.limit])
def test_weight_gradients_of_a_stage_are_summed_in_the_order_of_microbatches(name):
    """So every schedule of equal placement gives the same bits."""
    vp = SCHEDULES[name].n_chunks
    for actions in make_schedule(name, 4, vp, 9 if "dual" not in name else 10, Costs(1.2, 0.9, 0.7, 0.3)).actions:
        for stage in {action.stage for action in actions}:
            order = [action.microbatch for action in actions if action.stage == stage and action.kind is Kind.W]
            if name == "dualpipe":  # two directions, each in order
                assert [i for i in order if i < 5] + [i for i in order if i >= 5] == sorted(order)
            else:
                assert order == list(range(len(order)))


def test_costs_decide_where_weight_gradients_go():
    order = parse_schedule("0F0 0F1 0F2 0I0 0I1 0I2\n1F0 1I0 1F1 1I1 1F2 1I2")
    cheap = split_backward(order, 3, Costs(1, 1, 0.1))
    assert text(cheap.actions[0]) == "0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2"
    assert text(cheap.actions[1]).startswith("1F0 1I0 1F1 1I1 1F2 1I2")
    tight = split_backward(order, 1, Costs())
    assert text(tight.actions[1]) == "1F0 1I0 1W0 1F1 1I1 1W1 1F2 1I2 1W2"


@pytest.mark.parametrize(("pp", "vp", "m"), [(2, 2, 4), (4, 2, 4), (4, 2, 8), (4, 3, 16), (8, 4, 32)])
def test_interleaved_has_megatrons_order(pp, vp, m):
    """Against megatron-core's own table and warm-up counts."""
    megatron = pytest.importorskip("megatron.core.pipeline_parallel.schedules", reason="megatron-core is not installed")
    table = megatron.get_schedule_table(m, vp, pp)

    class Place:
        virtual_pipeline_model_parallel_size = vp

        class pp_group:
            size = staticmethod(lambda: pp)

    for rank, actions in enumerate(make_schedule("interleaved", pp, vp, m).actions):
        Place.pp_group.rank = staticmethod(lambda rank=rank: rank)
        _, _, warmup, _ = megatron.get_pp_rank_microbatches(m, vp, pp, p2p_communicator=Place)
        kinds = [action.kind for action in actions]
        assert kinds == [Kind.F] * warmup + [Kind.F, Kind.B] * (m * vp - warmup) + [Kind.B] * warmup
        forwards = [(a.microbatch, a.stage // pp) for a in actions if a.kind is Kind.F]
        backwards = [(a.microbatch, vp - 1 - a.stage // pp) for a in actions if a.kind is Kind.B]
        assert forwards == backwards == table


@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 13), (8, 16)])
def test_zb_v_has_torchs_order(pp, m):
    """Against torch's own generator, in the order of F and I; where W go is for costs and memory to say."""
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    calculate = getattr(torch_schedules.ScheduleZBVZeroBubble, "_calculate_single_rank_operations", None)
    if calculate is None:
        pytest.skip("this torch has no ScheduleZBVZeroBubble with that method")

    class Theirs:
        pp_group_size, num_stages, _n_microbatches = pp, 2 * pp, m
        stage_index_to_group_rank = {s: min(s, 2 * pp - 1 - s) for s in range(2 * pp)}  # noqa: RUF012

    for rank, actions in enumerate(make_schedule("zb-v", pp, 2, m).actions):
        theirs = [a for a in calculate(Theirs, rank) if a is not None and a.computation_type.name != "BACKWARD_WEIGHT"]
        names = {"FORWARD": Kind.F, "BACKWARD_INPUT": Kind.I}
        want = [(a.stage_index, names[a.computation_type.name], a.microbatch_index) for a in theirs]
        assert [tuple(a) for a in actions if a.kind is not Kind.W] == want


def test_sends_stand_beside_receives_in_the_worked_example():
    assert [text(actions) for actions in complete("1f1b", 2, 1, 2).actions] == [
        "0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1",
        "1RF0 1F0 1RF1 1B0 1SB0 1F1 1B1 1SB1",
    ]


@pytest.mark.parametrize(
    ("name", "pp", "vp", "m"),
    [("gpipe", 4, 1, 6), ("1f1b", 4, 1, 9), ("interleaved", 3, 3, 9), ("zb-v", 4, 2, 9), ("dualpipe", 4, 1, 8)],
)
def test_two_ranks_list_their_messages_in_one_order(name, pp, vp, m):
    """NCCL pairs the messages of two ranks by order alone."""
    schedule = complete(name, pp, vp, m)
    messages = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if not action.kind.is_compute:
                step = {Kind.SEND_F: 1, Kind.RECV_F: -1, Kind.SEND_B: -1, Kind.RECV_B: 1}[action.kind]
                peer = schedule.rank_of(action._replace(stage=action.stage + step))
                sender = action.stage if action.kind in (Kind.SEND_F, Kind.SEND_B) else action.stage + step
                message = (sender, action.microbatch, action.kind in (Kind.SEND_F, Kind.RECV_F))
                messages.setdefault((rank, peer), []).append(message)
    assert messages
    for (rank, peer), order in messages.items():
        assert order == messages[peer, rank]


@pytest.mark.parametrize(
    ("name", "pp", "vp", "m", "reason"),
    [
        ("gpipe", 4, 2, 8, "vp = 2  the gpipe schedule runs one stage a rank  use vp = 1"),
        ("zb-v", 4, 1, 8, "vp = 1  the zb-v schedule runs 2 stages a rank  use vp = 2"),
        ("dualpipe", 3, 1, 8, "pp = 3  must be even for two copies of the model  use 4"),
        ("dualpipe", 4, 1, 9, "microbatches = 9  must be even for dualpipe: half of them go each way  use 10"),
        ("dualpipe-v", 4, 2, 7, "microbatches = 7  must be at least 8 for dualpipe-v"),
    ],
)
def test_impossible_sizes_are_refused(name, pp, vp, m, reason):
    with pytest.raises(ScheduleError, match=reason):
        make_schedule(name, pp, vp, m)


def test_routes_are_refused_that_no_rank_arrangement_has():
    with pytest.raises(ScheduleError, match="a V has two stages on every rank"):
        v_shaped(4, 3)
    with pytest.raises(ScheduleError, match="two copies of the model have one stage a rank"):
        mirrored(4, 2)


def test_the_configuration_knows_the_same_families():
    assert {name: family.n_chunks for name, family in SCHEDULES.items() if family.n_chunks} == CHUNKS


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-v"])
def test_text_round_trip(name):
    schedule = make_schedule(name, 3, SCHEDULES[name].n_chunks or 2, 6)
    assert parse_schedule(str(schedule)) == replace(schedule, actions=[list(own) for own in schedule.actions])
    assert simulate(parse_schedule(str(schedule))) == simulate(schedule)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "the schedule  has no actions"),
        ("# nothing\n\n", "the schedule  has no actions"),
        ("0F0 0X0", "action '0X0' +must be a stage, a kind"),
        ("0F0 0B0\n2F0 2B0", "stage 1  stands nowhere  number from 0, without gaps"),
        ("0F0 0B0 0F999999999", "microbatch 1  stands nowhere"),
        ("999999999F0", "stage 0  stands nowhere"),
    ],
)
def test_text_that_is_no_schedule_is_refused(written, reason):
    with pytest.raises(ScheduleError, match=f"in plan.txt\n +{reason}"):
        parse_schedule(written, "plan.txt")


def test_a_stage_on_two_ranks_is_refused():
    schedule = parse_schedule("0F0 0F1 0B0\n1F0 1B0 0B1 1F1 1B1")
    with pytest.raises(ScheduleError, match=r"rank 1: 0B1 +belongs on rank 0"):
        check(add_communication(schedule))


def test_a_schedule_knows_where_its_stages_lie():
    assert Schedule([[], []], v_shaped(2), 1).stages_of(0) == [0, 3]
    assert Schedule([[], []], mirrored(2), 2).stages_of(1) == [0, 1]
