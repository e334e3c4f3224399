"""Latent attention: against plain attention with the same keys and values, over tp, cached, and its parts again."""

from typing import Any

import pytest
import torch
from logical import fill, logical_gradients, to_local, to_logical
from torch import Tensor

from megascratch.config import Config, MLAConfig, ModelConfig, RopeScaling, resolve
from megascratch.dist.layout import Split, name_parameters
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.infer.decoding import make_caches
from megascratch.nn import NOTHING, Placement, Recompute, SequenceInfo, Stage, WeightGradients
from megascratch.nn.latent_attention import LatentAttention
from megascratch.nn.layer_costs import LayerShape
from megascratch.nn.rotary import rotary_tables

S, B, H, N, V = 8, 3, 12, 4, 50
CPU, F64 = torch.device("cpu"), torch.float64
KINDS: dict[str, dict[str, Any]] = {
    "short queries": {},
    "whole queries, yarn": {
        "q_lora_rank": None,
        "rope_scaling": RopeScaling(type="yarn", factor=4, original_seq_length=8),
    },
}


def _model(**changes: Any) -> ModelConfig:
    rank = changes.pop("q_lora_rank", 8)
    mla = MLAConfig(q_lora_rank=rank, kv_lora_rank=10, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=7)
    shape = {"n_layers": 2, "hidden": H, "n_heads": N, "ffn_hidden": 20, "vocab_size": V, "mla": mla}
    return resolve(Config(model=ModelConfig(**{**shape, "max_seq_length": 16, **changes}))).model


def _layer(model: ModelConfig, mesh: Mesh, sequence_parallel: bool, later: WeightGradients | None = None) -> Any:
    placement = Placement(mesh.tp, sequence_parallel, F64, CPU, weight_gradients=later)
    layer = LatentAttention(model, placement, "layers.0.attn", core="softmax", out_std=0.2)
    name_parameters(layer)
    fill(layer, mesh)
    return layer


def _run(model: ModelConfig, mesh: Mesh, sequence_parallel: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    whole_x, probe = (torch.randn(S, B, H, dtype=F64, generator=generator) for _ in range(2))
    split = Split(0, "tp") if sequence_parallel else None
    layer = _layer(model, mesh, sequence_parallel)
    x = to_local(whole_x, split, mesh).requires_grad_()
    y = layer(x, rotary_tables(model, F64, CPU), SequenceInfo(S))
    y.backward(to_local(probe, split, mesh))
    assert x.grad is not None
    return {
        "output": to_logical(y, (S, B, H), split, mesh),
        "input gradient": to_logical(x.grad, (S, B, H), split, mesh),
        **logical_gradients(layer, mesh),
    }


@distributed(world=2)
def test_it_equals_its_one_rank_self() -> None:
    mesh = Mesh.create(MeshSpec(tp=2), CPU)
    for kind, changes in KINDS.items():
        serial = _run(_model(**changes), Mesh.serial(), False)
        for sequence_parallel in (False, True):
            for key, value in _run(_model(**changes), mesh, sequence_parallel).items():
                where = f"{kind}, {sequence_parallel=}: {key}"
                torch.testing.assert_close(
                    value, serial[key], rtol=1e-11, atol=1e-12, msg=lambda m, where=where: f"{where}: {m}"
                )


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_the_whole_sequence(kind: str) -> None:
    """The cache holds 10 + 4 numbers a token, and no keys or values of heads."""
    mesh, model = Mesh.serial(), _model(**KINDS[kind])
    stage = Stage(model, Placement(mesh.tp, False, F64, CPU)).eval()
    fill(stage, mesh)
    tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    caches = make_caches(stage, B, S)
    assert [tuple(x.shape) for x in (caches[0].keys, caches[0].values)] == [(S, B, 1, 10), (S, B, 1, 4)]
    with torch.no_grad():
        whole = stage(None, tokens, SequenceInfo(S))
        start, parts = 0, []
        for length in (3, 1, 1, 2, 1):
            part = tokens[:, start : start + length]
            parts.append(stage(None, part, SequenceInfo(length, offset=start), caches))
            start += length
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_keys_and_values_can_be_made_again() -> None:
    """Bit for bit, and without n (d + r) of keys and values a token between forward and backward."""
    model, mesh = _model(), Mesh.serial()
    results = []
    plans = [NOTHING, *(Recompute(frozenset(parts)) for parts in (["mla_up_proj"], ["mla_up_proj", "core_attn"]))]
    for plan in plans:
        stage = Stage(model, Placement(mesh.tp, False, F64, CPU), recompute={0: plan, 1: plan}).train()
        fill(stage, mesh)
        tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
        stage(None, tokens, SequenceInfo(S)).square().sum().backward()
        results.append([param.grad for param in stage.parameters()])
    for gradients in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0]))  # type: ignore[arg-type]
    shape = LayerShape(_model(max_seq_length=128), Placement(mesh.tp, False, F64, CPU), B, 128, "blocked")
    kept = [shape.kept_bytes(plan) for plan in plans]
    assert kept[0] - kept[1] == pytest.approx(128 * B * 8 * 2 * N * 10, rel=0.15)
    assert kept[1] > kept[2]


def test_the_weight_gradients_can_be_put_off() -> None:
    later, model = WeightGradients(), _model()
    layer = _layer(model, Mesh.serial(), False, later)
    x = torch.randn(S, B, H, dtype=F64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with later.collect() as owed:
        layer(x, rotary_tables(model, F64, CPU), SequenceInfo(S)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None} == {
        f"{name}.weight" for name in ("q_down", "q_up", "kv_down", "kv_up", "proj")
    }
    assert len(owed) == 5
