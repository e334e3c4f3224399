"""A mixture of experts against one token after another, its balance against formulas, and every layout against one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logical import fill, to_logical
from torch import Tensor

from megascratch.config import Config, ModelConfig, MoEConfig, resolve
from megascratch.dist import comm
from megascratch.dist.layout import Split, spec_of
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import Placement, SequenceInfo, WeightGradients
from megascratch.nn import experts as experts_module
from megascratch.nn.experts import Dispatch, grouped_gradient, grouped_product
from megascratch.nn.moe import MoE
from megascratch.nn.router import NONE, Router, RouterReport

S, B, H, E, K = 8, 4, 12, 8, 2
CPU, F64 = torch.device("cpu"), torch.float64

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "not normalised": {"router_norm_topk": False, "router_topk_scaling_factor": 2.5},
    "sigmoid, groups, bias": {
        "router_score_function": "sigmoid",
        "router_num_groups": 4,
        "router_group_topk": 2,
        "router_enable_expert_bias": True,
    },
    "shared": {"shared_expert_ffn_hidden": 20, "shared_expert_gate": True},
    "capacity": {"expert_capacity_factor": 0.75},
    "losses": {"router_load_balancing_type": "seq_aux_loss", "aux_loss_coeff": 0.3, "z_loss_coeff": 0.2},
}


def _model(activation: str = "swiglu", **moe: Any) -> ModelConfig:
    experts = MoEConfig(**{"num_experts": E, "router_topk": K, "ffn_hidden": 16, **moe})
    shape = {"n_layers": 1, "hidden": H, "n_heads": 4, "ffn_hidden": 20, "activation": activation, "moe": experts}
    return resolve(Config(model=ModelConfig(**shape))).model


def _layer(mesh: Mesh, sequence_parallel: bool = False, later: WeightGradients | None = None, **changes: Any) -> MoE:
    at = Placement(mesh.tp, sequence_parallel, F64, CPU, mesh.cp, weight_gradients=later, ep=mesh.ep)
    layer = MoE(_model(**changes), at, "layers.0.mlp", out_std=0.2)
    for name, param in layer.named_parameters():
        param.spec = spec_of(param).__class__(**{**spec_of(param).__dict__, "name": name})  # type: ignore[attr-defined]
    fill(layer, mesh)
    return layer


def _tokens(batch: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, probe = (torch.randn(S, batch, H, dtype=F64, generator=generator) for _ in range(2))
    return x, probe


def _info(samples: slice = slice(0, B), length: int = S) -> SequenceInfo:
    return SequenceInfo(length, loss_tokens=torch.tensor([5, 8, 3, 7], dtype=F64)[samples], loss_seed=0.5)


def _by_hand(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Go through the tokens one by one: the layer's output, and which experts each token was sent to, [s, b, E]."""
    moe, router = layer.router.moe, layer.router
    used = torch.zeros(S, B, E, dtype=torch.bool)
    y = torch.zeros_like(x)
    capacity = math.inf
    if moe.expert_capacity_factor is not None:
        capacity = math.ceil(moe.expert_capacity_factor * K * S / E)
    for b in range(B):
        load = [0] * E
        for s in range(S):
            token = x[s, b]
            logits = router.weight @ token
            scores = logits.softmax(0) if moe.router_score_function == "softmax" else logits.sigmoid()
            ranked = scores.detach() + (0 if router.bias is None else router.bias)
            if moe.router_num_groups is not None:
                of_group = ranked.view(4, 2).topk(1).values.sum(1)
                for group in range(4):
                    if group not in of_group.topk(2).indices:
                        ranked[2 * group : 2 * group + 2] = -1e9
            chosen = ranked.topk(K).indices.tolist()
            total = sum(scores[e] for e in chosen) if moe.router_norm_topk else 1.0
            for e in chosen:
                load[e] += 1
                if load[e] > capacity:
                    continue
                used[s, b, e] = True
                gate, up = layer.experts.up[e] @ token
                result = layer.experts.down[e] @ (F.silu(gate) * up)
                y[s, b] = y[s, b] + scores[e] / total * moe.router_topk_scaling_factor * result
            if layer.shared is not None and layer.shared_gate is not None:
                gate, up = (layer.shared.gate_up.weight @ token).chunk(2)
                shared = layer.shared.down.weight @ (F.silu(gate) * up)
                y[s, b] = y[s, b] + (layer.shared_gate @ token).sigmoid() * shared
    return y, used


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "losses"])
def test_it_computes_what_one_token_after_another_gives(kind: str) -> None:
    layer, (x, probe) = _layer(Mesh.serial(), **KINDS[kind]), _tokens()
    results = []
    for compute in (lambda x: layer(x, _info()), lambda x: _by_hand(layer, x)[0]):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        y = compute(own)
        y.backward(probe)
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": own.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    dropped = int(S * B * K - _by_hand(layer, x)[1].sum())
    assert (dropped > 0) == (kind == "capacity")


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_losses_are_those_of_the_papers(kind: str) -> None:
    """The gradient that a layer adds is that of coeff · E · Σ fᵢ Pᵢ and of coeff · mean(lse²), as its tokens count."""
    losses = {"router_load_balancing_type": kind, "aux_loss_coeff": 0.3, "z_loss_coeff": 0.2}
    layer, (x, probe) = _layer(Mesh.serial(), **losses), _tokens()
    info = _info()
    layer(x, info).backward(probe)
    with_losses = layer.router.weight.grad
    plain = _layer(Mesh.serial())
    plain(x, _info()).backward(probe)
    assert with_losses is not None and plain.router.weight.grad is not None and info.loss_tokens is not None

    weight = layer.router.weight.detach().requires_grad_()
    logits = x @ weight.t()
    probs = logits.softmax(-1)
    used = F.one_hot(probs.topk(K).indices, E).sum(2).double()
    dims = (0,) if kind == "seq_aux_loss" else (0, 1)
    per_group = E * (used.mean(dims) / K * probs.mean(dims)).sum(-1)
    aux = 0.3 * (per_group * info.loss_tokens).sum()
    z = 0.2 * (logits.logsumexp(-1).square().mean(0) * info.loss_tokens).sum()
    (expected,) = torch.autograd.grad(info.loss_seed * (aux + z), weight)
    torch.testing.assert_close(with_losses - plain.router.weight.grad, expected, rtol=1e-11, atol=1e-12)

    report = RouterReport.of(info.notes["layers.0.mlp"], K, float(info.loss_tokens.sum()))
    assert report.load.tolist() == used.sum((0, 1)).tolist()
    entropy = -(probs * probs.log()).sum(-1).mean()
    mean = S * B * K / E
    for key, value in {
        "aux_loss": aux / info.loss_tokens.sum(),
        "z_loss": z / info.loss_tokens.sum(),
        "entropy": entropy,
        "dropped": 0.0,
        "load_min": used.sum((0, 1)).min() / mean,
        "max_violation": used.sum((0, 1)).max() / mean - 1,
    }.items():
        assert report.metrics[key] == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-12), key


