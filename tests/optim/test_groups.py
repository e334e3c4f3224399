"""Groups and frozen parameters: torch's own parameter groups as the oracle, and the same on every layout."""

from typing import Any

import pytest
import torch
from layouts import Trained, make_config, make_engine, run_layout, train_steps, whole_weights
from stepping import take_step

from megascratch.config import Config, OptimConfig, ParallelConfig, ParamGroup, config_from_dict, load_config, to_toml
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Mesh
from megascratch.dist.testing import RankPool
from megascratch.engine import Engine
from megascratch.errors import ConfigError
from megascratch.nn import Placement
from megascratch.optim import Optimizer, Unit

GROUPS = [
    {"params": ["layers.0.*", "embed.*"], "lr_scale": 0.5},
    {"params": ["*norm*"], "lr_scale": 2.0, "weight_decay": 0.3},
]
FROZEN = {
    "the first stage": ["embed.*", "layers.[01].*"],
    "the last stage": ["layers.[23].*", "norm.*", "head.*"],
    "every matrix": ["*.qkv.*", "*.proj.*", "*.gate_up.*", "*.down.*"],
}


def _config(optim: dict[str, Any], parallel: dict[str, Any] | None = None, model: str = "llama") -> Config:
    raw = make_config(model, parallel).model_dump(exclude_none=True)
    return config_from_dict({**raw, "optim": {**raw["optim"], **optim}})


def test_groups_are_torchs_parameter_groups() -> None:
    placement = Placement(Mesh.serial().tp, False, torch.float64, torch.device("cpu"))
    ours = [placement.parameter(5, 3), placement.parameter(4, 3), placement.parameter(3, decay=False)]
    values = [torch.randn_like(param) for param in ours]
    for name, param, value in zip(("a.weight", "b.weight", "b.norm"), ours, values):
        param.data.copy_(value)
        param.spec = spec_of(param).__class__(**{**vars(spec_of(param)), "name": name})  # type: ignore[attr-defined]
    groups = [ParamGroup(params=["a.*"], lr_scale=0.25), ParamGroup(params=["b.w*"], weight_decay=0.7)]
    optim = OptimConfig(clip=0.0, weight_decay=0.2, groups=groups)
    optimizer = Optimizer([Unit.one(ours)], Mesh.serial(), optim, ParallelConfig())
    theirs = [torch.nn.Parameter(value.clone()) for value in values]
    oracle = torch.optim.AdamW(
        [
            {"params": theirs[:1], "lr": 0.25e-2, "weight_decay": 0.2},
            {"params": theirs[1:2], "lr": 1e-2, "weight_decay": 0.7},
            {"params": theirs[2:], "lr": 1e-2, "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    for _ in range(3):
        optimizer.zero_grads()
        oracle.zero_grad()
        for mine, other in zip(ours, theirs):
            direction = torch.randn_like(other)
            (mine * direction).sum().backward()
            (other * direction).sum().backward()
        take_step(optimizer, lr=1e-2)
        oracle.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.data, other.data)


def _equal(ranks: list[Trained], reference: Trained) -> None:
    for got, want in zip(ranks[0].reports, reference.reports, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-9)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-9)
    weights = whole_weights(ranks)
    for name, want in whole_weights([reference]).items():
        torch.testing.assert_close(weights[name], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "parallel", [{"dp": 2, "pp": 2, "zero": 3}, {"tp": 2, "pp": 2, "vp": 2, "schedule": "zb-v"}], ids=["zero3", "zb-v"]
)
def test_groups_are_the_same_on_every_layout(parallel: dict[str, Any], pool: RankPool) -> None:
    reference = run_layout(_config({"groups": GROUPS}), 4)
    assert reference.reports != run_layout(_config({}), 4).reports
    _equal(pool.run(4, run_layout, _config({"groups": GROUPS}, parallel), 4), reference)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_stay_and_the_others_learn(frozen: str, schedule: str, pool: RankPool) -> None:
    optim = {"frozen": FROZEN[frozen]}
    parallel = {"pp": 2, "vp": 2 if schedule == "interleaved" else 1, "dp": 2, "zero": 2, "schedule": schedule}
    engine = make_engine(_config(optim))
    before = {spec_of(p).name: p.detach().clone() for p in engine.parameters()}
    reference = train_steps(engine, 3)
    kept = {spec_of(p).name for p in engine.parameters() if torch.equal(p, before[spec_of(p).name])}
    assert kept == {spec_of(p).name for p in engine.parameters() if not p.requires_grad}
    assert kept
    _equal(pool.run(4, run_layout, _config(optim, parallel), 3), reference)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"frozen": ["layer.*"]},
            r"optim.frozen = layer\.\* +fits no parameter of the model +names are as embed.weight",
        ),
        ({"groups": [{"params": ["nothing"]}]}, r"optim.groups\[0\].params = nothing +fits no parameter"),
        ({"frozen": ["*"]}, "leaves nothing to learn"),
    ],
)
def test_patterns_that_cannot_be_meant_are_told(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(_config(optim), Mesh.serial())


def test_groups_are_written_and_read_as_toml(tmp_path: Any) -> None:
    config = _config({"groups": GROUPS, "frozen": ["embed.*"]})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config
    with pytest.raises(ConfigError, match=r"optim.groups.lr_scales +is not a known key +did you mean lr_scale"):
        _config({"groups": [{"params": ["a"], "lr_scales": 1.0}]})
