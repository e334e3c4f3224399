"""Every layer against its size-1 self: output and all gradients, with and without sequence parallelism."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from logical import fill, logical_gradients, to_local, to_logical
from torch import Tensor, nn

from megascratch.config import Config, ModelConfig, resolve
from megascratch.dist.layout import Split, name_parameters
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import Placement, SequenceInfo
from megascratch.nn.attention import Attention, sdpa_core, softmax_core
from megascratch.nn.embedding import VocabParallelEmbedding
from megascratch.nn.linear import ColumnParallelLinear, RowParallelLinear
from megascratch.nn.mlp import make_mlp
from megascratch.nn.rotary import rotary_tables

S, B, H = 8, 3, 12
CPU, F64 = torch.device("cpu"), torch.float64
TOKENS = Split(0, "tp")  # activations divided along the sequence
FEATURES = Split(2, "tp")


def _model(**changes: Any) -> ModelConfig:
    shape = {"n_layers": 1, "hidden": H, "n_heads": 8, "n_kv_heads": 4, "head_dim": 6, "ffn_hidden": 20}
    return resolve(Config(model=ModelConfig(**{**shape, "max_seq_length": 16, **changes}))).model


def _placement(mesh: Mesh, sequence_parallel: bool) -> Placement:
    return Placement(mesh.tp, sequence_parallel, F64, CPU)


@dataclass(frozen=True)
class Case:
    """A layer, how it is called, and how its input and output are divided over tp (`None`: not)."""

    make: Callable[[Placement], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)
    n_in: int = H
    x_split: Split | None = TOKENS
    y_split: Split | None = TOKENS


def _attention(core: str = "softmax", **changes: Any) -> Case:
    model = _model(**changes)
    rotary = rotary_tables(model, F64, CPU) if model.position == "rope" else None
    return Case(
        lambda p: Attention(model, p, "layers.0.attn", core=core, out_std=0.2),
        lambda layer, x: layer(x, rotary, SequenceInfo(S)),
    )


def _mlp(**changes: Any) -> Case:
    return Case(lambda p: make_mlp(_model(**changes), p, out_std=0.2))


CASES = {
    "column": Case(lambda p: ColumnParallelLinear(H, 16, p, std=0.3), y_split=FEATURES),
    "column, fused": Case(
        lambda p: ColumnParallelLinear(H, 12, p, std=0.3, blocks=(4, 8), bias=True),
        y_split=Split(2, "tp", blocks=(4, 8)),
    ),
    "row": Case(lambda p: RowParallelLinear(16, H, p, std=0.3), n_in=16, x_split=FEATURES),
    "row, bias": Case(lambda p: RowParallelLinear(16, H, p, std=0.3, bias=True), n_in=16, x_split=FEATURES),
    "attention, grouped heads": _attention(),
    "attention, sdpa": _attention("sdpa"),
    "attention, qk-norm": _attention(qk_norm=True),
    "attention, one qk-norm over all heads": _attention(qk_norm=True, qk_norm_across_heads=True),
    "attention, zero-centred qk-norm": _attention(qk_norm=True, norm_zero_centered=True),
    "attention, capped scores": _attention("blocked", attn_softcap=0.5, query_pre_attn_scalar=3.0),
    "attention, biases": _attention(bias=True, n_kv_heads=8, position="none"),
    "attention, qkv biases": _attention(qkv_bias=True, position="learned"),
    "mlp, swiglu": _mlp(activation="swiglu"),
    "mlp, geglu, bias": _mlp(activation="geglu", bias=True),
    "mlp, gelu, bias": _mlp(activation="gelu", bias=True),
    "mlp, relu2": _mlp(activation="relu2"),
}


def _run(case: Case, mesh: Mesh, sequence_parallel: bool) -> dict[str, Tensor]:
    """Return output and gradients of a layer, in logical shape."""

    def divided(split: Split | None) -> Split | None:
        return split if split != TOKENS or sequence_parallel else None

    generator = torch.Generator().manual_seed(3)
    whole_x = torch.randn(S, B, case.n_in, dtype=F64, generator=generator)
    layer = case.make(_placement(mesh, sequence_parallel))
    name_parameters(layer)
    fill(layer, mesh)
    x = to_local(whole_x, divided(case.x_split), mesh).requires_grad_()
    y = case.call(layer, x)
    n_out = y.shape[2] * (mesh.tp.size if case.y_split != TOKENS else 1)
    probe = torch.randn(S, B, n_out, dtype=F64, generator=generator)
    y.backward(to_local(probe, divided(case.y_split), mesh))
    assert x.grad is not None
    return {
        "output": to_logical(y, (S, B, n_out), divided(case.y_split), mesh),
        "input gradient": to_logical(x.grad, tuple(whole_x.shape), divided(case.x_split), mesh),
        **logical_gradients(layer, mesh),
    }


@distributed(world=2)
def test_every_layer_equals_its_one_rank_self() -> None:
    mesh = Mesh.create(MeshSpec(tp=2), CPU)
    for name, case in CASES.items():
        serial = _run(case, Mesh.serial(), False)
        for sequence_parallel in (False, True):
            for key, value in _run(case, mesh, sequence_parallel).items():
                where = f"{name}, {sequence_parallel=}: {key}"
                torch.testing.assert_close(
                    value, serial[key], rtol=1e-12, atol=1e-12, msg=lambda m, where=where: f"{where}: {m}"
                )


@pytest.mark.parametrize("vocab_size", [200, 70])  # over four ranks: a last part with padding; parts of padding alone
@distributed(world=4)
def test_embedding_equals_its_one_rank_self(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab_size, (B, S), generator=generator)
    probe = torch.randn(S, B, H, dtype=F64, generator=generator)

    def run(mesh: Mesh, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
        layer = VocabParallelEmbedding(vocab_size, H, _placement(mesh, sequence_parallel), std=0.2)
        name_parameters(layer)
        fill(layer, mesh)
        split = TOKENS if sequence_parallel else None
        y = layer(tokens)
        y.backward(to_local(probe, split, mesh))
        return to_logical(y, (S, B, H), split, mesh), logical_gradients(layer, mesh)["weight"]

    mesh = Mesh.create(MeshSpec(tp=4), CPU)
    output, gradient = run(Mesh.serial(), False)
    for sequence_parallel in (False, True):
        torch.testing.assert_close(run(mesh, sequence_parallel), (output, gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("s", "t"), [(8, 8), (1, 8), (3, 8), (1, 1)])  # whole sequence; decoding; a chunk; first token
def test_attention_cores_agree(s: int, t: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(s, B, 8, 6, dtype=F64, generator=generator, requires_grad=True)
    k, v = (torch.randn(t, B, 4, 6, dtype=F64, generator=generator, requires_grad=True) for _ in range(2))
    probe = torch.randn(s, B, 8, 6, dtype=F64, generator=generator)
    hidden = torch.rand(B, 1, s, t, generator=generator) < 0.3
    hidden[..., 0] = False  # a query that sees nothing has no softmax to agree on
    for mask, causal in ((None, True), (None, False), (hidden, True), (hidden, False)):
        results = []
        for core in (softmax_core, sdpa_core):
            y = core(q, k, v, mask, causal)
            results.append((y, *torch.autograd.grad(y, (q, k, v), probe)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_attention_sees_no_later_token() -> None:
    case = _attention()
    layer = case.make(_placement(Mesh.serial(), False))
    name_parameters(layer)
    fill(layer, Mesh.serial())
    x = torch.randn(S, B, H, dtype=F64, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[5:] += 1.0
    before, after = case.call(layer, x), case.call(layer, changed)
    assert torch.equal(before[:5], after[:5])
    assert (before[5:] != after[5:]).any(-1).all()
