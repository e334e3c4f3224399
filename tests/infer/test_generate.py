"""Generation from a checkpoint: the cache changes nothing, nor does the layout; text streams whole characters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import TEXTS, save_model, tokenizer
from torch import Tensor

from megascratch.checkpoint import Shard, convert, save
from megascratch.dist.layout import Extent
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import run_ranks
from megascratch.errors import CheckpointError, ConfigError, LayoutError, TokenizerError
from megascratch.infer import Sampling, decoding, generate, generate_text, load_model, read_config, sample, stream_text
from megascratch.log import make_console
from megascratch.nn import SequenceInfo, Stage

CPU = torch.device("cpu")
GREEDY, VARIED = Sampling(temperature=0), Sampling(temperature=2.0, top_k=50, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run"))


def _prompts(rows: int, length: int) -> Tensor:
    return torch.randint(0, 299, (rows, length), generator=torch.Generator().manual_seed(1))


def _uncached(stage: Stage, prompts: Tensor, sampling: Sampling, n_tokens: int) -> Tensor:
    """Continue prompts by running the whole sequence again for every token."""
    tokens = prompts
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = stage(None, tokens, SequenceInfo(tokens.shape[1]))[-1][:, : stage.model.vocab_size]
        tokens = torch.cat([tokens, sample(logits, sampling, tokens.shape[1]).unsqueeze(1)], dim=1)
    return tokens[:, prompts.shape[1] :]


def _generated(stage: Stage, prompts: Tensor, sampling: Sampling, max_tokens: int, **options: Any) -> Tensor:
    return torch.stack(list(generate(stage, prompts, sampling, max_tokens=max_tokens, **options)), dim=1)


@pytest.mark.parametrize("changes", [{}, {"position": "learned", "norm": "layernorm", "tie_embeddings": True}])
@pytest.mark.parametrize("sampling", [GREEDY, VARIED])
def test_the_cache_changes_nothing(
    tmp_path: Path, changes: dict[str, Any], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_PROMPT_CHUNK", 4)  # a prompt of 9 takes three passes
    stage, _ = load_model(save_model(tmp_path, **changes), Mesh.serial())
    expected = _uncached(stage, _prompts(3, 9), sampling, 20)
    assert torch.equal(_generated(stage, _prompts(3, 9), sampling, 20), expected)
    assert len(expected.unique()) > 10  # the model says something


def _two_ranks(checkpoint: Path) -> list[Any]:
    mesh = Mesh.create(MeshSpec(tp=2), CPU)
    stage, _ = load_model(checkpoint, mesh)
    tokens = [_generated(stage, _prompts(3, 9), sampling, 20).tolist() for sampling in (GREEDY, VARIED)]
    text = "".join(generate_text(checkpoint, "def ", max_tokens=30, seed=5, mesh=mesh))
    return [tokens, text]


def test_two_ranks_generate_what_one_does(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    tokens = [_generated(stage, _prompts(3, 9), sampling, 20).tolist() for sampling in (GREEDY, VARIED)]
    text = "".join(generate_text(checkpoint, "def ", max_tokens=30, seed=5))
    assert run_ranks(2, _two_ranks, checkpoint) == [[tokens, text]] * 2


def test_samples_of_one_prompt_differ_and_keep_their_draws(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    prompt = _prompts(1, 5)
    three = _generated(stage, prompt.expand(3, -1), VARIED, 10)
    assert len({tuple(row) for row in three.tolist()}) == 3
    assert torch.equal(_generated(stage, prompt, VARIED, 10), three[:1])


def test_a_row_ends_at_the_stop_token(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    free = _generated(stage, _prompts(2, 5), VARIED, 12)
    stop = int(free[0, 4])
    assert stop not in free[1, :12].tolist()
    stopped = _generated(stage, _prompts(2, 5), VARIED, 12, stop_id=stop)
    first = free[0].tolist().index(stop)
    assert stopped[0].tolist() == free[0, :first].tolist() + [stop] * (12 - first)
    assert torch.equal(stopped[1], free[1])
    assert _generated(stage, _prompts(1, 5), VARIED, 12, stop_id=stop).shape[1] == first + 1


def test_the_context_ends_a_sequence(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    assert _generated(stage, _prompts(1, 60), GREEDY, 100).shape == (1, 4)
    assert _generated(stage, _prompts(1, 63), GREEDY, 100).shape == (1, 1)
    assert _generated(stage, _prompts(1, 5), GREEDY, 1).shape == (1, 1)


def test_only_ids_that_the_tokenizer_has_are_chosen(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    assert int(_generated(stage, _prompts(4, 5), Sampling(temperature=50.0), 20, n_ids=40).max()) < 40


def test_greedy_generation_equals_transformers_on_the_export(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        convert(checkpoint, tmp_path / "hf", to="hf", console=make_console(1)), dtype=torch.float64
    )
    prompts = _prompts(2, 7)
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=30, eos_token_id=None
    )
    stage, _ = load_model(checkpoint, Mesh.serial())
    assert torch.equal(_generated(stage, prompts, GREEDY, 30), expected[:, 7:])


def test_16_bit_models_run_in_float32_on_a_cpu(tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path, dtype="bf16")
    stage, config = load_model(checkpoint, Mesh.serial())
    assert {p.dtype for p in stage.parameters()} == {torch.float32}
    as_saved, _ = load_model(checkpoint, Mesh.serial(), dtype=torch.bfloat16)
    for ours, saved in zip(stage.parameters(), as_saved.parameters()):
        assert torch.equal(ours, saved.float())
    assert config.train.dtype == "bf16"


def test_text_is_the_tokens_decoded_and_never_half_a_character(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    prompt, sampling = TEXTS[1][:10], Sampling(temperature=1.0, seed=2)
    pieces = list(stream_text(stage, tokenizer(), prompt, sampling, 50))
    ids = _generated(stage, torch.tensor([tokenizer().encode(prompt)]), sampling, 50, stop_id=tokenizer().eod_id)
    text = [id for id in ids[0].tolist() if id != tokenizer().eod_id]
    assert "".join(pieces) == tokenizer().decode(text)
    assert list(generate_text(checkpoint, prompt, max_tokens=50, seed=2)) == pieces
    assert list(generate_text(checkpoint, prompt, max_tokens=50, seed=3)) != pieces


def test_a_character_of_several_tokens_comes_in_one_piece(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    answer = [*tokenizer().encode_bytes(b"a"), *(tokenizer().encode_bytes(bytes([byte]))[0] for byte in "é🥊".encode())]
    cut = [*answer, *tokenizer().encode_bytes(b"\xf0"), tokenizer().eod_id]  # the text ends inside a character
    monkeypatch.setattr("megascratch.infer.text.generate", lambda *_, **__: iter(torch.tensor(cut).unsqueeze(1)))
    assert list(stream_text(stage, tokenizer(), "x", GREEDY, 50)) == ["a", "é", "🥊", "�"]


def test_an_empty_prompt_begins_a_document(checkpoint: Path) -> None:
    stage, _ = load_model(checkpoint, Mesh.serial())
    eod = tokenizer().eod_id
    ids = _generated(stage, torch.tensor([[eod]]), GREEDY, 10, stop_id=eod)[0].tolist()
    expected = tokenizer().decode([id for id in ids if id != eod])
    assert "".join(generate_text(checkpoint, "", max_tokens=10, temperature=0)) == expected


def test_the_tokenizer_nearest_to_the_checkpoint_is_taken(tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path / "run", sections={"data": {"seq_length": 16, "tokenizer": "gone.json"}})
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    text = "".join(generate_text(moved / "checkpoints", "def ", max_tokens=5, temperature=0))
    own = moved / "checkpoints" / "step_00000001" / "tokenizer.json"
    own.write_text("{}")
    with pytest.raises(TokenizerError, match=r"step_00000001/tokenizer\.json"):
        generate_text(moved / "checkpoints", "def ")
    given = generate_text(moved / "checkpoints", "def ", max_tokens=5, temperature=0, tokenizer=moved)
    assert "".join(given) == text
    own.unlink()
    (moved / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"gone.json +no such file +give the tokenizer: --tokenizer PATH"):
        generate_text(moved / "checkpoints", "def ")
    assert not checkpoint.exists()


def test_wrong_requests_are_refused_before_anything_runs(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a prompt of 64 tokens +must leave room in the context .* = 64"):
        generate_text(checkpoint, "#!" * 32)
    with pytest.raises(ConfigError, match=r"max_tokens = 0 +must be 1 or more"):
        generate_text(checkpoint, "def", max_tokens=0)
    with pytest.raises(ConfigError, match=r"temperature = -1"):
        generate_text(checkpoint, "def", temperature=-1)
    with pytest.raises(CheckpointError, match="does not exist"):
        generate_text(tmp_path / "nowhere", "def")
    small = save_model(tmp_path / "small", vocab_size=60)
    with pytest.raises(TokenizerError, match=r"token id \d+ +must be 0 to 59, as model.vocab_size = 60"):
        generate_text(small, "def")


def test_a_model_that_does_not_divide_is_refused(checkpoint: Path) -> None:
    with pytest.raises(LayoutError, match=r"parallel.tp = 3 +must divide model.n_heads = 4"):
        read_config(checkpoint, tp=3)


def test_a_checkpoint_without_configuration_is_refused(tmp_path: Path) -> None:
    whole = (slice(0, 2),)
    save(tmp_path, 1, [Shard("w", (2,), torch.zeros(2), [Extent(whole, whole)])], {}, Mesh.serial().world)
    with pytest.raises(CheckpointError, match=r"config +is not in state\.json"):
        load_model(tmp_path, Mesh.serial())
