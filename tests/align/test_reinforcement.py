"""GRPO and PPO on the engine: the same on every layout, the first ratio exactly 1, and what is left out is told."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import Layout, Trained, local_weights, make_config, make_engine, whole_weights
from reinforcement import make_task, reinforced

from megascratch.config import Config
from megascratch.dist.testing import RankPool
from megascratch.engine import StepReport

SECTIONS: dict[str, dict[str, Any]] = {
    # With a divergence in the loss.
    "grpo": {"grpo": {"kl_coeff": 0.1, "aggregation": "grpo", "clip_high": 0.28}},
    # A ratio for each sequence, and sequences that did not end left out.
    "gspo": {"grpo": {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04}, "rollout": {"mask_truncated": True}},
    "ppo": {"ppo": {"gae_masked": "plain", "value_clip": 0.1}},
    # Two batches a rollout, so that what policy and critic say before the first step is computed by itself.
    "ppo-batches": {
        "ppo": {"kl_target": 1.0, "kl_horizon": 100},
        "rollout": {"samples": 1, "prompts": 16, "epochs": 1},
    },
}
LAYOUTS = [
    Layout("tp2-sp", {"tp": 2}, "llama", 4),
    Layout("tp2-no-sp", {"tp": 2, "sequence_parallel": False}, "tied", 4),
    Layout("tp4", {"tp": 4}, "qwen", 8),
    Layout("pp2", {"pp": 2}, "tied", 2),
    Layout("pp2-vp2", {"pp": 2, "vp": 2}, "llama", 2),
    Layout("zb-v-tp2", {"pp": 2, "vp": 2, "tp": 2, "schedule": "zb-v"}, "llama", 4),
    Layout("cp2-ring", {"cp": 2}, "gpt2", 4),
    Layout("cp2-ulysses-tp2", {"cp": 2, "tp": 2, "cp_algorithm": "ulysses"}, "gemma", 8),
    Layout("dp2", {"dp": 2}, "llama", 2),
    Layout("dp4-zero1", {"dp": 4, "zero": 1}, "olmo"),
    Layout("dp2-tp2-zero2", {"dp": 2, "tp": 2, "zero": 2}, "tied", 2),
    Layout("dp2-cp2-zero3", {"dp": 2, "cp": 2, "zero": 3}, "llama", 4),
    Layout("dp2-pp2-zero3", {"dp": 2, "pp": 2, "zero": 3}, "tied", 2),
]
Run = tuple[list[StepReport], list[dict[str, Any]], list[Trained]]


def learn(config: Config, methods: tuple[str, ...], n_steps: int = 3) -> dict[str, Run]:
    """Train from rollouts by each method; return the reports, what was observed, and the weights of every engine."""
    runs: dict[str, Run] = {}
    for method in methods:
        engine = make_engine(reinforced(config, SECTIONS[method]))
        task, _ = make_task(engine, method)
        reports, observed = [], []
        for microbatches in task.train.steps(0, n_steps):
            reports.append(engine.train_step(microbatches, task.objective, keep=task.keep))
            observed.append(dict(task.observe(reports[-1])))
        engines = [engine, *task.companions.values()]
        runs[method] = reports, observed, [Trained(reports, [], local_weights(each)) for each in engines]
    return runs


METHODS = ("grpo", "gspo", "ppo", "ppo-batches")
# What depends on the machine.
TIMES = {"rollout/tokens_per_s", "rollout/s"}


@functools.cache
def one_rank(model: str, n_layers: int) -> dict[str, Run]:
    torch.set_num_threads(1)
    return learn(make_config(model, n_layers=n_layers), METHODS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_learns_what_one_rank_learns(layout: Layout, pool: RankPool) -> None:
    """Rollouts too: the second one is sampled from weights that the first one has changed.

    Packed, completions share rows, and the policy learns what it learns from rows of one each.
    """
    expected = one_rank(layout.model, layout.n_layers)
    unpacked = pool.run(layout.world, learn, layout.config(), ("grpo", "ppo", "ppo-batches"))
    packed = pool.run(layout.world, learn, replace(layout, packed=True).config(), METHODS)
    for ranks, method in ((runs, method) for runs in (unpacked, packed) for method in runs[0]):
        reports, observed, engines = expected[method]
        for rank in ranks:
            for got, want in zip(rank[method][0], reports, strict=True):
                assert got.loss == pytest.approx(want.loss, rel=1e-9, abs=1e-12)
                assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-9)
                assert got.metrics == pytest.approx(want.metrics, rel=1e-8, abs=1e-10)
            for values, wanted in zip(rank[method][1], observed, strict=True):
                assert values.keys() == wanted.keys()
                for name in values.keys() - TIMES:
                    assert values[name] == pytest.approx(wanted[name], rel=1e-8, abs=1e-10), name
        for i, trained in enumerate(engines):
            weights = whole_weights([rank[method][2][i] for rank in ranks])
            for name, want in whole_weights([trained]).items():
                error = (weights[name] - want).norm() / want.norm().clamp_min(1e-30)
                assert error < 1e-9, f"{method}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_ratio_is_exactly_one(method: str, packed: bool) -> None:
    """Before the first update of a rollout, the policy is the one that sampled; afterwards no more."""
    config = make_config("gemma" if packed else "llama", n_layers=2, packed=packed)
    reports, observed, _ = learn(config, (method,), n_steps=6)[method]
    per_rollout = 2
    for step, (report, values) in enumerate(zip(reports, observed)):
        metrics = report.metrics
        assert ("reward" in values) == (step % per_rollout == 0)
        assert metrics["sampling/sampling_logp_difference/mean"] < 1e-9
        assert (metrics["val/ratio"] == 1.0) == (step % per_rollout == 0)
        assert metrics["clip_ratio/region_mean"] == 0.0 or step % per_rollout
    assert any(report.metrics["clip_ratio/region_mean"] > 0 for report in reports), "clipping is at work"
