"""DeepSeek-V3: latent attention, and experts chosen by sigmoid scores in groups."""

from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families.experts import EXPERT_STEPS, shared_expert
from megascratch.checkpoint.families.family import Family, must_be, number, refuse_other
from megascratch.checkpoint.families.llama import ATTN, LLAMA_STEPS, MLP
from megascratch.checkpoint.steps import rename, rotary_rows
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem


def _rotated_part(model: ModelConfig) -> int:
    assert model.mla is not None
    return model.mla.qk_pos_emb_head_dim


DEEPSEEK_STEPS = (
    *LLAMA_STEPS,
    rename("layers.{i}.attn.q_down.weight", ATTN + "q_a_proj.weight"),
    rename("layers.{i}.attn.q_norm.weight", ATTN + "q_a_layernorm.weight"),
    rotary_rows(
        "layers.{i}.attn.q_up.weight", ATTN + "q_b_proj.weight", lambda model: (model.n_heads, _rotated_part(model))
    ),
    rotary_rows(
        "layers.{i}.attn.kv_down.weight",
        ATTN + "kv_a_proj_with_mqa.weight",
        lambda model: (1, _rotated_part(model)),
    ),
    rename("layers.{i}.attn.kv_norm.weight", ATTN + "kv_a_layernorm.weight"),
    rename("layers.{i}.attn.kv_up.weight", ATTN + "kv_b_proj.weight"),
    *EXPERT_STEPS,
    rename("layers.{i}.mlp.router.bias", MLP + "gate.e_score_correction_bias"),
    *shared_expert(MLP + "shared_experts."),
)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    rules = {
        "rope_interleave": (True, True),
        "attention_bias": (False, False),
        "moe_layer_freq": (1, 1),
        "scoring_func": ("sigmoid", "sigmoid"),
        "topk_method": ("noaux_tc", "noaux_tc"),
        "rms_norm_eps": (1e-6, 1e-6),  # which their norms of latent vectors have, whatever is said here
    }
    refuse_other(config, rules)
    if config.get("q_lora_rank") is None:
        raise CheckpointError(Problem("q_lora_rank", "must be given, as in DeepSeek-V3", "convert another model"))
    size = number(config, "moe_intermediate_size")
    moe = {
        "num_experts": number(config, "n_routed_experts", "num_local_experts"),
        "router_topk": number(config, "num_experts_per_tok"),
        "ffn_hidden": size,
        "first_k_dense": number(config, "first_k_dense_replace"),
        "router_score_function": "sigmoid",
        "router_norm_topk": bool(config.get("norm_topk_prob", True)),
        "router_topk_scaling_factor": config.get("routed_scaling_factor", 1.0),
        "router_num_groups": number(config, "n_group"),
        "router_group_topk": number(config, "topk_group"),
        "router_enable_expert_bias": True,
        "shared_expert_ffn_hidden": size * number(config, "n_shared_experts"),
    }
    mla = {
        "q_lora_rank": number(config, "q_lora_rank"),
        "kv_lora_rank": number(config, "kv_lora_rank"),
        "qk_head_dim": number(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": number(config, "qk_rope_head_dim"),
        "v_head_dim": number(config, "v_head_dim"),
    }
    return {"moe": moe, "mla": mla, "head_dim": None}


def _write(model: ModelConfig) -> dict[str, Any]:
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


def _refuses(model: ModelConfig) -> list[Problem]:
    moe, mla, fixed = model.moe, model.mla, "export cannot change it"
    if moe is None or mla is None or mla.q_lora_rank is None:
        return [Problem("model.mla", "is exported with experts and q_lora_rank, as in deepseek_v3", fixed)]
    needed = {
        "router_score_function": "sigmoid",
        "router_enable_expert_bias": True,
        "shared_expert_gate": False,
        "layer_freq": 1,
    }
    problems = must_be("deepseek_v3", "model.moe", moe.model_dump(), needed)
    if moe.router_num_groups is None or moe.router_group_topk is None:
        problems.append(Problem("model.moe.router_num_groups", "must be given in deepseek_v3", "export cannot add it"))
    elif moe.router_topk != 2 * moe.router_group_topk:
        rule = "must be twice router_group_topk in deepseek_v3, which scores a group by its best two"
        problems.append(Problem(f"model.moe.router_topk = {moe.router_topk}", rule, fixed))
    shared = moe.shared_expert_ffn_hidden
    if shared is None or shared % moe.ffn_hidden:
        rule = "must be a multiple of ffn_hidden in deepseek_v3"
        problems.append(Problem(f"model.moe.shared_expert_ffn_hidden = {shared}", rule, fixed))
    return problems


DEEPSEEK_FAMILIES = (
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        DEEPSEEK_STEPS,
        features={"moe": ..., "mla": ...},
        write=_write,
        read=_read,
        refuses=_refuses,
    ),
)
