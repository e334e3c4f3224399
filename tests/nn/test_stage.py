"""The whole decoder: every layout against one rank, dropout, recompute, cached generation, positions that restart."""

from typing import Any

import pytest
import torch
from layouts import GEMMA
from logical import fill, logical_gradients, to_logical
from torch import Tensor

from megascratch.config import Config, ModelConfig, RopeScaling, resolve
from megascratch.dist.layout import Split, spec_of
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.nn import (
    NOTHING,
    WHOLE,
    LayerCache,
    Placement,
    SequenceInfo,
    Stage,
    layer_range,
    parameter_specs,
    token_logprobs,
)
from megascratch.nn.embedding import vocabulary_split

S, B, V = 8, 3, 150  # 150 rows are no multiple of two ranks' tiles
CPU, F64 = torch.device("cpu"), torch.float64

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt-2": {
        "norm": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "tie_embeddings": True,
        "bias": True,
        "n_kv_heads": 4,
    },
    "olmo-2": {"norm_position": "post", "qk_norm": True, "tie_embeddings": True},
    "olmo-2, one norm over all heads": {"norm_position": "post", "qk_norm": True, "qk_norm_across_heads": True},
    "gemma": {**GEMMA, "sliding_window": 3},
    "qwen-2, yarn": {
        "qkv_bias": True,
        "activation": "geglu",
        "rope_scaling": RopeScaling(type="yarn", factor=4, original_seq_length=8),
    },
    "no positions, dropout": {"position": "none", "activation": "relu2", "dropout": 0.2},
    "gpt-2 with dropout": {"norm": "layernorm", "position": "learned", "tie_embeddings": True, "dropout": 0.1},
}


def _model(**changes: Any) -> ModelConfig:
    shape = {"n_layers": 3, "hidden": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "ffn_hidden": 20}
    return resolve(Config(model=ModelConfig(**{**shape, "vocab_size": V, "max_seq_length": 32, **changes}))).model


def _stage(model: ModelConfig, mesh: Mesh, sequence_parallel: bool = False, dtype: Any = F64, **options: Any) -> Stage:
    stage = Stage(model, Placement(mesh.tp, sequence_parallel, dtype, CPU), **options)
    fill(stage, mesh)
    return stage


def _tokens(batch: int = B, length: int = S) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(1))


def _logits(logits: Tensor, mesh: Mesh) -> Tensor:
    split = vocabulary_split(V, mesh.tp.size)
    return to_logical(logits, (*logits.shape[:2], V), Split(2, "tp", pad=split.pad), mesh)


def _run(stage: Stage, mesh: Mesh, samples: list[int], positions: Tensor | None = None) -> dict[str, Tensor]:
    """Return logits and every gradient of a loss over some of eight samples, in logical shape."""
    tokens = _tokens(8)[samples]
    info = SequenceInfo(S, positions=positions, sample_ids=torch.tensor(samples) + 1000, seed=5)
    stage.zero_grad()
    logits = stage(None, tokens, info)
    labels = tokens.roll(-1, dims=1).t()
    token_logprobs(logits, labels, V, mesh.tp).sum().backward()
    return {"logits": _logits(logits, mesh), **logical_gradients(stage, mesh)}


def _assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert actual.keys() == expected.keys(), where
    for key, value in actual.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{where}: {key}: {m}"
        )


@distributed(world=2)
def test_two_ranks_equal_one() -> None:
    mesh, serial = Mesh.create(MeshSpec(tp=2), CPU), Mesh.serial()
    samples = [4, 0, 6]
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 0, 1, 2, 3, 0]])
    for name, changes in MODELS.items():
        model = _model(**changes)
        positions = restarting if name in ("llama", "gpt-2") else None
        expected = _run(_stage(model, serial), serial, samples, positions)
        for sequence_parallel in (False, True):
            for plan in (NOTHING, WHOLE) if model.dropout else (NOTHING,):
                stage = _stage(model, mesh, sequence_parallel, recompute=dict.fromkeys(range(3), plan))
                actual = _run(stage, mesh, samples, positions)
                _assert_equal(actual, expected, f"{name}, {sequence_parallel=}, {plan}")


@pytest.mark.parametrize("name", ["no positions, dropout", "gpt-2 with dropout"])
def test_dropout_depends_on_the_sample_not_on_its_micro_batch(name: str) -> None:
    mesh = Mesh.serial()
    stage = _stage(_model(**MODELS[name]), mesh)
    whole = _run(stage, mesh, [0, 1, 2, 3])
    halves = [_run(stage, mesh, [3, 1]), _run(stage, mesh, [0, 2])]
    order = torch.cat([halves[1]["logits"][:, :1], halves[0]["logits"][:, 1:], halves[1]["logits"][:, 1:]], dim=1)
    order = torch.cat([order, halves[0]["logits"][:, :1]], dim=1)
    torch.testing.assert_close(order, whole["logits"], rtol=1e-12, atol=1e-12)
    summed = {key: halves[0][key] + halves[1][key] for key in whole if key != "logits"}
    _assert_equal(summed, {key: value for key, value in whole.items() if key != "logits"}, "gradients")


