"""What is computed again instead of kept: the same gradients to the bit, and as many bytes fewer as was predicted."""

import gc
from itertools import combinations
from typing import Any, get_args

import pytest
import torch
from logical import fill
from torch import Tensor

from megascratch.config import Config, ModelConfig, resolve
from megascratch.config.schema import RecomputeModule
from megascratch.dist.mesh import Axis, Mesh
from megascratch.nn import NOTHING, WHOLE, Activations, Placement, Recompute, SequenceInfo, Stage
from megascratch.nn import activations as module
from megascratch.nn.layer_costs import LayerShape

S, B = 32, 2
PARTS = get_args(RecomputeModule)
AT = Placement(Axis("tp"), False, torch.float32, torch.device("cpu"))
SUBSETS = [Recompute(frozenset(parts)) for n in range(1, len(PARTS) + 1) for parts in combinations(PARTS, n)]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt-2 with dropout": {"norm": "layernorm", "activation": "gelu", "position": "learned", "dropout": 0.1},
    "olmo-2": {"norm_position": "post", "qk_norm": True},
    "moe": {"moe": {"num_experts": 4, "ffn_hidden": 20, "shared_expert_ffn_hidden": 8}},
    "qwen-2": {"qkv_bias": True, "bias": True, "activation": "geglu"},
}


def _model(name: str) -> ModelConfig:
    shape = {"n_layers": 2, "hidden": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "ffn_hidden": 40}
    return resolve(Config(model=ModelConfig(**{**shape, "vocab_size": 50, "max_seq_length": 50, **MODELS[name]}))).model


def _run(name: str, plan: Recompute, core: str = "softmax", kept: list[Tensor] | None = None) -> list[Tensor]:
    """Return the output and all gradients of two layers, each under the plan."""
    activations = Activations() if kept is None else Activations(kept.append)
    placement = Placement(Axis("tp"), False, torch.float32, torch.device("cpu"), activations=activations)
    stage = Stage(_model(name), placement, core=core, recompute={0: plan, 1: plan}).train()
    fill(stage, Mesh.serial())
    tokens = torch.randint(0, 50, (B, S), generator=torch.Generator().manual_seed(1))
    y = stage(None, tokens, SequenceInfo(S, sample_ids=torch.arange(B), seed=3))
    y.square().sum().backward()
    return [y.detach(), *(param.grad for param in stage.parameters() if param.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("core", ["softmax", "sdpa", "blocked"])
def test_gradients_are_equal_to_the_bit(name: str, core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_OFFLOAD_BYTES", 0)
    expected = _run(name, NOTHING, core)
    plans = [WHOLE, *SUBSETS, Recompute(offload=True), Recompute(whole=True, offload=True)]
    for plan in [*plans, Recompute(frozenset(PARTS), offload=True)]:
        actual = _run(name, plan, core)
        assert len(actual) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected)), plan


@pytest.mark.parametrize("name", MODELS)
def test_every_part_saves_bytes(name: str) -> None:
    """As many as its results and insides have, and the prediction on the meta device counts the same."""
    s_b, n, f, h = S * B * 4, 4 * 6, 40, 24
    saved = {
        "mlp_act": s_b * (2 * 20 + 8 if name == "moe" else f),
        "layernorm": 0 if name == "olmo-2" else 2 * s_b * h,
        "core_attn": s_b * n + B * 4 * S * S * 4,
    }
    layer = LayerShape(_model(name), AT, B, S, "softmax", name == "moe")
    for part, least in saved.items():
        plan = Recompute(frozenset([part]))
        gain = layer.kept_bytes(NOTHING) - layer.kept_bytes(plan)
        most = 3 if MODELS[name].get("dropout") else 2  # masks of dropped scores
        assert least <= gain <= most * least + 16 * S * B, part
    assert layer.kept_bytes(WHOLE) == s_b * h


@pytest.mark.parametrize("plan", [NOTHING, WHOLE, *SUBSETS], ids=lambda p: "whole" if p.whole else ",".join(p.parts))
def test_the_prediction_is_what_a_run_keeps(plan: Recompute) -> None:
    for name in MODELS:
        kept: list[Tensor] = []
        _run(name, plan, kept=kept)
        shape = LayerShape(_model(name), AT, B, S, "softmax", name == "moe")
        sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept if x.numel() % (S * B) == 0}
        # Parameters and tables are shown too: none of theirs is a multiple of the tokens.
        assert sum(sizes.values()) == pytest.approx(2 * shape.kept_bytes(plan), rel=0.02), name


def test_parts_are_chosen_by_bytes_an_operation() -> None:
    """A long sequence's softmax is worth computing again; blocked attention, which keeps no scores, is not."""
    shape = {"n_layers": 1, "hidden": 4096, "n_heads": 32, "n_kv_heads": 8, "ffn_hidden": 14336, "vocab_size": 128}
    model = resolve(Config(model=ModelConfig(**shape, max_seq_length=8192))).model
    placement = Placement(Axis("tp", 8), True, torch.bfloat16, torch.device("cpu"))
    assert LayerShape(model, placement, 1, 4096, "softmax").parts == ("layernorm", "mlp_act", "core_attn")
    assert LayerShape(model, placement, 1, 4096, "blocked").parts == ("layernorm", "mlp_act")


def test_a_part_that_is_asked_for_runs_once_more_and_one_that_is_not_does_not() -> None:
    activations, runs = Activations(), []

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, asks: bool) -> Tensor:
            def function(x: Tensor) -> Tensor:
                runs.append(asks)
                return x + 1.0  # saves nothing itself

            y = activations.part("mlp_act", function, x)
            return (y * y if asks else y * 2.0).sum()

    for asks in (True, False):
        x = torch.randn(1000, requires_grad=True)
        activations.run(Recompute(frozenset(["mlp_act"])), Layer(), x, asks).backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2.0 * (x.detach() + 1.0) if asks else torch.full_like(x, 2.0))
    assert runs == [True, True, False]


@pytest.mark.parametrize("plan", [NOTHING, WHOLE, SUBSETS[-1]], ids=("nothing", "whole", "parts"))
def test_nothing_of_a_layer_outlives_its_backward_or_a_forward_without_one(plan: Recompute) -> None:
    """Hooks of autograd hold on to what they can reach, and Python's collector does not see through them."""
    _run("llama", plan, kept=[])
    shape = LayerShape(_model("llama"), AT, B, S, "softmax")
    shape.kept_bytes(plan)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (module._Layer, module._Run)]
