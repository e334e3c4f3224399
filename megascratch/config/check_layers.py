"""Rules of layers that not every model has: latent attention, mixture of experts."""

from collections.abc import Iterator

from megascratch.config.check_batch import data_parallel
from megascratch.config.schema import Config, ModelConfig
from megascratch.config.words import divisors, multiples_near
from megascratch.errors import Problem


def model_features(config: Config, _: int | None) -> Iterator[Problem]:
    """Keys of the model that mean nothing without another."""
    model = config.model
    needs = (
        ("qk_norm_across_heads", model.qk_norm_across_heads, "qk_norm = true", model.qk_norm),
        ("window_attn_skip_freq", model.window_attn_skip_freq, "sliding_window", model.sliding_window),
        ("rope_local_theta", model.rope_local_theta, "sliding_window", model.sliding_window),
        ("rope_local_theta", model.rope_local_theta, "position = rope", model.position == "rope"),
        ("norm_zero_centered", model.norm_zero_centered, "norm = rmsnorm", model.norm == "rmsnorm"),
    )
    for key, given, needed, there in needs:
        if given and not there:
            yield Problem(f"model.{key} = {given}".lower(), f"needs model.{needed}", f"set it, or leave {key} out")


def latent_attention(model: ModelConfig) -> Iterator[Problem]:
    mla = model.mla
    assert mla is not None
    width = mla.qk_head_dim + mla.qk_pos_emb_head_dim
    for key, value, needed in (
        ("head_dim", model.head_dim, width),
        ("n_kv_heads", model.n_kv_heads, model.n_heads),
        ("position", model.position, "rope"),
        ("qk_norm", model.qk_norm, False),
        ("bias", model.bias, False),
        ("qkv_bias", model.qkv_bias, False),
        ("query_pre_attn_scalar", model.query_pre_attn_scalar, None),
    ):
        if value is not None and value != needed:
            remedy = f"set {key} = {needed}" if key == "position" else f"leave {key} out"
            yield Problem(f"model.{key} = {value}".lower(), f"must be {needed} with model.mla".lower(), remedy)
    if mla.qk_pos_emb_head_dim % 2:
        given = f"model.mla.qk_pos_emb_head_dim = {mla.qk_pos_emb_head_dim}"
        yield Problem(given, "must be even for rotary positions", f"use {mla.qk_pos_emb_head_dim + 1}")
    if mla.v_head_dim > width:
        rule = f"must not exceed qk_head_dim + qk_pos_emb_head_dim = {width}"
        yield Problem(f"model.mla.v_head_dim = {mla.v_head_dim}", rule, f"use {width} or less")


def experts(config: Config, world_size: int | None) -> Iterator[Problem]:
    model, parallel, moe = config.model, config.parallel, config.model.moe
    if moe is None:
        if parallel.ep > 1:
            yield Problem(f"parallel.ep = {parallel.ep}", "needs experts: model.moe", "set ep = 1, or [model.moe]")
        return
    n, k, groups, group_topk = moe.num_experts, moe.router_topk, moe.router_num_groups, moe.router_group_topk
    if n % parallel.ep:
        rule = f"must divide model.moe.num_experts = {n}"
        yield Problem(f"parallel.ep = {parallel.ep}", rule, f"use {divisors(n)}")
    dp = data_parallel(config, world_size)
    if dp % parallel.ep:
        rule = f"must divide dp = {dp}: experts are divided over ranks of dp"
        yield Problem(f"parallel.ep = {parallel.ep}", rule, f"use {divisors(dp)}")
    for key in ("ffn_hidden", "shared_expert_ffn_hidden"):
        if (size := getattr(moe, key)) is not None and size % parallel.tp:
            rule = f"must divide model.moe.{key} = {size}"
            yield Problem(f"parallel.tp = {parallel.tp}", rule, f"use a {key} of {multiples_near(size, parallel.tp)}")
    if k > n:
        rule = f"must not exceed model.moe.num_experts = {n}"
        yield Problem(f"model.moe.router_topk = {k}", rule, "choose fewer experts a token")
    if (groups is None) != (group_topk is None):
        yield Problem("model.moe.router_num_groups", "goes with router_group_topk", "set both, or neither")
    elif groups is not None and group_topk is not None:
        if n % groups or group_topk > groups:
            rule = f"must divide num_experts = {n}, and be at least router_group_topk = {group_topk}"
            yield Problem(f"model.moe.router_num_groups = {groups}", rule, f"use {divisors(n)}")
        elif k % group_topk or k > group_topk * (n // groups) or k // group_topk > n // groups:
            rule = (
                f"must be a multiple of router_group_topk = {group_topk}, within its {group_topk * n // groups} experts"
            )
            yield Problem(f"model.moe.router_topk = {k}", rule, "choose other numbers")
    if moe.aux_loss_coeff > 0 and moe.router_load_balancing_type == "none":
        rule = "needs router_load_balancing_type = seq_aux_loss or aux_loss"
        yield Problem(f"model.moe.aux_loss_coeff = {moe.aux_loss_coeff}", rule, "set one")
    if moe.shared_expert_gate and moe.shared_expert_ffn_hidden is None:
        rule = "needs shared_expert_ffn_hidden"
        yield Problem("model.moe.shared_expert_gate = true", rule, "set it, or leave the gate out")
    if moe.first_k_dense >= model.n_layers:
        rule = f"leaves none of {model.n_layers} layers with experts"
        yield Problem(f"model.moe.first_k_dense = {moe.first_k_dense}", rule, "lower it")
    if model.bias:
        yield Problem("model.bias = true", "experts have no biases", "set bias = false")
