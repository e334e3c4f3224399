"""GPT-2: linear weights stand transposed ([in, out]), and QKV is all queries, all keys, all values."""

from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families.family import Family, refuse_other
from megascratch.checkpoint.steps import fused, grouped_qkv, rename, transposed
from megascratch.config import ModelConfig
from megascratch.errors import Problem

_LAYER = "transformer.h.{i}."

GPT2_STEPS = (
    rename("embed.weight", "transformer.wte.weight"),
    rename("position.weight", "transformer.wpe.weight"),
    *(
        rename(f"layers.{{i}}.{ours}.{kind}", f"{_LAYER}{theirs}.{kind}")
        for ours, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2"))
        for kind in ("weight", "bias")
    ),
    transposed(fused(grouped_qkv("layers.{i}.attn.qkv.weight", "q", "k", "v"), _LAYER + "attn.c_attn.weight")),
    fused(grouped_qkv("layers.{i}.attn.qkv.bias", "q", "k", "v"), _LAYER + "attn.c_attn.bias"),
    *(
        step
        for ours, theirs in (("attn.proj", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj"))
        for step in (
            transposed(rename(f"layers.{{i}}.{ours}.weight", f"{_LAYER}{theirs}.weight")),
            rename(f"layers.{{i}}.{ours}.bias", f"{_LAYER}{theirs}.bias"),
        )
    ),
    rename("norm.weight", "transformer.ln_f.weight"),
    rename("norm.bias", "transformer.ln_f.bias"),
    rename("head.weight", "lm_head.weight"),
)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    rules = {
        "scale_attn_weights": (True, True),
        "scale_attn_by_inverse_layer_idx": (False, False),
        "add_cross_attention": (False, False),
    }
    refuse_other(config, rules)
    return {"ffn_hidden": config.get("n_inner") or 4 * config["n_embd"], "n_kv_heads": None}


def _refuses(model: ModelConfig) -> list[Problem]:
    rules = {
        f"model.n_kv_heads = {model.n_kv_heads}": model.n_kv_heads == model.n_heads,
        f"model.head_dim = {model.head_dim}": (model.head_dim or 0) * model.n_heads == model.hidden,
    }
    return [
        Problem(value, "must be as many as hidden and n_heads give in gpt2", "export cannot change it")
        for value, fits in rules.items()
        if not fits
    ]


GPT2_FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2_STEPS,
        features={"norm": "layernorm", "position": "learned", "bias": True},
        activations={"gelu_tanh": "gelu_new", "gelu": "gelu"},
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        defaults={"tie_word_embeddings": True, "activation_function": "gelu_new", "n_inner": None},
        write=lambda _: {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "reorder_and_upcast_attn": False},
        read=_read,
        refuses=_refuses,
        prefix="transformer.",
        ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
    ),
)
