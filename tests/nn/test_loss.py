"""Vocabulary-parallel cross-entropy against torch's, which sees the whole vocabulary."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logical import to_local, to_logical
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import linear_cross_entropy, linear_logprobs, loss, token_logprobs
from megascratch.nn.embedding import vocabulary_split

S, B = 5, 3
CPU = torch.device("cpu")


def _inputs(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(S, B, vocab_size, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab_size, (S, B), generator=generator)
    labels[0] = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    weights = torch.randn(S, B, dtype=torch.float64, generator=generator)
    return logits.to(dtype), labels, weights


def _ours(mesh: Mesh, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [s, b], and the gradient of their weighted sum, [s, b, v]."""
    whole, labels, weights = _inputs(vocab_size, dtype)
    # The same padding as a model's head has; large values in it must change nothing.
    split = vocabulary_split(vocab_size, mesh.tp.size)
    split = type(split)(2, split.axis, pad=split.pad)
    local = to_local(whole, split, mesh)
    n_real = min(max(vocab_size - mesh.tp.rank * local.shape[2], 0), local.shape[2])
    local[..., n_real:] = 1e4
    local.requires_grad_()
    logprobs = token_logprobs(local, labels, vocab_size, mesh.tp)
    (logprobs * weights).sum().backward()
    assert local.grad is not None and local.grad.dtype == dtype
    assert not local.grad[..., n_real:].any(), "a padding column has a gradient"
    return to_logical(logprobs, (S, B), None, mesh), to_logical(local.grad, (S, B, vocab_size), split, mesh)


def _torch(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, labels, weights = _inputs(vocab_size, dtype)
    wide = logits.to(torch.float64).requires_grad_()
    logprobs = -F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (logprobs * weights).sum().backward()
    assert wide.grad is not None
    return logprobs.detach(), wide.grad


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_one_rank_equals_torch(dtype: torch.dtype, rtol: float) -> None:
    logprobs, gradient = _ours(Mesh.serial(), 100, dtype)
    expected, expected_gradient = _torch(100, dtype)
    # Computed in float32 from half-precision logits: the result is exact to that, its gradient is rounded once.
    torch.testing.assert_close(logprobs.double(), expected, rtol=min(rtol, 2e-6), atol=1e-5 if rtol > 1e-9 else 1e-12)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-6 if rtol > 1e-9 else 1e-12)


@distributed(world=4)
def test_four_ranks_equal_torch() -> None:
    mesh = Mesh.create(MeshSpec(tp=4), CPU)
    for vocab_size in (256, 200, 100, 70, 3):  # whole parts; padding in the last; ranks of padding alone
        torch.testing.assert_close(
            _ours(mesh, vocab_size, torch.float64), _torch(vocab_size, torch.float64), rtol=1e-12, atol=1e-12
        )


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([[1]]), 3, Mesh.serial().tp)
    assert logprobs.item() == -2e4


H = 7


def _head_inputs(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return hidden states [s, b, h] and a head [v, h]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(S, B, H, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab_size, H, dtype=torch.float64, generator=generator)
    return x.to(dtype), weight.to(dtype)


def _weighted_logprobs(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, v: int, mesh: Mesh) -> Tensor:
    return -(linear_logprobs(x, weight, labels, v, mesh.tp, counts=weights)[0] * weights).sum()


def _cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, v: int, mesh: Mesh) -> Tensor:
    return linear_cross_entropy(x, weight, labels, weights, v, mesh.tp)[0]


FUSED = {"logprobs": _weighted_logprobs, "cross_entropy": _cross_entropy}


