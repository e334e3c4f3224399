"""Prompts of unequal length in one batch: each sequence becomes what it becomes alone, and its log-probabilities are
the trainer's."""

from typing import Any

import pytest
import torch
from logical import fill
from saved_models import SHAPE
from torch import Tensor

from megascratch.config import Config, ModelConfig, config_from_dict
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import run_ranks
from megascratch.errors import ConfigError
from megascratch.infer import Completion, Sampling, complete, decoding
from megascratch.nn import Placement, SequenceInfo, Stage, token_logprobs

V = 300
LENGTHS = (5, 1, 11, 3, 7)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True, "tie_embeddings": True},
    "mla": {
        "n_kv_heads": None,
        "mla": {"kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
    },
    "moe": {"moe": {"num_experts": 4, "ffn_hidden": 24}},
}
VARIED = Sampling(temperature=1.7, seed=4)


def _stage(
    name: str = "llama", dtype: torch.dtype = torch.float64, mesh: Mesh | None = None, core: str = "softmax"
) -> Stage:
    mesh = mesh or Mesh.serial()
    config: Config = config_from_dict({"model": {**SHAPE, "vocab_size": V, **MODELS[name]}, "data": {"seq_length": 16}})
    model: ModelConfig = config.model
    stage = Stage(model, Placement(mesh.tp, False, dtype, mesh.device), core=core).eval().requires_grad_(False)
    fill(stage, mesh)
    return stage


def _prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (length,), generator=generator) for length in LENGTHS]


def _scored(stage: Stage, prompt: Tensor, completion: Completion, temperature: float) -> Tensor:
    """Return the log-probabilities that one pass over the whole sequence gives, as a trainer computes them."""
    tokens = torch.cat([prompt, completion.tokens]).unsqueeze(0)
    logits = stage(None, tokens[:, :-1], SequenceInfo(tokens.shape[1] - 1))[len(prompt) - 1 :, 0] / temperature
    return token_logprobs(logits, completion.tokens, V, stage.placement.tp)


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_does_not_depend_on_what_shares_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PROMPT_CHUNK", 4)
    stage = _stage(name)
    options: dict[str, Any] = {"max_tokens": 12, "stop_ids": range(0, V, 9)}
    together = complete(stage, _prompts(), VARIED, **options)
    assert len({len(completion.tokens) for completion in together}) > 2, "the sequences end at different times"
    for i, (prompt, got) in enumerate(zip(_prompts(), together)):
        (alone,) = complete(stage, [prompt], VARIED, sequences=[i], **options)
        assert torch.equal(got.tokens, alone.tokens)
        assert got.stopped == alone.stopped == (int(got.tokens[-1]) % 9 == 0)
        torch.testing.assert_close(got.logprobs, alone.logprobs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("core", ["softmax", "blocked", "sdpa"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_log_probabilities_are_the_trainers(dtype: torch.dtype, atol: float, core: str) -> None:
    stage = _stage(dtype=dtype, core=core)
    sampling = Sampling(temperature=1.7, top_k=40, top_p=0.9, seed=2)  # they are of the whole distribution
    for prompt, completion in zip(_prompts(), complete(stage, _prompts(), sampling, max_tokens=20), strict=True):
        torch.testing.assert_close(completion.logprobs, _scored(stage, prompt, completion, 1.7), rtol=0, atol=atol)
        assert not torch.allclose(completion.logprobs, _scored(stage, prompt, completion, 1.0), atol=1e-3)


def test_samples_of_a_prompt_are_what_as_many_prompts_are() -> None:
    stage, prompts = _stage(), _prompts()
    repeated = [prompt for prompt in prompts for _ in range(3)]
    expected = complete(stage, repeated, VARIED, max_tokens=6, stop_ids=range(0, V, 9))
    got = complete(stage, prompts, VARIED, max_tokens=6, stop_ids=range(0, V, 9), samples=3)
    assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in expected]
    assert len({tuple(c.tokens.tolist()) for c in got[:3]}) == 3


def test_the_context_ends_each_sequence_at_its_own_time() -> None:
    stage = _stage()
    prompts = [torch.arange(n) for n in (60, 5, 63)]
    completions = complete(stage, prompts, VARIED, max_tokens=30)
    assert [len(c.tokens) for c in completions] == [4, 30, 1]
    assert not any(c.stopped for c in completions)


def test_all_that_is_asked_for_is_nothing() -> None:
    assert complete(_stage(), [], VARIED, max_tokens=3) == []
    with pytest.raises(ConfigError, match="holds no token"):
        complete(_stage(), [torch.tensor([1]), torch.tensor([], dtype=torch.int64)], VARIED, max_tokens=3)


def test_it_stops_when_all_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, passes = _stage(), []
    hidden = Stage.hidden
    monkeypatch.setattr(
        Stage, "hidden", lambda self, x, tokens, *args: passes.append(len(tokens)) or hidden(self, x, tokens, *args)
    )
    completions = complete(stage, _prompts(), VARIED, max_tokens=50, stop_ids=range(0, V, 4))
    longest = max(len(c.tokens) for c in completions)
    assert longest < 50 and len(passes) == longest  # the prompts' pass, and one for each token but the last
    assert passes[-1] < len(LENGTHS), "complete sequences leave the batch"


def _on_two_ranks() -> list[tuple[list[int], list[float]]]:
    stage = _stage(mesh=Mesh.create(MeshSpec(tp=2), torch.device("cpu")))
    done = complete(stage, _prompts(), VARIED, max_tokens=8, stop_ids=range(0, V, 9))
    return [(c.tokens.tolist(), c.logprobs.tolist()) for c in done]


def test_two_ranks_complete_what_one_does() -> None:
    expected = complete(_stage(), _prompts(), VARIED, max_tokens=8, stop_ids=range(0, V, 9))
    for ranks in run_ranks(2, _on_two_ranks):
        assert [tokens for tokens, _ in ranks] == [c.tokens.tolist() for c in expected]
        for (_, logprobs), want in zip(ranks, expected):
            assert logprobs == pytest.approx(want.logprobs.tolist(), rel=1e-9)
