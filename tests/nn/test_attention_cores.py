"""The blocked core does what the softmax core does: on its own, and inside a model with packed documents."""

import pytest
import torch

from megascratch.config import ModelConfig
from megascratch.dist.mesh import Mesh
from megascratch.nn import Placement, SequenceInfo, Stage, attention
from megascratch.nn.attention import blocked_core, core_for, softmax_core
from megascratch.nn.initialize import initialize

S, B = 80, 2


@pytest.fixture(autouse=True)
def _blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LEAST_QUERIES", 0)


@pytest.mark.parametrize(("s", "t"), [(S, S), (1, 9), (3, 70)])
def test_cores_agree(s: int, t: int) -> None:
    q = torch.randn(s, B, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(t, B, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    probe = torch.randn_like(q)
    results = []
    for core in (softmax_core, blocked_core):
        y = core(q, k, v)
        results.append((y, *torch.autograd.grad(y, (q, k, v), probe)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_what_blocks_do_not_know_goes_to_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megascratch.ops.attention", None)
    q, k, v = (torch.randn(9, B, heads, 8) for heads in (4, 2, 2))
    mask = torch.rand(B, 1, 9, 9) < 0.2
    for arguments in ((mask, True, None), (None, False, None), (None, True, lambda probs: probs / 2)):
        assert torch.equal(blocked_core(q, k, v, *arguments), softmax_core(q, k, v, *arguments))


def test_packed_documents_are_kept_apart_as_by_a_mask() -> None:
    model = ModelConfig(n_layers=2, hidden=16, n_heads=4, n_kv_heads=2, head_dim=4, ffn_hidden=16, vocab_size=11)
    documents = torch.stack((torch.arange(S) // 30, torch.arange(S) // 7))
    info = SequenceInfo(S, documents=documents)
    mesh = Mesh.serial()
    placement = Placement(mesh.tp, False, torch.float64, torch.device("cpu"))
    outputs = []
    for core in ("softmax", "blocked"):
        stage = Stage(model, placement, core=core)
        initialize(dict(stage.named_parameters()), mesh, seed=1)
        outputs.append(stage(None, torch.arange(S).remainder(11).expand(B, S), info))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-11, atol=1e-12)


def test_the_core_of_a_device() -> None:
    assert core_for("auto", torch.device("cpu")) == "blocked"
    assert core_for("auto", torch.device("cuda")) == "sdpa"
    assert core_for("softmax", torch.device("cuda")) == "softmax"
