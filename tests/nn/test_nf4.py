"""Weights in 4 bits: the numbers of bitsandbytes, the same on every layout."""

import json
from pathlib import Path

import torch
from torch import nn

from megascratch.dist.layout import Init, Matrices, Split, extents, parameter, spec_of
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import Placement
from megascratch.nn.initialize import initialize
from megascratch.nn.nf4 import QUANTILES, PackedWeight, _dynamic_numbers

CPU = torch.device("cpu")
RECORDED = Path(__file__).with_name("recorded_nf4.json")


def packed(mesh: Mesh, shape: tuple[int, ...], splits: tuple[Split, ...], matrices: Matrices) -> PackedWeight:
    """Return a packed weight of random values, a function of its name, as this rank holds it."""
    placement = Placement(mesh.tp, False, torch.float64, CPU)
    weight = placement.parameter(*shape, splits=splits, init=Init(0.1), matrices=matrices)
    weight.spec = spec_of(weight).__class__(**{**vars(spec_of(weight)), "name": "layers.0.w.weight"})  # type: ignore
    result = PackedWeight(weight, placement)
    initialize({"w": (blank := result.blank())}, mesh, seed=3)
    result.pack(blank)
    return result


SHAPES = [
    ((96, 128), (Split(0, "tp"),), Matrices((16, 8, 8), groups=3)),
    ((64, 256), (Split(0, "tp", (32, 32)),), Matrices((32, 32))),
    ((70, 512), (Split(1, "tp"),), Matrices((70,))),
    ((4, 2, 32, 128), (Split(0, "ep"), Split(2, "tp")), Matrices((32,))),
]


@distributed(world=2)
def test_ranks_hold_parts_of_the_same_numbers() -> None:
    mesh = Mesh.create(MeshSpec(tp=2), CPU)
    for shape, splits, matrices in SHAPES:
        whole, own = packed(Mesh.serial(), shape, splits, matrices), packed(mesh, shape, splits, matrices)
        values = whole.unpacked()
        for extent in extents(own.spec, mesh.spec.sizes, mesh.coords):
            assert torch.equal(own.unpacked()[extent.local], values[extent.logical])
        assert torch.equal(own.groups, whole.groups)


def test_values_come_back_nearly() -> None:
    for shape, splits, matrices in SHAPES:
        weight = packed(Mesh.serial(), shape, splits, matrices)
        initialize({"w": (blank := weight.blank())}, Mesh.serial(), seed=3)
        error = (weight.unpacked() - blank).norm() / blank.norm()
        assert 0.05 < error < 0.11  # NF4's on normal values is 0.09 or so
        bits = 8 * sum(p.numel() * p.element_size() for p in weight.parameters()) / blank.numel()
        assert bits < 4.2


def test_by_hand() -> None:
    placement = Placement(Mesh.serial().tp, False, torch.float32, CPU)
    weight: nn.Parameter = parameter((1, 64), init=Init(), dtype=torch.float32, device=CPU)
    of_four = PackedWeight(weight, placement)
    values = torch.zeros(1, 64)
    values[0, :4] = torch.tensor([0.3, -0.6, 0.1, 0.0])
    of_four.pack(values)
    assert of_four.codes[0, :2].tolist() == [12 << 4 | 0, 9 << 4 | 7]
    expected = torch.tensor([0.6 * QUANTILES[12], -0.6, 0.6 * QUANTILES[9], 0.0])
    torch.testing.assert_close(of_four.unpacked()[0, :4], expected)


def test_a_weight_of_zeros_stays_so() -> None:
    placement = Placement(Mesh.serial().tp, False, torch.bfloat16, CPU)
    zeros = PackedWeight(parameter((3, 128), dtype=torch.bfloat16, device=CPU), placement)
    zeros.pack(torch.zeros(3, 128, dtype=torch.bfloat16))
    assert not zeros.unpacked().any()


def test_the_numbers_are_those_of_bitsandbytes() -> None:
    """Recorded from bitsandbytes 0.50.2: `quantize_4bit(weight, 64, compress_statistics=True, quant_type="nf4")`."""
    recorded = json.loads(RECORDED.read_text())
    torch.testing.assert_close(
        torch.tensor(_dynamic_numbers()), torch.tensor(recorded["dynamic"]), rtol=1e-5, atol=1e-9
    )
    placement = Placement(Mesh.serial().tp, False, torch.float32, CPU)
    ours = PackedWeight(parameter((128, 256), dtype=torch.float32, device=CPU), placement)
    i = torch.arange(128 * 256, dtype=torch.float64)
    ours.pack((i.square().sin() * (1 + (i // 64) % 13)).float().view(128, 256))
    assert bytes(ours.codes.flatten().tolist()).hex() == recorded["codes"]
    apart = ours.scales.flatten().int() - torch.tensor(list(bytes.fromhex(recorded["scales"])))
    assert apart.abs().max() <= 1 and apart.count_nonzero() <= 2, (
        "but for scales between two numbers, rounded either way"
    )
    torch.testing.assert_close(ours.groups[:, 0], torch.tensor(recorded["absmax"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.groups[:, 1], torch.full((2,), recorded["offset"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.unpacked()[:4, :8], torch.tensor(recorded["values"]), rtol=1e-6, atol=1e-7)
