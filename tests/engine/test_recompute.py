"""Who computes what again: each rule, and `auto` against a budget; and the memory that it is decided by."""

from typing import Any

import pytest
import torch

from megascratch.config import Config, config_from_dict
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.engine.memory import GIB, MemoryModel
from megascratch.engine.recompute import describe, recompute_plans
from megascratch.errors import LayoutError
from megascratch.nn import NOTHING, WHOLE, Placement, Recompute

LLAMA = {"preset": "llama3-8b", "vocab_size": 128256}
CHEAP = frozenset({"layernorm", "mlp_act"})


def _config(lora: dict[str, Any] | None = None, **parallel: Any) -> Config:
    given: dict[str, Any] = {
        "model": LLAMA,
        "parallel": {"tp": 2, "pp": 4, "dp": 8, **parallel},
        "data": {"seq_length": 8192},
        "train": {"global_batch": 64},
    }
    return config_from_dict(given if lora is None else {**given, "lora": lora})


def _place(config: Config, pp_rank: int = 0) -> tuple[Config, Mesh, Placement, str]:
    spec = MeshSpec.of(config.parallel)
    mesh = Mesh.planned(spec, spec.rank({"pp": pp_rank}))
    return config, mesh, Placement(mesh.tp, True, torch.bfloat16, mesh.device, mesh.cp), "blocked"


def _plans(pp_rank: int = 0, **parallel: Any) -> dict[int, Recompute]:
    return recompute_plans(*_place(_config(**parallel), pp_rank))


def test_each_rule() -> None:
    assert _plans() == dict.fromkeys(range(8), NOTHING)
    assert _plans(pp_rank=2, recompute="full") == dict.fromkeys(range(16, 24), WHOLE)
    assert set(_plans(recompute="selective").values()) == {Recompute(CHEAP)}
    named = _plans(recompute="selective", recompute_modules=["core_attn"])
    assert set(named.values()) == {Recompute(frozenset({"core_attn"}))}
    block = _plans(pp_rank=1, recompute="block", recompute_layers=3)
    assert [block[i] == WHOLE for i in range(8, 16)] == [True] * 3 + [False] * 5
    two_stages = _plans(vp=2, recompute="block", recompute_layers=1)
    assert [i for i, plan in two_stages.items() if plan == WHOLE] == [0, 16]
    assert set(_plans(recompute="full", offload_activations=True).values()) == {Recompute(whole=True, offload=True)}


def test_the_memory_is_that_of_the_formulas() -> None:
    """Llama-3 8B, tp 2, pp 4: bytes a parameter as in the table, sb(4h + 2nd + 2kd + 3f) numbers a layer over tp."""
    memory = MemoryModel(*_place(_config()))
    h, f, v, layers = 4096, 14336, 128256, 8
    numel = layers * ((h * (4096 + 2 * 1024) + 4096 * h + 3 * h * f) // 2 + 2 * h) + v * h // 2
    assert memory.numel == {"data": numel}
    whole = memory.with_plans({})
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * numel, 4 * numel, 12 * numel)
    a_layer = 2 * 8192 * (4 * h + 2 * 4096 + 2 * 1024 + 3 * f) // 2
    assert whole.activations == pytest.approx(layers * 4 * a_layer, rel=0.01)  # 1F1B: the first rank holds 4
    zero = MemoryModel(*_place(_config(zero=1))).with_plans({})
    assert zero.optimizer == 12 * numel // 8
    assert memory.with_plans(dict.fromkeys(range(8), WHOLE)).activations == layers * 4 * 2 * 8192 * h // 2
    last = MemoryModel(*_place(_config(), 3))
    assert last.in_flight == 1 and last.has_head and not memory.has_head


@pytest.mark.parametrize(
    ("keys", "gradients", "optimizer"),
    [
        ({"master_remainders": True}, 4, 10),
        ({"master_remainders": True, "main_grads_dtype": "bf16", "exp_avg_dtype": "bf16"}, 2, 8),
        ({"exp_avg_sq_dtype": "bf16"}, 4, 10),
        ({"master_weights": False}, 2, 4),
        ({"master_weights": False, "exp_avg_sq_dtype": "fp32"}, 2, 6),
    ],
)
def test_the_memory_follows_the_optimizers_precision(keys: dict[str, Any], gradients: int, optimizer: int) -> None:
    config = _config()
    config = config.model_copy(update={"optim": config.optim.model_copy(update=keys)})
    model = MemoryModel(*_place(config))
    memory = model.with_plans({})
    numel = model.numel["data"]
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * numel, gradients * numel, optimizer * numel)


@pytest.mark.parametrize(("base", "bytes_each"), [("full", 2), ("nf4", 0.5 + 1 / 64 + 2 * 8 / 256 / 64)])
def test_what_does_not_learn_has_only_its_weights(base: str, bytes_each: float) -> None:
    """Rank 16 beside every product of Llama-3 8B's last stage, tp 2: of r (n_in + n_out) numbers tp divides one part.

    In 4 bits: the codes, a scale of a byte a block of 64, and eight bytes for 256 of those, which tp does not divide.
    """
    model = MemoryModel(*_place(_config({"rank": 16, "alpha": 32.0, "base": base}, zero=1), 3))
    memory = model.with_plans({})
    h, f, v, r, layers = 4096, 14336, 128256, 16, 8
    into = [(h, h + 2 * 1024), (h, 2 * f)]  # column: A whole, B divided; row: A divided, B whole
    learns = layers * r * (sum(i + o // 2 for i, o in into) + (h + f) // 2 + 2 * h)
    assert model.numel == {"data": learns}
    assert (memory.gradients, memory.optimizer) == (4 * learns, 12 * learns // 8)
    products = layers * (sum(i * o for i, o in into) + (h + f) * h) // 2
    rest = v * h // 2 + (2 * layers + 1) * h
    assert memory.weights == pytest.approx(2 * learns + bytes_each * products + 2 * rest, rel=1e-6)
    assert model.unpacked_bytes == (0 if base == "full" else 10 * h * f)
    frozen_head = memory.passing - model.unpacked_bytes
    all_learn = MemoryModel(*_place(_config(zero=1), 3)).with_plans({}).passing
    assert all_learn - frozen_head == v // 2 * h * 6


def test_auto_takes_the_least_that_fits() -> None:
    memory = MemoryModel(*_place(_config()))
    levels = {
        "nothing": memory.with_plans({}),
        "cheap": memory.with_plans(dict.fromkeys(range(8), Recompute(CHEAP))),
        "three": memory.with_plans({**dict.fromkeys(range(8), Recompute(CHEAP)), **dict.fromkeys(range(3), WHOLE)}),
        "whole": memory.with_plans(dict.fromkeys(range(8), WHOLE)),
    }
    assert levels["nothing"].total > levels["cheap"].total > levels["three"].total > levels["whole"].total

    def fitted(level: str) -> list[Recompute]:
        return list(_plans(recompute="auto", memory_budget_gib=levels[level].total / GIB).values())

    assert fitted("nothing") == [NOTHING] * 8
    assert fitted("cheap") == [Recompute(CHEAP)] * 8
    assert fitted("three") == [WHOLE] * 3 + [Recompute(CHEAP)] * 5
    assert fitted("whole") == [WHOLE] * 8
    with pytest.raises(LayoutError, match=r"memory_budget_gib = 10 .* rank 0 needs with every layer .*optimizer"):
        _plans(recompute="auto", memory_budget_gib=10)
    assert "GiB (weights 2.11, gradients 4.23" in describe(levels["whole"])
