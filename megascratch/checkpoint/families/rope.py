"""Rotary positions in `config.json`: written as transformers 5 reads them and as earlier ones did, read from both."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from megascratch.config import ModelConfig, RopeScaling
from megascratch.errors import CheckpointError, Problem


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return `rope_parameters` without their base."""
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
        "longrope": {
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
            **original,
        },
    }
    return {"rope_type": scaling.type, "factor": scaling.factor, **keys[scaling.type]}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` from either generation of keys.

    Raises: CheckpointError: for a way of scaling that we do not compute.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(Problem(f"rope_parameters = {rope}", "must be a table", "correct config.json"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    problems = []
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(
            Problem("partial_rotary_factor", "must be 1: the whole head is rotated", "convert another model")
        )
    if kind not in ("default", *get_args(RopeScaling.model_fields["type"].annotation)):
        rule = "must be default, linear, llama3, yarn or longrope"
        problems.append(Problem(f"rope_type = {kind}", rule, "convert another model"))
    if kind == "yarn" and not (_latent_yarn(rope) if config["model_type"] == "deepseek_v3" else _plain_yarn(rope)):
        rule = "attention_factor, mscale and truncate must be at their family's defaults"
        problems.append(Problem("rope_type = yarn", rule, "convert another model"))
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    factor = rope.get("factor")
    if kind == "longrope":
        factor = _longrope_factor(rope, config["max_position_embeddings"], original)
        if factor is None:
            rule = "its lengths must be given, and attention_factor must be at its default"
            problems.append(Problem("rope_type = longrope", rule, "convert another model"))
    if problems:
        raise CheckpointError(problems)
    if kind == "default":
        return {"rope_theta": theta}
    scaling = {"type": kind, "factor": factor}
    if kind != "linear":
        scaling["original_seq_length"] = original or config["max_position_embeddings"]
    optional = [name for name in RopeScaling.model_fields if name not in ("type", "factor", "original_seq_length")]
    return {"rope_theta": theta, "rope_scaling": scaling | {name: rope[name] for name in optional if rope.get(name)}}


def _latent_yarn(rope: Mapping[str, Any]) -> bool:
    """Return whether all of the score is multiplied by (0.1 · ln(factor) + 1)², as ours in latent attention."""
    both = rope.get("mscale") == rope.get("mscale_all_dim") == 1.0
    return both and rope.get("attention_factor") is None and rope.get("truncate", True) is True


def _longrope_factor(rope: Mapping[str, Any], length: Any, original: Any) -> float | None:
    """Return how many times as long sequences may be as those that the model began with.

    None where that is not said, or attention is not scaled by √(1 + ln factor / ln original), as ours is.
    """
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    if not (isinstance(length, int) and isinstance(original, int) and min(length, original) > 1):
        return None
    if not isinstance(factor, int | float | None) or not isinstance(attention, int | float | None):
        return None
    factor = max(1.0, factor or length / original)
    plain = math.sqrt(1 + math.log(factor) / math.log(original))
    return factor if attention is None or math.isclose(attention, plain, rel_tol=1e-6) else None


def _plain_yarn(rope: Mapping[str, Any]) -> bool:
    """Return whether attention is scaled by 0.1 · ln(factor) + 1 and the ramp has whole ends, as ours."""
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    if not isinstance(factor, int | float) or factor < 1:
        return False
    plain = 0.1 * math.log(factor) + 1
    same = attention is None or (isinstance(attention, int | float) and math.isclose(attention, plain, rel_tol=1e-6))
    return same and not (rope.get("mscale") and rope.get("mscale_all_dim")) and rope.get("truncate", True) is True