def test_dropout_drops_its_share_and_nothing_in_evaluation() -> None:
    mesh = Mesh.serial()
    stage = _stage(_model(dropout=0.2), mesh)
    info = SequenceInfo(512, sample_ids=torch.tensor([3, 2**40]), seed=5)
    x = torch.ones(512, 2, 64, dtype=F64)
    y = stage.embed_dropout(x, info)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    dropped = (y == 0).double().mean((0, 2))
    assert ((dropped - 0.2).abs() < 0.01).all()  # 32,768 draws a sample: 0.01 is 4.5 standard deviations
    assert not torch.equal(y[:, 0], y[:, 1])
    # The same elements under another seed, or at another site, are other draws.
    other = stage.embed_dropout(x, SequenceInfo(512, sample_ids=info.sample_ids, seed=6))
    block = stage.layers["0"].attn_dropout(x, info)
    for different in (other, block):
        assert 0.25 < ((different == 0) != (y == 0)).double().mean() < 0.39  # 2 · 0.2 · 0.8 = 0.32
    stage.eval()
    assert stage.embed_dropout(x, info) is x


@pytest.mark.parametrize("far", [2**20, 2**30, 2**44])
def test_no_two_samples_share_dropout(far: int) -> None:
    stage = _stage(_model(dropout=0.5), Mesh.serial())
    y = stage.embed_dropout(torch.ones(4, 2, 64), SequenceInfo(4, sample_ids=torch.tensor([7, 7 + far])))
    assert not torch.equal(y[:, 0], y[:, 1])


@pytest.mark.parametrize("core", ["softmax", "sdpa", "blocked"])
@pytest.mark.parametrize("name", ["llama", "gpt-2", "olmo-2", "gemma"])
def test_cached_steps_equal_the_whole_sequence(name: str, core: str) -> None:
    mesh, model = Mesh.serial(), _model(**MODELS[name])
    stage = _stage(model, mesh, core=core).eval()
    tokens = _tokens()
    assert model.n_kv_heads is not None and model.head_dim is not None
    shape = (S, B, model.n_kv_heads, model.head_dim)
    caches = [LayerCache(torch.empty(shape, dtype=F64), torch.empty(shape, dtype=F64)) for _ in range(model.n_layers)]
    with torch.no_grad():
        whole = stage(None, tokens, SequenceInfo(S))
        start, parts = 0, []
        for length in (3, 1, 1, 2, 1):  # a prompt, single tokens, a chunk
            part = tokens[:, start : start + length]
            parts.append(stage(None, part, SequenceInfo(length, offset=start), caches))
            start += length
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_restarting_positions_equal_a_shifted_table() -> None:
    """A sample whose positions are all 2 … s + 1 is the sample at offset 2."""
    mesh = Mesh.serial()
    for name in ("llama", "gpt-2"):
        stage = _stage(_model(**MODELS[name]), mesh).eval()
        shifted = (torch.arange(S) + 2).expand(B, S)
        given = stage(None, _tokens(), SequenceInfo(S, positions=shifted))
        torch.testing.assert_close(given, stage(None, _tokens(), SequenceInfo(S, offset=2)), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(given, stage(None, _tokens(), SequenceInfo(S))) or name == "llama"


@pytest.mark.parametrize("name", ["llama", "gpt-2"])
def test_stages_in_a_row_are_the_whole_model(name: str) -> None:
    mesh, model = Mesh.serial(), _model(**MODELS[name])
    whole = _stage(model, mesh).eval()
    x: Tensor | None = None
    for stage in range(3):
        x = _stage(model, mesh, stage=stage, n_stages=3).eval()(x, _tokens(), SequenceInfo(S))
    torch.testing.assert_close(x, whole(None, _tokens(), SequenceInfo(S)), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_specs_are_those_of_the_parameters(name: str) -> None:
    model = _model(**MODELS[name])
    stage = _stage(model, Mesh.serial())
    specs = {spec.name: spec for spec in parameter_specs(model, tp=2, sequence_parallel=True)}
    assert {n: s.shape for n, s in specs.items()} == {n: spec_of(p).shape for n, p in stage.named_parameters()}
    stages = [_stage(model, Mesh.serial(), stage=stage, n_stages=3) for stage in range(3)]
    held = [spec_of(p) for part in stages for p in part.parameters()]
    assert sorted(spec.name for spec in held if not spec.tied) == sorted(specs)
    assert [spec.name for spec in held if spec.tied] == (["embed.weight"] if model.tie_embeddings else [])


@pytest.mark.parametrize(("n_layers", "n_stages"), [(32, 4), (7, 3), (5, 5)])
def test_layer_ranges_tile_the_layers_evenly(n_layers: int, n_stages: int) -> None:
    ranges = [layer_range(n_layers, stage, n_stages) for stage in range(n_stages)]
    assert [i for part in ranges for i in part] == list(range(n_layers))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
