"""How families of models are named and stored in Hugging Face's format, as tables of reversible steps.

A step turns one of our tensors into theirs, and theirs into ours. By hand, for 4 query heads on 2 key/value heads:

    ours     layers.0.attn.qkv.weight     rows of kv group 0: q0 q1 k0 v0, of kv group 1: q2 q3 k1 v1
    theirs   …self_attn.q_proj.weight     q0 q1 q2 q3
             …self_attn.k_proj.weight     k0 k1
             …self_attn.v_proj.weight     v0 v1

Both rotate halves, so no head is permuted. Vocabulary padding is physical and never reaches a checkpoint. A new family
is a table and two small functions about its `config.json`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascratch.config import ModelConfig, RopeScaling
from megascratch.errors import CheckpointError, Problem


@dataclass(frozen=True)
class Step:
    """One tensor of ours and the tensors of theirs that hold the same numbers; `{i}` in a name stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]

    def at(self, layer: int) -> "Step":
        """Return the step for one layer."""
        name = f"{layer}"
        theirs = tuple(their.replace("{i}", name) for their in self.theirs)
        return Step(self.ours.replace("{i}", name), theirs, self.split, self.join)


def rename(ours: str, theirs: str) -> Step:
    """The same tensor by another name."""
    return Step(ours, (theirs,), lambda tensor, _: (tensor,), lambda tensors, _: tensors[0])


def halves(ours: str, first: str, second: str) -> Step:
    """Two tensors of equal shape, one above the other: [gate; up]."""
    return Step(ours, (first, second), lambda tensor, _: tensor.chunk(2), lambda tensors, _: torch.cat(list(tensors)))


def grouped_qkv(ours: str, q: str, k: str, v: str) -> Step:
    """Rows [q … q, k, v] of each key/value group, or three tensors with the heads of one kind each."""

    def split(tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
        groups, queries, d = _heads(model)
        grouped = tensor.view(groups, queries + 2, d, *tensor.shape[1:])
        parts = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]

    def join(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        groups, _, d = _heads(model)
        rest = tensors[0].shape[1:]
        return torch.cat([tensor.view(groups, -1, d, *rest) for tensor in tensors], dim=1).reshape(-1, *rest)

    return Step(ours, (q, k, v), split, join)


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """Return (key/value heads, query heads for each of them, head dimension)."""
    assert model.n_kv_heads is not None
    assert model.head_dim is not None
    return model.n_kv_heads, model.n_heads // model.n_kv_heads, model.head_dim


_ATTN, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."

# Biases stand here too: a model without them has no such tensor of ours, and the step is not used.
LLAMA_STEPS = (
    rename("embed.weight", "model.embed_tokens.weight"),
    rename("layers.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    *(
        grouped_qkv("layers.{i}.attn.qkv." + kind, *(_ATTN + p + "_proj." + kind for p in "qkv"))
        for kind in ("weight", "bias")
    ),
    rename("layers.{i}.attn.proj.weight", _ATTN + "o_proj.weight"),
    rename("layers.{i}.attn.proj.bias", _ATTN + "o_proj.bias"),
    rename("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    halves("layers.{i}.mlp.gate_up.weight", _MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
    halves("layers.{i}.mlp.gate_up.bias", _MLP + "gate_proj.bias", _MLP + "up_proj.bias"),
    rename("layers.{i}.mlp.down.weight", _MLP + "down_proj.weight"),
    rename("layers.{i}.mlp.down.bias", _MLP + "down_proj.bias"),
    rename("norm.weight", "model.norm.weight"),
    rename("head.weight", "lm_head.weight"),
)

QWEN3_STEPS = (
    *LLAMA_STEPS,
    rename("layers.{i}.attn.q_norm.weight", _ATTN + "q_norm.weight"),
    rename("layers.{i}.attn.k_norm.weight", _ATTN + "k_norm.weight"),
)


@dataclass(frozen=True)
class Family:
    """A family of models in Hugging Face's format.

    Attributes:
        model_type, architecture: as `config.json` says them.
        steps: the tensors.
        write: keys that `config.json` has besides the common ones, from our shape.
        read: keys of our `[model]` besides the common ones, from `config.json`.
    """

    model_type: str
    architecture: str
    steps: tuple[Step, ...]
    write: Callable[[ModelConfig], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]


def _llama_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        value = f"attention_bias = {attention}, mlp_bias = {mlp}".lower()
        raise CheckpointError(
            Problem(value, "biases are on every linear layer here, or on none", "convert another model")
        )
    return {"bias": attention}


def _qwen3_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("attention_bias"):
        problem = Problem(
            "attention_bias = true", "together with norms of q and k is not supported", "convert another model"
        )
        raise CheckpointError(problem)
    return {"qk_norm": True}


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            LLAMA_STEPS,
            lambda model: {"attention_bias": model.bias, "mlp_bias": model.bias},
            _llama_biases,
        ),
        Family("mistral", "MistralForCausalLM", LLAMA_STEPS, lambda _: {"sliding_window": None}, lambda _: {}),
        Family("qwen2", "Qwen2ForCausalLM", LLAMA_STEPS, lambda _: {}, lambda _: {"qkv_bias": True}),
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_STEPS, lambda _: {"attention_bias": False}, _qwen3_biases),
    )
}


def family_for(model: ModelConfig) -> Family:
    """Return the family whose models are of this shape.

    Raises: CheckpointError: with everything about the model that no family here expresses.
    """
    rules = (
        ("norm", model.norm, "rmsnorm"),
        ("norm_position", model.norm_position, "pre"),
        ("activation", model.activation, "swiglu"),
        ("position", model.position, "rope"),
    )
    problems = [
        Problem(f"model.{key} = {value}", f"{', '.join(FAMILIES)} have {key} = {needed}", "export cannot change it")
        for key, value, needed in rules
        if value != needed
    ]
    if model.qk_norm and (model.bias or model.qkv_bias):
        problems.append(Problem("model.qk_norm = true with biases", "no family has both", "export cannot change it"))
    if problems:
        raise CheckpointError(problems, "the export to Hugging Face's format")
    if model.qk_norm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if model.qkv_bias and not model.bias else "llama"]


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
        "yarn": {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, **original},
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
    if kind == "yarn" and not _plain_yarn(rope):
        rule = "attention_factor, mscale and truncate must be left at their defaults"
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


def _plain_yarn(rope: Mapping[str, Any]) -> bool:
    """Return whether attention is scaled by 0.1 · ln(factor) + 1 and the ramp has whole ends, as ours."""
    factor, attention = rope.get("factor"), rope.get("attention_factor")
    if not isinstance(factor, int | float) or factor < 1:
        return False
    plain = 0.1 * math.log(factor) + 1
    same = attention is None or (isinstance(attention, int | float) and math.isclose(attention, plain, rel_tol=1e-6))
    return same and not (rope.get("mscale") and rope.get("mscale_all_dim")) and rope.get("truncate", True) is True
