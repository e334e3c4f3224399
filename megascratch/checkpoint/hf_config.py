"""`config.json` of Hugging Face's format: written from our `[model]` section, and read into one."""

import math
from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families import FAMILIES, Family
from megascratch.config import ModelConfig, RopeScaling
from megascratch.errors import CheckpointError, Problem


def write_config(model: ModelConfig, family: Family, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """Return `config.json`. Rotary settings are written as transformers 5 reads them and as earlier ones did."""
    rope = _write_rope(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **family.write(model),
    }


def read_config(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Return the family of a `config.json` and our `[model]` section, not yet typed or checked.

    Raises: CheckpointError: with everything that this model does and ours cannot.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        rule = f"is not a family that can be read: {', '.join(FAMILIES)}"
        raise CheckpointError(Problem(f"model_type = {config.get('model_type')}", rule, "convert another model"))
    problems = list(_unsupported(config))
    if problems:
        raise CheckpointError(problems)
    theirs = {
        "n_layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "n_heads": "num_attention_heads",
        "ffn_hidden": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_length": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
    }
    if missing := [key for key in theirs.values() if not isinstance(config.get(key), int | float)]:
        raise CheckpointError([Problem(key, "must be given, as a number", "correct config.json") for key in missing])
    model = {ours: config[key] for ours, key in theirs.items()}
    model |= {
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
    }
    return family, model | _read_rope(config) | family.read(config)


def _unsupported(config: Mapping[str, Any]) -> list[Problem]:
    layer_types = config.get("layer_types") or []
    # Qwen names a window that it uses only when `use_sliding_window` says so; Mistral has no such switch.
    window = (
        config.get("sliding_window") if config.get("use_sliding_window", config["model_type"] == "mistral") else None
    )
    rules: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("quantization_config", config.get("quantization_config"), (None,)),
        ("sliding_window", window, (None,)),
        ("layer_types", sorted({str(kind) for kind in layer_types}), ([], ["full_attention"])),
        ("pretraining_tp", config.get("pretraining_tp", 1), (None, 1)),
    )
    return [
        Problem(f"{key} = {value}", f"must be {' or '.join(str(a) for a in allowed)}", "convert another model")
        for key, value, allowed in rules
        if value not in allowed
    ]


def _write_rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    original = {"original_max_position_embeddings": scaling.original_seq_length}
    keys: dict[str, dict[str, Any]] = {
        "linear": {},
        "llama3": {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            **original,
        },
        "yarn": {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            **({"mscale": 1.0, "mscale_all_dim": 1.0} if model.mla is not None else {}),
            **original,
        },
    }
    return {"rope_type": scaling.type, "factor": scaling.factor, **keys[scaling.type]}


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` from either generation of keys.

    Raises: CheckpointError: for a way of scaling that we do not compute.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(Problem(f"rope_parameters = {rope}", "must be a table", "correct config.json"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    problems = []
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(
            Problem("partial_rotary_factor", "must be 1: the whole head is rotated", "convert another model")
        )
    if kind not in ("default", "linear", "llama3", "yarn"):
        problems.append(
            Problem(f"rope_type = {kind}", "must be default, linear, llama3 or yarn", "convert another model")
        )
    if kind == "yarn" and not (_latent_yarn(rope) if config["model_type"] == "deepseek_v3" else _plain_yarn(rope)):
        rule = "attention_factor, mscale and truncate must be at their family's defaults"
        problems.append(Problem("rope_type = yarn", rule, "convert another model"))
    if problems:
        raise CheckpointError(problems)
    if kind == "default":
        return {"rope_theta": theta}
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    scaling = {"type": kind, "factor": rope.get("factor")}
    if kind != "linear":
        scaling["original_seq_length"] = original or config["max_position_embeddings"]
    optional = [name for name in RopeScaling.model_fields if name not in ("type", "factor", "original_seq_length")]
    return {"rope_theta": theta, "rope_scaling": scaling | {name: rope[name] for name in optional if rope.get(name)}}


def _latent_yarn(rope: Mapping[str, Any]) -> bool:
    """Return whether all of the score is multiplied by (0.1 · ln(factor) + 1)², as ours in latent attention."""
    both = rope.get("mscale") == rope.get("mscale_all_dim") == 1.0
    return both and rope.get("attention_factor") is None and rope.get("truncate", True) is True


def _plain_yarn(rope: Mapping[str, Any]) -> bool:
    """Return whether attention is scaled by 0.1 · ln(factor) + 1 and the ramp has whole ends, as ours."""
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    if not isinstance(factor, int | float) or factor < 1:
        return False
    plain = 0.1 * math.log(factor) + 1
    same = attention is None or (isinstance(attention, int | float) and math.isclose(attention, plain, rel_tol=1e-6))
    return same and not (rope.get("mscale") and rope.get("mscale_all_dim")) and rope.get("truncate", True) is True
