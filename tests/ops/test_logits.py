"""Statistics and gradient of divided logits against the whole softmax in float64, on every backend."""

import math

import pytest
import torch
from torch import Tensor

from megascratch.ops import acc_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# tokens, columns, first word, how many of the columns are words
PARTS = {
    "packets": ((3, 2), 64, 0, 64),
    "second rank, padded": ((5,), 40, 40, 33),
    "padding alone": ((2, 2), 8, 96, 0),
    "one of everything": ((1,), 1, 0, 1),
    "no token": ((0, 3), 7, 0, 7),
    "odd": ((3,), 2063, 7, 2061),
    "several blocks": ((2,), 5000, 0, 4999),
}


def draw(tokens: tuple[int, ...], columns: int, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which some lie on other ranks."""
    return (4 * torch.randn(*tokens, columns)).to(dtype), torch.randint(0, first + columns + 3, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_every_backend_keeps_the_definition(backend, close, part, dtype):
    tokens, columns, first, n_real = part
    logits, labels = draw(tokens, columns, first, dtype)
    if n_real < columns:
        logits[..., n_real:] = torch.nan  # padding is never read
    real = logits[..., :n_real].double()
    here = (labels >= first) & (labels < first + n_real)
    column = (labels - first).masked_fill(~here, 0)
    expected_peak = real.amax(-1) if n_real else torch.full(tokens, -torch.inf).double()
    expected_total = (real - expected_peak.unsqueeze(-1)).exp().sum(-1)
    expected_picked = real.gather(-1, column.unsqueeze(-1)).squeeze(-1) * here if n_real else torch.zeros(tokens)

    # Another rank holds as much again, so that probabilities here sum to a half.
    wide = acc_dtype(logits)
    log_total = (expected_peak + (2 * expected_total).log()).nan_to_num(neginf=0.0).to(wide)
    grad = torch.randn(tokens, dtype=torch.float64).to(wide)
    expected = -(real - log_total.double().unsqueeze(-1)).exp()
    if n_real:
        expected.scatter_add_(-1, column.unsqueeze(-1), here.double().unsqueeze(-1))
    expected = torch.nn.functional.pad(expected * grad.double().unsqueeze(-1), (0, columns - n_real))

    for _ in backend.schedules(3):
        on = [t.to(backend.device) for t in (logits, labels, grad, log_total)]
        peak, total, picked = backend.ops.logit_statistics(on[0], on[1], first, n_real)
        assert torch.equal(peak.cpu().double(), expected_peak)
        close(total, expected_total, wide, scale=max(1.0, math.sqrt(columns)))
        assert torch.equal(picked.cpu().double(), expected_picked.double())
        gradient = backend.ops.logit_gradient(on[2], on[0], on[1], on[3], first, n_real)
        close(gradient, expected, dtype, scale=4)
        in_place = on[0].clone()
        backend.ops.logit_gradient_(in_place, on[2], on[1], on[3], first, n_real)
        assert torch.equal(in_place, gradient)


def test_rows_that_lie_apart(backend, close):
    storage = torch.randn(3, 5, 50).bfloat16()
    for view in (storage[:, :, 8:40], storage[:, :, 3:36], storage.transpose(0, 1), storage[:, :4, 1:].mT):
        labels = torch.randint(0, view.shape[-1], view.shape[:-1])
        arguments = (view.to(backend.device), labels.to(backend.device), 0, view.shape[-1])
        peak, total, _ = backend.ops.logit_statistics(*arguments)
        close(peak + total.log(), view.double().logsumexp(-1), torch.float32, scale=4)
        grad = torch.ones(labels.shape, device=backend.device)
        gradient = backend.ops.logit_gradient(grad, *arguments[:2], peak + total.log(), *arguments[2:])
        one = torch.nn.functional.one_hot(labels, view.shape[-1])
        close(gradient, one - view.double().softmax(-1), torch.bfloat16, scale=4)


def test_hidden_and_extreme_logits(backend):
    inf = math.inf
    rows = torch.tensor([[-inf, 0.0, -inf, 0.0], [-inf] * 4, [1e4, -1e4, 0.0, 0.0], [0.0, math.nan, 0.0, 0.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    peak, total, picked = (
        t.cpu() for t in backend.ops.logit_statistics(rows.to(backend.device), labels.to(backend.device), 0, 4)
    )
    assert peak[:3].tolist() == [0.0, -inf, 1e4]
    assert total[:3].tolist() == [2.0, 0.0, 1.0]
    assert total[3].isnan()
    assert picked.tolist() == [-inf, -inf, 1e4, 0.0]


def test_offsets_beyond_32_bits(backend, close):
    if backend.device == "cuda":
        pytest.skip("the rows that lie between would have to be there")
    apart = torch.empty(2, 2**31 + 8, dtype=torch.bfloat16)[:, :16]  # memory that is never touched is never there
    apart.copy_(torch.randn(2, 16))
    peak, total, _ = backend.ops.logit_statistics(apart, torch.tensor([0, 1]), 0, 16)
    close(peak + total.log(), apart.double().logsumexp(-1), torch.float32, scale=4)


def test_opcheck(backend):
    logits, labels = (t.to(backend.device) for t in draw((3, 2), 10, 0, torch.float32))
    token = torch.randn(3, 2, device=backend.device)
    torch.library.opcheck(backend.ops.logit_statistics.default, (logits, labels, 0, 9))
    torch.library.opcheck(backend.ops.logit_gradient.default, (token, logits, labels, token, 0, 9))
    torch.library.opcheck(backend.ops.logit_gradient_.default, (logits, token, labels, token, 0, 9))
