"""Gemma 2 and 3 (text): norms on both sides that multiply by 1 + w, scaled embeddings, windows, capped scores."""

from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families.family import Family, read_windows, refuse_other, write_windows
from megascratch.checkpoint.families.llama import LAYER, LLAMA_STEPS, QK_NORM_STEPS, WINDOWS
from megascratch.checkpoint.families.rope import read_rope, write_rope
from megascratch.checkpoint.steps import rename
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

GEMMA2_STEPS = (
    *LLAMA_STEPS,
    rename("layers.{i}.attn_out_norm.weight", LAYER + "post_attention_layernorm.weight"),
    rename("layers.{i}.mlp_norm.weight", LAYER + "pre_feedforward_layernorm.weight"),
    rename("layers.{i}.mlp_out_norm.weight", LAYER + "post_feedforward_layernorm.weight"),
)

GEMMA = {"norm_position": "both", "norm_zero_centered": True, "scale_embeddings": True}
# What a `config.json` leaves out is as transformers' own classes have it.
_DEFAULTS = {
    "tie_word_embeddings": True,
    "vocab_size": 256000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = {
    **_DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_NO_BIAS = {"attention_bias": (False, False), "use_bidirectional_attention": (None, None)}


def _read(config: Mapping[str, Any], full_every: int) -> dict[str, Any]:
    """Return the keys of both, whose every n-th layer sees everything where `layer_types` is left out."""
    allowed = dict(_NO_BIAS)
    if config.get("use_bidirectional_attention") is False:
        del allowed["use_bidirectional_attention"]
    refuse_other(config, allowed)
    kinds = [
        "sliding_attention" if (i + 1) % full_every else "full_attention" for i in range(config["num_hidden_layers"])
    ]
    return {
        "query_pre_attn_scalar": config["query_pre_attn_scalar"],
        "attn_softcap": config["attn_logit_softcapping"],
        "logit_softcap": config["final_logit_softcapping"],
        **read_windows(config, kinds),
    }


def _read_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    every = config.get("sliding_window_pattern", 6)
    if not isinstance(every, int) or every < 1:
        rule = "must be a number of layers, or left out"
        raise CheckpointError(Problem(f"sliding_window_pattern = {every}", rule, "correct config.json"))
    section = _read(config, every)
    # transformers' Gemma 3 does not cap scores, whatever is said.
    refuse_other(config, {"attn_logit_softcapping": (None, None)})
    if section.get("sliding_window") is not None:
        local = _gemma3_rope(config, "sliding_attention")
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(Problem("rope of sliding_attention", "must not be scaled", "convert another model"))
        section["rope_local_theta"] = local.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
    return section


def _gemma3_rope(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return what transformers 5 says of the positions of one kind of layer; nothing in an older `config.json`."""
    rope = config.get("rope_parameters")
    found = rope.get(kind) if isinstance(rope, dict) else None
    return found if isinstance(found, dict) else {}


def _read_gemma3_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _gemma3_rope(config, "full_attention") or config.get("rope_scaling")
    theta = config.get("rope_theta", 1_000_000.0)
    return read_rope({**config, "rope_theta": theta, "rope_parameters": rope, "rope_scaling": None})


def _write(model: ModelConfig) -> dict[str, Any]:
    scalar = model.query_pre_attn_scalar
    return {
        "attention_bias": False,
        "query_pre_attn_scalar": int(scalar) if scalar is not None else model.head_dim,
        "attn_logit_softcapping": model.attn_softcap,
        "final_logit_softcapping": model.logit_softcap,
        **write_windows(model),
    }


def _write_gemma3(model: ModelConfig) -> dict[str, Any]:
    local = model.rope_local_theta or model.rope_theta
    full = {**write_rope(model), "rope_theta": model.rope_theta}
    return {
        **_write(model),
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        **({"sliding_window_pattern": model.window_attn_skip_freq} if model.window_attn_skip_freq else {}),
    }


def _refuses(model: ModelConfig) -> list[Problem]:
    scalar = model.query_pre_attn_scalar
    if scalar is None or scalar == int(scalar):
        return []
    rule = "must be a whole number in gemma's config.json"
    return [Problem(f"model.query_pre_attn_scalar = {scalar}", rule, "export cannot change it")]


GEMMA_FAMILIES = (
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA2_STEPS,
        features={**GEMMA, **WINDOWS, "query_pre_attn_scalar": ..., "attn_softcap": ..., "logit_softcap": ...},
        activations={"geglu_tanh": "gelu_pytorch_tanh"},
        names={"hidden_act": "hidden_activation"},
        defaults=_DEFAULTS,
        write=_write,
        refuses=_refuses,
        read=lambda config: _read(config, full_every=2),
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        (*GEMMA2_STEPS, *QK_NORM_STEPS),
        features={
            **GEMMA,
            **WINDOWS,
            "qk_norm": True,
            "query_pre_attn_scalar": ...,
            "logit_softcap": ...,
            "rope_local_theta": ...,
        },
        activations={"geglu_tanh": "gelu_pytorch_tanh"},
        names={"hidden_act": "hidden_activation"},
        defaults=_GEMMA3_DEFAULTS,
        write=_write_gemma3,
        refuses=_refuses,
        read=_read_gemma3,
        rope=_read_gemma3_rope,
    ),
)