def test_biases_even_the_load() -> None:
    """On a router that prefers one expert, some hundred steps of the bias bring every expert near the mean."""
    at = Placement(Mesh.serial().tp, False, F64, CPU)
    router = Router(_model(router_enable_expert_bias=True, router_bias_update_rate=0.003), at, "r")
    fill(router, Mesh.serial())
    assert router.bias is not None
    with torch.no_grad():
        router.bias.zero_()
        router.bias[3] = 0.5
    x = torch.randn(64, 4, H, dtype=F64, generator=torch.Generator().manual_seed(1))
    violations = []
    for _ in range(400):
        info = SequenceInfo(64)
        router(x, info)
        report = RouterReport.of(info.notes["r"], K, 1.0)
        violations.append(report.metrics["max_violation"])
        router.move_bias(report.load)
    assert violations[0] > 2.0 and max(violations[-10:]) < 0.2
    assert router.bias.grad is None and not router.bias.requires_grad


def test_no_later_token_changes_who_is_dropped() -> None:
    layer, (x, _) = _layer(Mesh.serial(), expert_capacity_factor=0.75), _tokens()
    changed = x.clone()
    changed[5:] += 1.0
    first, second = layer.router(x, _info()).experts, layer.router(changed, _info()).experts
    assert torch.equal(first[:5], second[:5]) and (first == NONE).any()
    layer.eval()
    assert not (layer.router(x, _info()).experts == NONE).any()


