"""Mixtures of experts: Mixtral, Qwen 2 and 3 with experts."""

from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families.family import Family, must_be, number
from megascratch.checkpoint.families.llama import LLAMA_STEPS, MLP, QK_NORM_STEPS, read_qwen
from megascratch.checkpoint.steps import Step, each_expert, halves, rename
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

_SPARSE = "model.layers.{i}.block_sparse_moe."
MIXTRAL_STEPS = (
    *LLAMA_STEPS,
    rename("layers.{i}.mlp.router.weight", _SPARSE + "gate.weight"),
    each_expert("layers.{i}.mlp.experts.up", _SPARSE + "experts.{e}.w1.weight", _SPARSE + "experts.{e}.w3.weight"),
    each_expert("layers.{i}.mlp.experts.down", _SPARSE + "experts.{e}.w2.weight"),
)

_EXPERT = MLP + "experts.{e}."
EXPERT_STEPS = (
    rename("layers.{i}.mlp.router.weight", MLP + "gate.weight"),
    each_expert("layers.{i}.mlp.experts.up", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    each_expert("layers.{i}.mlp.experts.down", _EXPERT + "down_proj.weight"),
)


def shared_expert(theirs: str) -> tuple[Step, ...]:
    gate_up = halves("layers.{i}.mlp.shared.gate_up.weight", theirs + "gate_proj.weight", theirs + "up_proj.weight")
    return gate_up, rename("layers.{i}.mlp.shared.down.weight", theirs + "down_proj.weight")


QWEN2_MOE_STEPS = (
    *LLAMA_STEPS,
    *EXPERT_STEPS,
    *shared_expert(MLP + "shared_expert."),
    rename("layers.{i}.mlp.shared_gate", MLP + "shared_expert_gate.weight"),
)


def _read_mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "num_experts": number(config, "num_local_experts", "num_experts"),
        "router_topk": number(config, "num_experts_per_tok"),
        "ffn_hidden": number(config, "intermediate_size"),
    }
    return {"moe": keys | _balance(config)}


def _read_qwen_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's pattern: every `decoder_sparse_step`-th layer, from the step-th on."""
    step = config.get("decoder_sparse_step", 1)
    if config.get("mlp_only_layers"):
        rule = "layers with experts follow first_k_dense and layer_freq here"
        raise CheckpointError(Problem(f"mlp_only_layers = {config['mlp_only_layers']}", rule, "convert another model"))
    keys = {
        "num_experts": number(config, "num_experts", "num_local_experts"),
        "router_topk": number(config, "num_experts_per_tok"),
        "ffn_hidden": number(config, "moe_intermediate_size"),
        "router_norm_topk": bool(config.get("norm_topk_prob", False)),
        "first_k_dense": step - 1,
        "layer_freq": step,
    }
    return {"moe": keys | _balance(config)}


def _read_qwen2_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    section = _read_qwen_moe(config)
    size = number(config, "shared_expert_intermediate_size")
    section["moe"] |= {"shared_expert_ffn_hidden": size, "shared_expert_gate": True}
    return {**section, "qkv_bias": bool(config.get("qkv_bias", True))}


def _balance(config: Mapping[str, Any]) -> dict[str, Any]:
    """The auxiliary loss that the model is to be trained on with."""
    coeff = config.get("router_aux_loss_coef", 0.0)
    return {"router_load_balancing_type": "aux_loss", "aux_loss_coeff": coeff} if coeff else {}


def _write(model: ModelConfig) -> dict[str, Any]:
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


def _refuses(model: ModelConfig, model_type: str, **needed: Any) -> list[Problem]:
    """Return what a family with a plain router has not."""
    moe = model.moe
    if moe is None:
        return [Problem("model.moe", f"must be given in {model_type}", "export cannot change it")]
    plain = {
        "router_score_function": "softmax",
        "router_topk_scaling_factor": 1.0,
        "router_num_groups": None,
        "router_enable_expert_bias": False,
        "first_k_dense": moe.layer_freq - 1,
    }
    return must_be(model_type, "model.moe", moe.model_dump(), {**plain, **needed})


_NO_SHARED = {"shared_expert_ffn_hidden": None, "shared_expert_gate": False}


def _refuses_qwen2(model: ModelConfig) -> list[Problem]:
    if model.moe is not None and model.moe.shared_expert_ffn_hidden is None:
        rule = "must be given in qwen2_moe"
        return [Problem("model.moe.shared_expert_ffn_hidden", rule, "export cannot change it")]
    return _refuses(model, "qwen2_moe", shared_expert_gate=True)


EXPERT_FAMILIES = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        MIXTRAL_STEPS,
        features={"moe": ...},
        write=lambda model: {**_write(model), "intermediate_size": model.moe and model.moe.ffn_hidden},
        read=_read_mixtral,
        refuses=lambda model: _refuses(model, "mixtral", **_NO_SHARED, layer_freq=1, router_norm_topk=True),
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        QWEN2_MOE_STEPS,
        features={"moe": ..., "qkv_bias": ...},
        write=lambda model: {
            **_write(model),
            "qkv_bias": model.qkv_bias,
            "shared_expert_intermediate_size": model.moe and model.moe.shared_expert_ffn_hidden,
        },
        read=_read_qwen2_moe,
        refuses=_refuses_qwen2,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*LLAMA_STEPS, *QK_NORM_STEPS, *EXPERT_STEPS),
        features={"moe": ..., "qk_norm": True},
        write=lambda model: {**_write(model), "attention_bias": False},
        read=lambda config: read_qwen(config) | _read_qwen_moe(config),
        refuses=lambda model: _refuses(model, "qwen3_moe", **_NO_SHARED),
    ),
)
