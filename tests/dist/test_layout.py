"""`extents` is the only layout arithmetic: every other part of the system relies on what is shown here."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megascratch.dist.layout import Extent, ParamSpec, Split, extents, parameter, run_boxes, run_extents


def _logical(spec: ParamSpec) -> torch.Tensor:
    return torch.arange(1, math.prod(spec.shape) + 1).view(spec.shape)


def _local(spec: ParamSpec, tp: int, rank: int) -> torch.Tensor:
    local = torch.zeros(spec.local_shape({"tp": tp}), dtype=torch.int64)
    for extent in extents(spec, {"tp": tp}, {"tp": rank}):
        local[extent.local] = _logical(spec)[extent.logical]
    return local


def test_the_worked_examples() -> None:
    fused = ParamSpec("gate_up", (8,), (Split(0, "tp", blocks=(4, 4)),))
    assert _local(fused, 2, 0).tolist() == [1, 2, 5, 6]
    assert _local(fused, 2, 1).tolist() == [3, 4, 7, 8]
    vocabulary = ParamSpec("embed", (5,), (Split(0, "tp", pad=1),))
    assert _local(vocabulary, 2, 1).tolist() == [4, 5, 0]
    experts = ParamSpec("experts", (4, 6, 8), (Split(0, "ep"), Split(1, "tp")))
    assert experts.local_shape({"ep": 2, "tp": 2}) == (2, 3, 8)
    (extent,) = extents(experts, {"ep": 2, "tp": 2}, {"ep": 1, "tp": 0})
    assert extent.logical == (slice(2, 4), slice(0, 3), slice(0, 8))
    assert list(run_boxes((2, 4), 1, 7)) == [(0, (slice(0, 1), slice(1, 4))), (3, (slice(1, 2), slice(0, 3)))]


@st.composite
def _specs(draw: st.DrawFn) -> tuple[ParamSpec, int]:
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 3)))]
    kind = draw(st.sampled_from(["whole", "plain", "padded", "fused"]))
    if kind == "whole":
        return ParamSpec("w", tuple(shape)), tp
    dim = 0 if kind == "fused" else draw(st.integers(0, len(shape) - 1))
    if kind == "padded":
        return ParamSpec("w", tuple(shape), (Split(dim, "tp", pad=-shape[dim] % tp),)), tp
    blocks = tuple(tp * draw(st.integers(1, 2)) for _ in range(draw(st.integers(2, 3)))) if kind == "fused" else ()
    shape[dim] = sum(blocks) if blocks else shape[dim] * tp
    return ParamSpec("w", tuple(shape), (Split(dim, "tp", blocks),)), tp


@given(_specs())
def test_the_parts_of_all_ranks_make_the_whole_once(case: tuple[ParamSpec, int]) -> None:
    spec, tp = case
    seen = torch.zeros(spec.shape, dtype=torch.int64)
    for rank in range(tp if spec.splits else 1):
        for extent in extents(spec, {"tp": tp}, {"tp": rank}):
            seen[extent.logical] += 1
    assert (seen == 1).all()


@given(_specs(), st.data())
def test_runs_of_a_flattened_part_describe_the_same_elements(case: tuple[ParamSpec, int], data: st.DataObject) -> None:
    spec, tp = case
    rank = data.draw(st.integers(0, tp - 1))
    flat = _local(spec, tp, rank).view(-1)
    cuts = sorted(data.draw(st.lists(st.integers(0, flat.numel()), max_size=4)))
    for start, stop in zip([0, *cuts], [*cuts, flat.numel()]):
        run = torch.zeros(stop - start, dtype=torch.int64)
        for extent in run_extents(spec, {"tp": tp}, {"tp": rank}, start, stop):
            run[extent.local] = _logical(spec)[extent.logical].reshape(-1)
        assert run.tolist() == flat[start:stop].tolist()


def test_a_parameter_carries_its_spec() -> None:
    param = parameter(
        (4, 2), splits=(Split(0, "tp"),), sizes={"tp": 2}, dtype=torch.float32, device=torch.device("meta")
    )
    assert param.spec.shape == (4, 2)  # type: ignore[attr-defined]
    assert extents(param.spec, {}, {}) == [Extent((slice(0, 4), slice(0, 2)), (slice(0, 4), slice(0, 2)))]  # type: ignore[attr-defined]
