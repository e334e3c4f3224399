"""Llama and its kin: Mistral, Qwen 2 and 3, Phi-3, OLMo-2."""

from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families.family import Family, read_windows, refuse_other, write_windows
from megascratch.checkpoint.steps import fused, grouped_qkv, halves, rename
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

LAYER = "model.layers.{i}."
ATTN, MLP = LAYER + "self_attn.", LAYER + "mlp."

# Biases stand here too: a model without them has no such tensor of ours, and the step is not used.
LLAMA_STEPS = (
    rename("embed.weight", "model.embed_tokens.weight"),
    rename("layers.{i}.attn_norm.weight", LAYER + "input_layernorm.weight"),
    *(
        grouped_qkv("layers.{i}.attn.qkv." + kind, *(ATTN + p + "_proj." + kind for p in "qkv"))
        for kind in ("weight", "bias")
    ),
    rename("layers.{i}.attn.proj.weight", ATTN + "o_proj.weight"),
    rename("layers.{i}.attn.proj.bias", ATTN + "o_proj.bias"),
    rename("layers.{i}.mlp_norm.weight", LAYER + "post_attention_layernorm.weight"),
    halves("layers.{i}.mlp.gate_up.weight", MLP + "gate_proj.weight", MLP + "up_proj.weight"),
    halves("layers.{i}.mlp.gate_up.bias", MLP + "gate_proj.bias", MLP + "up_proj.bias"),
    rename("layers.{i}.mlp.down.weight", MLP + "down_proj.weight"),
    rename("layers.{i}.mlp.down.bias", MLP + "down_proj.bias"),
    rename("norm.weight", "model.norm.weight"),
    rename("head.weight", "lm_head.weight"),
)

QK_NORM_STEPS = (
    rename("layers.{i}.attn.q_norm.weight", ATTN + "q_norm.weight"),
    rename("layers.{i}.attn.k_norm.weight", ATTN + "k_norm.weight"),
)

PHI3_STEPS = (
    *LLAMA_STEPS,
    fused(grouped_qkv("layers.{i}.attn.qkv.weight", "q", "k", "v"), ATTN + "qkv_proj.weight"),
    rename("layers.{i}.mlp.gate_up.weight", MLP + "gate_up_proj.weight"),
)

OLMO2_STEPS = (
    *LLAMA_STEPS,
    *QK_NORM_STEPS,
    rename("layers.{i}.attn_norm.weight", LAYER + "post_attention_layernorm.weight"),
    rename("layers.{i}.mlp_norm.weight", LAYER + "post_feedforward_layernorm.weight"),
)


def _read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        value = f"attention_bias = {attention}, mlp_bias = {mlp}".lower()
        raise CheckpointError(
            Problem(value, "biases are on every linear layer here, or on none", "convert another model")
        )
    return {"bias": attention}


def read_qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen names a window that it uses only when `use_sliding_window` says so, and then from some layer on."""
    refuse_other(config, {"attention_bias": (False, False)})
    if not config.get("use_sliding_window"):
        return {}
    full = min(int(config.get("max_window_layers") or 0), config["num_hidden_layers"])
    kinds = ["full_attention"] * full + ["sliding_attention"] * (config["num_hidden_layers"] - full)
    return read_windows(config, kinds)


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    # `max_window_layers` is what layer_types replaced.
    windows = {"use_sliding_window": model.sliding_window is not None, "max_window_layers": 0}
    return {"attention_bias": False, **windows, **write_windows(model)}


def _read_olmo2(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_other(config, {"attention_bias": (False, False)})
    return {}


WINDOWS = {"sliding_window": ..., "window_attn_skip_freq": ...}
LLAMA_FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        LLAMA_STEPS,
        features={"bias": ...},
        write=lambda model: {"attention_bias": model.bias, "mlp_bias": model.bias},
        read=_read_llama,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        LLAMA_STEPS,
        features={"sliding_window": ...},
        write=lambda model: {"sliding_window": model.sliding_window},
        read=read_windows,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        LLAMA_STEPS,
        features={"qkv_bias": True, **WINDOWS},
        write=_write_qwen,
        read=read_qwen,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*LLAMA_STEPS, *QK_NORM_STEPS),
        features={"qk_norm": True, **WINDOWS},
        write=_write_qwen,
        read=read_qwen,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        PHI3_STEPS,
        features={"sliding_window": ...},
        write=lambda model: {
            "sliding_window": model.sliding_window,
            "original_max_position_embeddings": (
                model.rope_scaling.original_seq_length if model.rope_scaling else model.max_seq_length
            ),
        },
        read=read_windows,
        refuses=lambda model: (
            [Problem("model.rope_scaling.type", "must be longrope in phi3, or left out", "export cannot change it")]
            if model.rope_scaling is not None and model.rope_scaling.type != "longrope"
            else []
        ),
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        OLMO2_STEPS,
        features={"norm_position": "post", "qk_norm": True, "qk_norm_across_heads": True},
        write=lambda _: {"attention_bias": False},
        read=_read_olmo2,
    ),
)
