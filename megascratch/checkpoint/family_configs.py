"""What each family's `config.json` says besides the common keys, read into our `[model]` section and written back."""

from collections.abc import Mapping
from typing import Any

from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem


def read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        value = f"attention_bias = {attention}, mlp_bias = {mlp}".lower()
        raise CheckpointError(
            Problem(value, "biases are on every linear layer here, or on none", "convert another model")
        )
    return {"bias": attention}


def read_qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("attention_bias"):
        problem = Problem(
            "attention_bias = true", "together with norms of q and k is not supported", "convert another model"
        )
        raise CheckpointError(problem)
    return {"qk_norm": True}


def read_mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "num_experts": _number(config, "num_local_experts", "num_experts"),
        "router_topk": _number(config, "num_experts_per_tok"),
        "ffn_hidden": _number(config, "intermediate_size"),
    }
    return {"moe": keys | _balance(config)}


def read_qwen_moe(config: Mapping[str, Any]) -> dict[str, Any]:
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


def read_qwen2_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    section = read_qwen_moe(config)
    size = _number(config, "shared_expert_intermediate_size")
    section["moe"] |= {"shared_expert_ffn_hidden": size, "shared_expert_gate": True}
    return {**section, "qkv_bias": bool(config.get("qkv_bias", True))}


def read_deepseek(config: Mapping[str, Any]) -> dict[str, Any]:
    rules = {
        "rope_interleave": (True, True),
        "attention_bias": (False, False),
        "moe_layer_freq": (1, 1),
        "scoring_func": ("sigmoid", "sigmoid"),
        "topk_method": ("noaux_tc", "noaux_tc"),
        "rms_norm_eps": (1e-6, 1e-6),  # which their norms of latent vectors have, whatever is said here
    }
    problems = [
        Problem(f"{key} = {config[key]}", f"must be {allowed}", "convert another model")
        for key, (default, allowed) in rules.items()
        if config.get(key, default) != allowed
    ]
    if config.get("q_lora_rank") is None:
        problems.append(Problem("q_lora_rank", "must be given, as in DeepSeek-V3", "convert another model"))
    if problems:
        raise CheckpointError(problems)
    size = _number(config, "moe_intermediate_size")
    moe = {
        "num_experts": _number(config, "n_routed_experts", "num_local_experts"),
        "router_topk": _number(config, "num_experts_per_tok"),
        "ffn_hidden": size,
        "first_k_dense": _number(config, "first_k_dense_replace"),
        "router_score_function": "sigmoid",
        "router_norm_topk": bool(config.get("norm_topk_prob", True)),
        "router_topk_scaling_factor": config.get("routed_scaling_factor", 1.0),
        "router_num_groups": _number(config, "n_group"),
        "router_group_topk": _number(config, "topk_group"),
        "router_enable_expert_bias": True,
        "shared_expert_ffn_hidden": size * _number(config, "n_shared_experts"),
    }
    mla = {
        "q_lora_rank": _number(config, "q_lora_rank"),
        "kv_lora_rank": _number(config, "kv_lora_rank"),
        "qk_head_dim": _number(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": _number(config, "qk_rope_head_dim"),
        "v_head_dim": _number(config, "v_head_dim"),
    }
    return {"moe": moe, "mla": mla, "head_dim": None}


def write_deepseek(model: ModelConfig) -> dict[str, Any]:
    moe, mla = model.moe, model.mla
    assert moe is not None and mla is not None and moe.shared_expert_ffn_hidden is not None
    return {
        "head_dim": mla.qk_pos_emb_head_dim,  # which they take the rotary tables' size from
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_head_dim,
        "qk_rope_head_dim": mla.qk_pos_emb_head_dim,
        "qk_head_dim": mla.qk_head_dim + mla.qk_pos_emb_head_dim,
        "v_head_dim": mla.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.router_topk,
        "moe_intermediate_size": moe.ffn_hidden,
        "n_shared_experts": moe.shared_expert_ffn_hidden // moe.ffn_hidden,
        "first_k_dense_replace": moe.first_k_dense,
        "norm_topk_prob": moe.router_norm_topk,
        "routed_scaling_factor": moe.router_topk_scaling_factor,
        "n_group": moe.router_num_groups,
        "topk_group": moe.router_group_topk,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
    }


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


def write_experts(model: ModelConfig) -> dict[str, Any]:
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