def test_the_weight_gradients_can_be_put_off() -> None:
    later = WeightGradients()
    layer, (x, probe) = _layer(Mesh.serial(), later=later), _tokens()
    layer(x, _info()).backward(probe)
    whole = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    with later.collect() as owed:
        layer(x, _info()).backward(probe)
    assert layer.experts.up.grad is None and layer.experts.down.grad is None and len(owed) == 2
    for compute in owed:
        compute()
    for name, param in layer.named_parameters():
        assert torch.equal(param.grad, whole[name]), name  # type: ignore[arg-type]


def test_the_worked_example_of_the_way_there_and_back() -> None:
    way = Dispatch.of(torch.tensor([0, 2, 2, 3, 0, 1]), 4, Mesh.serial().ep)
    assert way.order.tolist() == [0, 4, 5, 1, 2, 3]  # a c c, a b b
    assert way.sizes == [2, 1, 2, 1] and way.send == way.receive == [6]
    dropped = Dispatch.of(torch.tensor([0, NONE, 2, 3, NONE, 1]), 4, Mesh.serial().ep)
    assert dropped.order.tolist() == [0, 5, 2, 3] and dropped.sizes == [1, 1, 1, 1]


def test_the_grouped_kernel_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, which runs bf16 on GPUs, against the loop; it has a CPU version that is slower than the loop."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(48, 16, generator=generator).bfloat16()
    y = torch.randn(48, 32, generator=generator).bfloat16()
    weight = torch.randn(3, 16, 32, generator=generator).bfloat16()
    sizes = [16, 0, 32]
    loop = grouped_product(x, weight, sizes), grouped_gradient(x, y, sizes)
    monkeypatch.setattr(experts_module, "_has_grouped_kernel", lambda _: True)
    fused = grouped_product(x, weight, sizes), grouped_gradient(x, y, sizes)
    torch.testing.assert_close(fused, loop, rtol=2e-2, atol=2e-2)


def _run(mesh: Mesh, sequence_parallel: bool, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Output, notes and gradients of this rank's samples, in logical shape; samples lie over dp."""
    layer, (x, probe) = _layer(mesh, sequence_parallel, **changes), _tokens()
    n = B // mesh.dp.size
    samples = slice(mesh.dp.rank * n, (mesh.dp.rank + 1) * n)
    split = Split(0, "tp") if sequence_parallel else None

    def own(whole: Tensor) -> Tensor:
        part = whole[:, samples]
        return part.chunk(mesh.tp.size)[mesh.tp.rank].contiguous() if sequence_parallel else part.contiguous()

    own_x, info = own(x).requires_grad_(), _info(samples)
    y = layer(own_x, info)
    y.backward(own(probe))
    assert own_x.grad is not None
    note = comm.sum_over(info.notes["layers.0.mlp"], mesh.data)
    result = {
        "output": comm.all_gather(to_logical(y, (S, n, H), split, mesh), mesh.dp, 1),
        "input gradient": comm.all_gather(to_logical(own_x.grad, (S, n, H), split, mesh), mesh.dp, 1),
        "note": comm.sum_over(note, mesh.tp) if sequence_parallel else note,
    }
    for name, param in layer.named_parameters():
        spec = spec_of(param)
        gradient = torch.zeros_like(param) if param.grad is None else param.grad
        for axis in (*spec.grad_axes, spec.data_axis):
            gradient = comm.sum_over(gradient, mesh.axis(axis))
        if spec.is_split_over("ep"):
            gradient = comm.all_gather(gradient, mesh.ep)
        result[name] = to_logical(gradient, spec.shape, tuple(s for s in spec.splits if s.axis == "tp"), mesh)
    return result


@distributed(world=4)
def test_every_layout_equals_one_rank() -> None:
    meshes = [
        Mesh.create(spec, CPU) for spec in (MeshSpec(dp=4, ep=4), MeshSpec(dp=4, ep=2), MeshSpec(tp=2, dp=2, ep=2))
    ]
    for name, changes in {**KINDS, "plain": {"activation": "gelu"}}.items():
        serial = _run(Mesh.serial(), False, changes)
        for mesh in meshes:
            for sequence_parallel in (False, True) if mesh.tp.size > 1 else (False,):
                actual = _run(mesh, sequence_parallel, changes)
                for key, value in serial.items():
                    where = f"{name}, {mesh.spec}, {sequence_parallel=}: {key}"
                    torch.testing.assert_close(
                        actual[key], value, rtol=1e-11, atol=1e-12, msg=lambda m, where=where: f"{where}: {m}"
                    )
