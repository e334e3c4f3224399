"""How families of models are named and shaped in Hugging Face's format, as tables of reversible steps.

A new family is a table of steps (`steps.py`) and two small functions about its `config.json`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascratch.checkpoint.family_configs import (
    read_deepseek,
    read_llama,
    read_mixtral,
    read_qwen2_moe,
    read_qwen3,
    read_qwen_moe,
    write_deepseek,
    write_experts,
)
from megascratch.checkpoint.steps import Step, each_expert, grouped_qkv, halves, rename, rotary_rows
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


def _rotated_part(model: ModelConfig) -> int:
    assert model.mla is not None
    return model.mla.qk_pos_emb_head_dim


DEEPSEEK_STEPS = (
    *LLAMA_STEPS,
    rename("layers.{i}.attn.q_down.weight", _ATTN + "q_a_proj.weight"),
    rename("layers.{i}.attn.q_norm.weight", _ATTN + "q_a_layernorm.weight"),
    rotary_rows(
        "layers.{i}.attn.q_up.weight", _ATTN + "q_b_proj.weight", lambda model: (model.n_heads, _rotated_part(model))
    ),
    rotary_rows(
        "layers.{i}.attn.kv_down.weight",
        _ATTN + "kv_a_proj_with_mqa.weight",
        lambda model: (1, _rotated_part(model)),
    ),
    rename("layers.{i}.attn.kv_norm.weight", _ATTN + "kv_a_layernorm.weight"),
    rename("layers.{i}.attn.kv_up.weight", _ATTN + "kv_b_proj.weight"),
    *_EXPERT_STEPS,
    rename("layers.{i}.mlp.router.bias", _MLP + "gate.e_score_correction_bias"),
    *_shared_expert(_MLP + "shared_experts."),
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


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            LLAMA_STEPS,
            lambda model: {"attention_bias": model.bias, "mlp_bias": model.bias},
            read_llama,
        ),
        Family("mistral", "MistralForCausalLM", LLAMA_STEPS, lambda _: {"sliding_window": None}, lambda _: {}),
        Family("qwen2", "Qwen2ForCausalLM", LLAMA_STEPS, lambda _: {}, lambda _: {"qkv_bias": True}),
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_STEPS, lambda _: {"attention_bias": False}, read_qwen3),
        Family("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_STEPS, write_deepseek, read_deepseek),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            MIXTRAL_STEPS,
            lambda model: {
                **write_experts(model),
                "intermediate_size": write_experts(model)["moe_intermediate_size"],
            },
            read_mixtral,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            QWEN2_MOE_STEPS,
            lambda model: {
                **write_experts(model),
                "qkv_bias": model.qkv_bias,
                "shared_expert_intermediate_size": model.moe and model.moe.shared_expert_ffn_hidden,
            },
            read_qwen2_moe,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            QWEN3_MOE_STEPS,
            lambda model: {**write_experts(model), "attention_bias": False},
            lambda config: read_qwen3(config) | read_qwen_moe(config),
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
    if model.mla is not None:
        return _deepseek_family(model)
    if model.moe is not None:
        return _expert_family(model)
    if model.qk_norm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if model.qkv_bias and not model.bias else "llama"]


def _deepseek_family(model: ModelConfig) -> Family:
    """Return DeepSeek-V3's family, if the model is of its shape.

    Raises: CheckpointError: with what it has not.
    """
    moe, mla = model.moe, model.mla
    if moe is None or mla is None or mla.q_lora_rank is None:
        rule = "is exported with experts and q_lora_rank, as in DeepSeek-V3"
        raise CheckpointError(Problem("model.mla", rule, "export cannot change it"), "the export")
    shared = moe.shared_expert_ffn_hidden
    needed = {
        "router_score_function": "sigmoid",
        "router_enable_expert_bias": True,
        "shared_expert_gate": False,
        "layer_freq": 1,
    }
    problems = [
        Problem(f"model.moe.{key} = {getattr(moe, key)}", f"must be {value} in deepseek_v3", "export cannot change it")
        for key, value in needed.items()
        if getattr(moe, key) != value
    ]
    if moe.router_num_groups is None or moe.router_group_topk is None:
        problems.append(Problem("model.moe.router_num_groups", "must be given in deepseek_v3", "export cannot add it"))
    elif moe.router_topk != 2 * moe.router_group_topk:
        rule = "must be twice router_group_topk in deepseek_v3, which scores a group by its best two"
        problems.append(Problem(f"model.moe.router_topk = {moe.router_topk}", rule, "export cannot change it"))
    if shared is None or shared % moe.ffn_hidden:
        rule = "must be a multiple of ffn_hidden in deepseek_v3"
        problems.append(Problem(f"model.moe.shared_expert_ffn_hidden = {shared}", rule, "export cannot change it"))
    if problems:
        raise CheckpointError(problems, "the export to Hugging Face's format")
    return FAMILIES["deepseek_v3"]


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
