"""How families of models are named and shaped in Hugging Face's format, as tables of reversible steps.

A new family is a table of steps (`steps.py`) and two small functions about its `config.json`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascratch.checkpoint.steps import Step, each_expert, grouped_qkv, halves, rename
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

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


_SPARSE = "model.layers.{i}.block_sparse_moe."
MIXTRAL_STEPS = (
    *LLAMA_STEPS,
    rename("layers.{i}.mlp.router.weight", _SPARSE + "gate.weight"),
    each_expert("layers.{i}.mlp.experts.up", _SPARSE + "experts.{e}.w1.weight", _SPARSE + "experts.{e}.w3.weight"),
    each_expert("layers.{i}.mlp.experts.down", _SPARSE + "experts.{e}.w2.weight"),
)

_EXPERT = _MLP + "experts.{e}."
_EXPERT_STEPS = (
    rename("layers.{i}.mlp.router.weight", _MLP + "gate.weight"),
    each_expert("layers.{i}.mlp.experts.up", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    each_expert("layers.{i}.mlp.experts.down", _EXPERT + "down_proj.weight"),
)


def _shared_expert(theirs: str) -> tuple[Step, ...]:
    gate_up = halves("layers.{i}.mlp.shared.gate_up.weight", theirs + "gate_proj.weight", theirs + "up_proj.weight")
    return gate_up, rename("layers.{i}.mlp.shared.down.weight", theirs + "down_proj.weight")


QWEN2_MOE_STEPS = (
    *LLAMA_STEPS,
    *_EXPERT_STEPS,
    *_shared_expert(_MLP + "shared_expert."),
    rename("layers.{i}.mlp.shared_gate", _MLP + "shared_expert_gate.weight"),
)
QWEN3_MOE_STEPS = (*QWEN3_STEPS, *_EXPERT_STEPS)


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


def _mixtral_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "num_experts": _number(config, "num_local_experts", "num_experts"),
        "router_topk": _number(config, "num_experts_per_tok"),
        "ffn_hidden": _number(config, "intermediate_size"),
    }
    return {"moe": keys | _balance(config)}


def _qwen_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's pattern: every `decoder_sparse_step`-th layer, from the step-th on."""
    step = config.get("decoder_sparse_step", 1)
    if config.get("mlp_only_layers"):
        rule = "layers with experts follow first_k_dense and layer_freq here"
        raise CheckpointError(Problem(f"mlp_only_layers = {config['mlp_only_layers']}", rule, "convert another model"))
    keys = {
        "num_experts": _number(config, "num_experts", "num_local_experts"),
        "router_topk": _number(config, "num_experts_per_tok"),
        "ffn_hidden": _number(config, "moe_intermediate_size"),
        "router_norm_topk": bool(config.get("norm_topk_prob", False)),
        "first_k_dense": step - 1,
        "layer_freq": step,
    }
    return {"moe": keys | _balance(config)}


def _qwen2_shared_expert(config: Mapping[str, Any]) -> dict[str, Any]:
    section = _qwen_experts(config)
    size = _number(config, "shared_expert_intermediate_size")
    section["moe"] |= {"shared_expert_ffn_hidden": size, "shared_expert_gate": True}
    return {**section, "qkv_bias": bool(config.get("qkv_bias", True))}


def _balance(config: Mapping[str, Any]) -> dict[str, Any]:
    """The auxiliary loss that the model is to be trained on with."""
    coeff = config.get("router_aux_loss_coef", 0.0)
    return {"router_load_balancing_type": "aux_loss", "aux_loss_coeff": coeff} if coeff else {}


def _number(config: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the first name that is there.

    Raises: CheckpointError: if none is, or it is no number.
    """
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if not isinstance(value, int):
        raise CheckpointError(Problem(names[0], "must be given, as a number", "correct config.json"))
    return value


def _write_experts(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    return {
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.router_topk,
        "moe_intermediate_size": moe.ffn_hidden,
        "norm_topk_prob": moe.router_norm_topk,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "output_router_logits": False,
        "decoder_sparse_step": moe.layer_freq,
        "mlp_only_layers": [],
        "sliding_window": None,
    }


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
        Family(
            "mixtral",
            "MixtralForCausalLM",
            MIXTRAL_STEPS,
            lambda model: {
                **_write_experts(model),
                "intermediate_size": _write_experts(model)["moe_intermediate_size"],
            },
            _mixtral_experts,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            QWEN2_MOE_STEPS,
            lambda model: {
                **_write_experts(model),
                "qkv_bias": model.qkv_bias,
                "shared_expert_intermediate_size": model.moe and model.moe.shared_expert_ffn_hidden,
            },
            _qwen2_shared_expert,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            QWEN3_MOE_STEPS,
            lambda model: {**_write_experts(model), "attention_bias": False},
            lambda config: _qwen3_biases(config) | _qwen_experts(config),
        ),
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
    if model.moe is not None:
        return _expert_family(model)
    if model.qk_norm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if model.qkv_bias and not model.bias else "llama"]


def _expert_family(model: ModelConfig) -> Family:
    """Return the family whose mixture of experts is of this shape.

    Raises: CheckpointError: with what none of them has.
    """
    moe = model.moe
    assert moe is not None
    plain = {
        "router_score_function": "softmax",
        "router_topk_scaling_factor": 1.0,
        "router_num_groups": None,
        "router_enable_expert_bias": False,
        "first_k_dense": moe.layer_freq - 1,
    }
    problems = [
        Problem(f"model.moe.{key} = {getattr(moe, key)}", f"must be {value} in this family", "export cannot change it")
        for key, value in plain.items()
        if getattr(moe, key) != value
    ]
    shared = moe.shared_expert_ffn_hidden is not None
    if shared and (not moe.shared_expert_gate or model.qk_norm):
        rule = "stands with a gate, and without norms of q and k, in every family"
        problems.append(Problem("model.moe.shared_expert_ffn_hidden", rule, "export cannot change it"))
    if problems:
        raise CheckpointError(problems, "the export to Hugging Face's format")
    if shared:
        return FAMILIES["qwen2_moe"]
    mixtral = not model.qk_norm and moe.router_norm_topk and moe.layer_freq == 1
    return FAMILIES["mixtral" if mixtral else "qwen3_moe"]
