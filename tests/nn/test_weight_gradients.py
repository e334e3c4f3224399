"""The two halves of a backward pass give what the whole gives, bit for bit."""

from typing import get_args

import pytest
import torch

from megascratch.config import ModelConfig
from megascratch.config.schema import RecomputeModule
from megascratch.dist.mesh import Axis, Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import NOTHING, WHOLE, Placement, Recompute, SequenceInfo, Stage, WeightGradients
from megascratch.nn.balance import balanced_layers
from megascratch.nn.initialize import initialize
from megascratch.nn.linear import column_linear

S, B = 8, 2


def _model(**changes):
    shape = {"n_layers": 2, "hidden": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "ffn_hidden": 24}
    return ModelConfig(**{**shape, "vocab_size": 50, "max_seq_length": 16, **changes})


def _gradients(mesh, model, split, sequence_parallel=False, recompute=NOTHING):
    """Gradients of every parameter, and those that were put off."""
    later = WeightGradients()
    placement = Placement(mesh.tp, sequence_parallel, torch.float64, mesh.device, weight_gradients=later)
    stage = Stage(model, placement, recompute=dict.fromkeys(range(2), recompute)).train()
    initialize(dict(stage.named_parameters()), mesh, 1)
    tokens = torch.arange(B * S).view(B, S) % 50
    y = stage(None, tokens, SequenceInfo(S, sample_ids=torch.arange(B)))
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    before = set()
    if split:
        with later.collect() as owed:
            loss.backward()
        before = {name for name, param in stage.named_parameters() if param.grad is None}
        for compute in owed:
            compute()
    else:
        loss.backward()
    return {name: param.grad for name, param in stage.named_parameters()}, before


@pytest.mark.parametrize(
    "recompute", [NOTHING, WHOLE, Recompute(frozenset(get_args(RecomputeModule))), Recompute(offload=True)], ids=str
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True, "bias": True}, {"activation": "gelu", "norm": "layernorm", "position": "learned"}],
)
def test_split_and_whole_agree_bit_for_bit(changes, recompute):
    model = _model(**changes)
    whole, _ = _gradients(Mesh.serial(), model, split=False, recompute=recompute)
    split, put_off = _gradients(Mesh.serial(), model, split=True, recompute=recompute)
    assert {name for name in put_off if name.startswith("layers.0.")} == {
        f"layers.0.{part}.weight"
        for part in ("attn.qkv", "attn.proj", "mlp.down", "mlp.up" if "activation" in changes else "mlp.gate_up")
    }
    for name, grad in whole.items():
        assert torch.equal(grad, split[name]), name


@distributed(world=2)
def test_split_and_whole_agree_over_tp():
    mesh = Mesh.create(MeshSpec(tp=2), torch.device("cpu"))
    for sequence_parallel in (False, True):
        whole, _ = _gradients(mesh, _model(), False, sequence_parallel)
        split, put_off = _gradients(mesh, _model(), True, sequence_parallel)
        assert len(put_off) >= 8
        for name, grad in whole.items():
            assert torch.equal(grad, split[name]), name


def test_nothing_is_put_off_outside_collect():
    later, weight = WeightGradients(), torch.randn(3, 4, requires_grad=True)
    column_linear(torch.randn(2, 1, 4), weight, Axis("tp"), False, later).sum().backward()
    assert weight.grad is not None
    with later.collect() as owed:
        pass
    assert owed == []


def test_one_backward_pass_at_a_time():
    later = WeightGradients()
    with later.collect(), pytest.raises(AssertionError, match="one backward pass at a time"), later.collect():
        pass


def test_the_head_weighs_as_many_layers_as_its_product_is_large():
    llama = {"hidden": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "ffn_hidden": 14336}
    model = ModelConfig(n_layers=32, vocab_size=128256, **llama)
    assert balanced_layers(model, 8192, 4) == (9, 9, 8, 6)
    assert balanced_layers(model, 8192, 1) == (32,)
    assert balanced_layers(model, 8192, 34) == (0, *[1] * 32, 0)
    small = ModelConfig(n_layers=8, vocab_size=256, **llama)
    assert balanced_layers(small, 8192, 4) == (2, 2, 2, 2)


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gradient_goes_straight_into_the_sum_over_microbatches(dtype, put_off):
    """In the sum's own precision, and autograd gets none."""
    later, weight = WeightGradients(), torch.nn.Parameter(torch.randn(48, 40).to(dtype))
    total = torch.zeros(48, 40, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight.main_grad = lambda: total
    expected = torch.zeros(48, 40, dtype=torch.float64)
    for _ in range(3):
        x, grad = torch.randn(32, 2, 40).to(dtype), torch.randn(32, 2, 48).to(dtype)
        expected += grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
        y = column_linear(x, weight, Axis("tp"), False, later)
        if put_off:
            with later.collect() as owed:
                y.backward(grad)
            for compute in owed:
                compute()
        else:
            y.backward(grad)
    assert weight.grad is None
    rtol = 1e-12 if dtype == torch.float64 else 1e-5  # bfloat16 operands too: products and sums are float32
    torch.testing.assert_close(total.double(), expected, rtol=rtol, atol=20 * rtol)
