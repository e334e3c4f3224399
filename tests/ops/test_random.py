"""Random numbers by index: the generator, and normal numbers on every backend."""

import pytest
import torch

from megascratch.ops.random import normal, random_bits, stream_key, uniform

KEY = stream_key(5, "embed.weight")
SIGNED = KEY - 2**64 if KEY >= 2**63 else KEY


def test_the_generator_is_uniform_and_normal() -> None:
    index = torch.arange(1_000_000)
    u, z = uniform(stream_key(0, "a"), index), normal(stream_key(0, "b"), index)
    assert abs(u.mean() - 0.5) < 2e-3
    assert abs(u.var() - 1 / 12) < 1e-3
    assert u.min() > 0
    assert u.max() < 1
    assert abs(z.mean()) < 5e-3
    assert abs(z.var() - 1) < 5e-3
    assert abs((z**4).mean() - 3) < 0.05
    assert abs(torch.corrcoef(torch.stack([z[:-1], z[1:]]))[0, 1]) < 5e-3
    assert (torch.histc(u, 64) - 15625).abs().max() < 700


def test_splitmix64_matches_its_published_first_outputs() -> None:
    # The reference sequence of seed 1234567: state advances by gamma before each output.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = random_bits(1234567, torch.arange(3)).tolist()
    assert [value % 2**64 for value in got] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_draws_the_same_numbers(backend, dtype):
    """To a few of float64's last units, of numbers up to 6; so a narrower dtype gets the same bits."""
    starts = torch.arange(50) * 10_007 + 2**40
    out = torch.empty(50, 403, dtype=dtype, device=backend.device)
    backend.ops.fill_normal(out, SIGNED, starts.to(backend.device), 0.5, 2.0)
    oracle = normal(KEY, starts.unsqueeze(1) + torch.arange(403)) * 2.0 + 0.5
    if dtype == torch.float64:
        assert (out.cpu() - oracle).abs().max() < 1e-14
    else:
        assert (out.cpu() != oracle.to(dtype)).float().mean() < 1e-3


def test_a_number_does_not_depend_on_where_it_stands(backend):
    """Rows of every length, and so every number in every place of a vector, and at a row's end."""
    whole = torch.empty(1, 64, dtype=torch.float64, device=backend.device)
    backend.ops.fill_normal(whole, SIGNED, torch.zeros(1, dtype=torch.int64, device=backend.device), 0.0, 1.0)
    for n in range(1, 20):
        starts = torch.arange(64 - n + 1, device=backend.device)
        rows = whole.new_empty(len(starts), n)
        backend.ops.fill_normal(rows, SIGNED, starts, 0.0, 1.0)
        assert torch.equal(rows, whole[0].unfold(0, n, 1))


def test_no_rows_and_empty_ones(backend):
    for shape in ((0, 5), (3, 0)):
        out = torch.empty(shape, device=backend.device)
        backend.ops.fill_normal(out, 1, torch.zeros(shape[0], dtype=torch.int64, device=backend.device), 0.0, 1.0)


def test_opcheck(backend):
    out, starts = torch.empty(3, 9, device=backend.device), torch.arange(3, device=backend.device)
    torch.library.opcheck(backend.ops.fill_normal.default, (out, SIGNED, starts, 0.0, 0.02))
