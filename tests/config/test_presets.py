"""Presets have the parameter counts that their owners publish, counted here by arithmetic of our own."""

import pytest

from megascratch.config import PRESETS, ModelConfig

# The shapes of the published weights, summed; GPT-2 without padding of its vocabulary.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
}


def n_parameters(model: ModelConfig) -> int:
    """Count the elements of all weights: embeddings, blocks, last norm and head."""
    h, f, n, v = model.hidden, model.ffn_hidden, model.n_heads, model.vocab_size
    assert v is not None
    k, d = model.n_kv_heads or n, model.head_dim or h // n
    gated = model.activation in ("swiglu", "geglu")
    norm = 2 * h if model.norm == "layernorm" else h

    attention = h * (n + 2 * k) * d + n * d * h + (2 * d if model.qk_norm else 0)
    mlp = (3 if gated else 2) * h * f
    biases = (n + 2 * k) * d + h + f + h if model.bias else 0
    positions = model.max_seq_length * h if model.position == "learned" else 0
    head = 0 if model.tie_embeddings else v * h
    return v * h + positions + model.n_layers * (attention + mlp + biases + 2 * norm) + norm + head


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_preset_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert n_parameters(ModelConfig.model_validate(PRESETS[name])) == published


def test_every_published_preset_is_counted() -> None:
    assert set(PRESETS) - set(PUBLISHED) == {"tiny"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_valid_model(name: str) -> None:
    model = ModelConfig.model_validate(PRESETS[name])
    assert model.hidden % model.n_heads == 0
    assert model.n_heads % (model.n_kv_heads or model.n_heads) == 0
