"""Presets have the parameter counts that their owners publish, counted here by arithmetic of our own."""

import math

import pytest

from megascratch.config import PRESETS, Config, ModelConfig, resolve
from megascratch.nn import parameter_specs
from megascratch.nn.active import active_numel

# The shapes of the published weights, summed; GPT-2 without padding of its vocabulary.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "phi3-mini": 3_821_079_552,
    "olmo2-7b": 7_298_617_344,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200,
}
# What works on one token: embedding and head included, as the owners count.
ACTIVE = {"mixtral-8x7b": 12.9e9, "qwen3-30b-a3b": 3.3e9, "deepseek-v3": 37e9}


def n_parameters(model: ModelConfig) -> int:
    """Count the elements of all weights: embeddings, blocks, last norm and head."""
    h, f, n, v = model.hidden, model.ffn_hidden, model.n_heads, model.vocab_size
    assert v is not None
    k, d = model.n_kv_heads or n, model.head_dim or h // n
    gated = model.activation in ("swiglu", "geglu_tanh")
    norm = 2 * h if model.norm == "layernorm" else h
    norms = (4 if model.norm_position == "both" else 2) * norm

    attention = h * (n + 2 * k) * d + n * d * h
    attention += (n + k) * d if model.qk_norm_across_heads else 2 * d if model.qk_norm else 0
    matrices = 3 if gated else 2
    if (mla := model.mla) is not None:
        d, r, c, v_head = mla.qk_head_dim, mla.qk_pos_emb_head_dim, mla.kv_lora_rank, mla.v_head_dim
        queries = mla.q_lora_rank or h
        attention = h * queries + queries + queries * n * (d + r)
        attention += h * (c + r) + c + c * n * (d + v_head) + n * v_head * h
    mlp = model.n_layers * matrices * h * f
    if model.moe is not None:
        moe = model.moe
        experts = matrices * h * (moe.num_experts * moe.ffn_hidden + (moe.shared_expert_ffn_hidden or 0))
        router = moe.num_experts * h + (moe.num_experts if moe.router_enable_expert_bias else 0)
        n_moe = sum(model.has_experts(i) for i in range(model.n_layers))
        mlp = (model.n_layers - n_moe) * matrices * h * f + n_moe * (experts + router)
    biases = (n + 2 * k) * d + h + f + h if model.bias else 0
    positions = model.max_seq_length * h if model.position == "learned" else 0
    head = 0 if model.tie_embeddings else v * h
    return v * h + positions + mlp + model.n_layers * (attention + biases + norms) + norm + head


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_preset_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert n_parameters(ModelConfig.model_validate(PRESETS[name])) == published


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_the_model_itself_has_as_many(name: str, total: int) -> None:
    model = resolve(Config(model=ModelConfig.model_validate(PRESETS[name]))).model
    assert sum(math.prod(spec.shape) for spec in parameter_specs(model) if not spec.tied) == total


@pytest.mark.parametrize(("name", "published"), ACTIVE.items())
def test_as_many_work_on_a_token_as_published(name: str, published: float) -> None:
    model = resolve(Config(model=ModelConfig.model_validate(PRESETS[name]))).model
    assert model.vocab_size is not None
    active = sum(active_numel(model).values()) + model.vocab_size * model.hidden
    assert active == pytest.approx(published, rel=0.02)


def test_every_published_preset_is_counted() -> None:
    assert set(PRESETS) - set(PUBLISHED) == {"tiny"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_valid_model(name: str) -> None:
    model = ModelConfig.model_validate(PRESETS[name])
    assert model.hidden % model.n_heads == 0
    assert model.n_heads % (model.n_kv_heads or model.n_heads) == 0