def _fused(function: Callable[..., Tensor], mesh: Mesh, vocab_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the weighted loss and its gradients of x [s, b, h] and of the head [v, h], times 3."""
    x, whole = _head_inputs(vocab_size, dtype)
    _, labels, weights = _inputs(vocab_size, dtype)
    split = vocabulary_split(vocab_size, mesh.tp.size)
    local = to_local(whole, split, mesh)
    n_real = min(max(vocab_size - mesh.tp.rank * local.shape[0], 0), local.shape[0])
    local[n_real:] = 1e4  # padding rows, which must change nothing
    x.requires_grad_()
    local.requires_grad_()
    total = function(comm.copy(x, mesh.tp), local, labels, weights, vocab_size, mesh)
    (3 * total).backward()
    assert x.grad is not None and local.grad is not None
    assert x.grad.dtype == local.grad.dtype == dtype
    assert not local.grad[n_real:].any(), "a padding row has a gradient"
    return [total.detach(), x.grad, to_logical(local.grad, (vocab_size, H), split, mesh)]


def _whole_logits(vocab_size: int, dtype: torch.dtype) -> list[Tensor]:
    x, weight = (t.double().requires_grad_() for t in _head_inputs(vocab_size, dtype))
    _, labels, weights = _inputs(vocab_size, dtype)
    losses = F.cross_entropy((x @ weight.t()).flatten(0, 1), labels.flatten(), reduction="none")
    total = (losses * weights.flatten()).sum()
    (3 * total).backward()
    assert x.grad is not None and weight.grad is not None
    return [total.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("chunk", [1, 4, S * B, 1024])
def test_chunks_of_the_head_and_the_loss_equal_whole_logits(
    function: Callable[..., Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 6e-2)):
        ours, expected = _fused(function, Mesh.serial(), 100, dtype), _whole_logits(100, dtype)
        for got, want in zip(ours, expected, strict=True):
            error = (got.double() - want).norm() / want.norm()
            assert error < tolerance, f"{dtype}: {error:.1e}"


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("counting", [0, 1, 9, 14])
def test_tokens_without_weight_are_left_out(
    function: Callable[..., Tensor], counting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's tokens meet the head in no product that they add nothing to."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 4)
    _, labels, weights = _inputs(100, torch.float64)
    weights.view(-1)[torch.randperm(S * B, generator=torch.Generator().manual_seed(3))[counting:]] = 0.0
    found, rows, multiply = [], 0, loss.ops.matmul_into

    def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        nonlocal rows
        rows += len(a) if b.shape == (100, H) else 0
        multiply(out, a, b, add)

    for fused in (True, False):
        x, weight = (t.requires_grad_() for t in _head_inputs(100, torch.float64))
        if fused:
            monkeypatch.setattr(loss.ops, "matmul_into", product)
            total = function(x, weight, labels, weights, 100, Mesh.serial())
        else:
            total = -(token_logprobs(x @ weight.t(), labels, 100, Mesh.serial().tp) * weights).sum()
        found.append((total.detach(), *torch.autograd.grad(total, (x, weight))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert rows == (counting if 0 < counting < 14 else S * B), "few enough are put together"


@pytest.mark.parametrize("function", [linear_logprobs, linear_cross_entropy])
def test_capped_logits_equal_whole_logits(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 4)
    _, labels, weights = _inputs(100, torch.float64)
    found = []
    for fused in (True, False):
        x, weight = (t.requires_grad_() for t in _head_inputs(100, torch.float64))
        if not fused:
            logits = 1.5 * torch.tanh(x @ weight.t() / 1.5)
            total = (token_logprobs(logits, labels, 100, Mesh.serial().tp) * -weights).sum()
        elif function is linear_logprobs:
            logprobs, _ = linear_logprobs(x, weight, labels, 100, Mesh.serial().tp, softcap=1.5)
            total = (logprobs * -weights).sum()
        else:
            total, _ = linear_cross_entropy(x, weight, labels, weights, 100, Mesh.serial().tp, softcap=1.5)
        found.append((total.detach(), *torch.autograd.grad(total, (x, weight))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@distributed(world=4)
def test_chunks_on_four_ranks_equal_whole_logits() -> None:
    mesh = Mesh.create(MeshSpec(tp=4), CPU)
    for vocab_size in (256, 70, 3):  # whole parts; padding; ranks of padding alone
        for function in FUSED.values():
            ours = _fused(function, mesh, vocab_size, torch.float64)
            torch.testing.assert_close(ours, _whole_logits(vocab_size, torch.float64), rtol=1e-12, atol=1e-12)
        _assert_described(mesh, vocab_size)


def test_what_logits_say_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(loss, "_DESCRIBED_TOKENS", 2)
    _assert_described(Mesh.serial(), 70)


def _assert_described(mesh: Mesh, vocab_size: int) -> None:
    """Compare entropies, mean logits and hits with those of whole logits."""
    x, weight = _head_inputs(vocab_size, torch.float64)
    _, labels, weights = _inputs(vocab_size, torch.float64)
    logits = x @ weight.t()
    own = to_local(weight, vocabulary_split(vocab_size, mesh.tp.size), mesh)
    own[min(max(vocab_size - mesh.tp.rank * len(own), 0), len(own)) :] = 1e4  # padding rows
    expected = torch.distributions.Categorical(logits=logits).entropy(), logits.mean(-1)
    arguments = (x, own.requires_grad_(), labels)
    both = (
        linear_logprobs(*arguments, vocab_size, mesh.tp, describe=True),
        linear_cross_entropy(*arguments, weights, vocab_size, mesh.tp, describe=True),
    )
    for _, notes in both:
        assert notes is not None and not notes.entropy.requires_grad
        torch.testing.assert_close((notes.entropy, notes.mean_logit), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(notes.hits, logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) == logits.amax(-1))


def test_without_gradients_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = _head_inputs(100, torch.float64)
    _, labels, weights = _inputs(100, torch.float64)
    with_gradients, _ = linear_cross_entropy(x, weight.requires_grad_(), labels, weights, 100, Mesh.serial().tp)
    monkeypatch.delattr(loss.ops, "logit_gradient")
    with torch.no_grad():
        without, _ = linear_cross_entropy(x, weight, labels, weights, 100, Mesh.serial().tp)
    assert without.item() == pytest.approx(with_gradients.item(), rel=1e-12)


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED.keys())
def test_a_head_that_does_not_learn_costs_no_gradient(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside adapters: the input's gradient is the same, and no product makes the head's."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 4)
    _, labels, weights = _inputs(100, torch.float64)
    made: list[torch.Size] = []
    multiply = loss.ops.matmul_into

    def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        made.append(out.shape)
        multiply(out, a, b, add)

    monkeypatch.setattr(loss.ops, "matmul_into", product)
    gradients = []
    for learns in (True, False):
        made.clear()
        x, weight = _head_inputs(100, torch.float64)
        function(x.requires_grad_(), weight.requires_grad_(learns), labels, weights, 100, Mesh.serial()).backward()
        assert ((100, H) in made) == learns and (weight.grad is not None) == learns
        gradients.append(x.grad)
    assert gradients[0] is not None and torch.equal(*gradients)


class _PeakBytes(TorchDispatchMode):
    """The most bytes that were alive at once among the tensors made within the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.storages:
                self.storages.add(key)
                self.alive += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(tensor.untyped_storage(), self._free, key, tensor.untyped_storage().nbytes())
        return result

    def _free(self, key: int, n_bytes: int) -> None:
        self.storages.discard(key)
        self.alive -= n_bytes


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED.keys())
def test_peak_memory_is_a_quarter_of_logits_then_loss(function: Callable[..., Tensor]) -> None:
    """At the ratios of 32k tokens × 128k words: tokens = v/4, a chunk of 1/32 of them, and h small beside both."""
    tokens, v, h = 8192, 2048, 64
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 1, h, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(v, h, generator=generator).bfloat16().requires_grad_()
    labels, weights = torch.randint(0, v, (tokens, 1), generator=generator), torch.ones(tokens, 1)
    tp = Mesh.serial().tp
    with _PeakBytes() as whole:
        (-(token_logprobs(x @ weight.t(), labels, v, tp) * weights).sum()).backward()
    x.grad = weight.grad = None
    with _PeakBytes() as fused:
        function(x, weight, labels, weights, v, Mesh.serial()).backward()
    assert whole.peak > tokens * v * 4, "logits and their gradient in bf16 at least"
    assert fused.peak < whole.peak / 4, f"{fused.peak} of {whole.peak} bytes"


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED.keys())
def test_one_chunk_of_logits_exists_at_a_time(function: Callable[..., Tensor]) -> None:
    tokens, v, h = 4 * loss.CHUNK_TOKENS, 1024, 8
    x, weight = torch.randn(tokens, 1, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    labels, weights = torch.randint(0, v, (tokens, 1)), torch.ones(tokens, 1)
    with _PeakBytes() as fused:
        function(x, weight, labels, weights, v, Mesh.serial()).backward()
    assert fused.peak < 1.5 * loss.CHUNK_TOKENS * v * 4


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED.keys())
def test_peak_memory_at_32k_tokens_and_128k_words(function: Callable[..., Tensor]) -> None:
    """Counted on tensors that have sizes and no memory: under a quarter of logits-then-loss."""
    tokens, v, h = 32768, 131072, 2048
    tp = Mesh.serial().tp
    with torch.device("meta"):
        x = torch.empty(tokens, 1, h, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(v, h, dtype=torch.bfloat16, requires_grad=True)
        labels, weights = torch.empty(tokens, 1, dtype=torch.int64), torch.empty(tokens, 1)
        with _PeakBytes() as whole:
            (-(token_logprobs(x @ weight.t(), labels, v, tp) * weights).sum()).backward()
        x.grad = weight.grad = None
        with _PeakBytes() as fused:
            function(x, weight, labels, weights, v, Mesh.serial()).backward()
    ratio = fused.peak / whole.peak
    print(f"{fused.peak / 2**30:.2f} GiB of {whole.peak / 2**30:.2f}: {ratio:.1%}")  # shown by pytest -s
    assert ratio < 1 / 4
