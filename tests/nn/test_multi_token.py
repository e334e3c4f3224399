"""Multi-token prediction: what each module reads and predicts, and the objective's sum, against sums by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from logical import fill

from megascratch.config import Config, ModelConfig, resolve
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine.objective import Outputs, next_token
from megascratch.nn import Placement, SequenceInfo, Stage, parameter_specs

S, B, V = 6, 2, 40


def _microbatch() -> Microbatch:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, V, (B, S + 1), generator=generator)
    documents = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = torch.arange(S).expand(B, S)
    return Microbatch(text[:, :-1], text[:, 1:], mask, positions, documents, torch.arange(B))


def _stage(tied: bool) -> Stage:
    shape = {"n_layers": 2, "hidden": 16, "n_heads": 4, "ffn_hidden": 20, "vocab_size": V, "max_seq_length": 16}
    model = resolve(Config(model=ModelConfig(**shape, mtp_num_layers=2, tie_embeddings=tied))).model
    mesh = Mesh.serial()
    stage = Stage(model, Placement(mesh.tp, False, torch.float64, mesh.device))
    fill(stage, mesh)
    return stage


def test_what_lies_ahead() -> None:
    """One place later, but nothing beyond the sequence's or the document's end."""
    microbatch = _microbatch()
    ahead = microbatch.ahead(1)
    assert torch.equal(ahead.tokens[:, :-1], microbatch.labels[:, :-1])
    assert torch.equal(ahead.labels[:, :-1], microbatch.labels[:, 1:])
    assert ahead.loss_mask.tolist() == [[1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0]]
    assert microbatch.ahead(2).loss_mask.tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("tied", [False, True])
def test_modules_and_their_loss_by_hand(tied: bool) -> None:
    stage, microbatch = _stage(tied), _microbatch()
    info = SequenceInfo(S)
    later = [microbatch.ahead(n) for n in (1, 2)]
    x = stage.trunk(None, microbatch.tokens, info)
    hidden = stage.look_ahead(x, [m.tokens for m in later], info)

    table, expected, so_far = stage.embed.weight, [], x
    for module, m in zip(stage.mtp, later):
        both = torch.cat((module.embed_norm(F.embedding(m.tokens.t(), table)), module.hidden_norm(so_far)), dim=-1)
        so_far = module.layer(both @ module.merge.weight.t(), stage.rotary, info)
        expected.append(module.norm(so_far))
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)

    outputs = Outputs(stage.norm(x), stage.head_weight, V, stage.placement.tp, stage.placement.cp, False)
    ahead = [(replace(outputs, hidden=h), m) for h, m in zip(hidden, later)]
    loss = next_token(replace(outputs, ahead=ahead, ahead_factor=0.3), microbatch)
    sums = []
    for h, m in zip([stage.norm(x), *hidden], [microbatch, *later]):
        logits = (h @ stage.head_weight.t())[..., :V]
        nats = F.cross_entropy(logits.flatten(0, 1), m.labels.t().flatten(), reduction="none").view(S, B)
        sums.append((nats * m.loss_mask.t()).sum())
    assert loss.besides is not None
    torch.testing.assert_close(loss.total, sums[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.besides, 0.3 * (sums[1] + sums[2]) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.metrics["mtp_loss"], (sums[1] + sums[2]) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_stage_has_a_copy_of_the_embedding(tied: bool) -> None:
    model = _stage(tied).model
    mesh = Mesh.serial()
    ends = [Stage(model, Placement(mesh.tp, False, torch.float64, mesh.device), i, 2) for i in range(2)]
    names = [{p.spec.name: p.spec for p in end.parameters()} for end in ends]  # type: ignore[attr-defined]
    assert not names[0]["embed.weight"].tied and names[1]["embed.weight"].tied
    assert names[0]["embed.weight"].grad_axes == names[1]["embed.weight"].grad_axes == ("ends",)
    assert ("head.weight" in names[1]) == (not tied)
    logical = {spec.name for spec in parameter_specs(model)}
    assert names[0].keys() | names[1].keys() == logical
    assert sum(name.startswith("mtp.1.") for name in logical) == 10
