"""Megatron-LM's arguments, which its checkpoints carry, as our `[model]` section, and back."""

from collections.abc import Mapping
from typing import Any

from megascratch.config import ModelConfig, MoEConfig
from megascratch.errors import CheckpointError, Problem

# What our models have one value of: by name, what an argument is when it is not there, and what it must be.
_FIXED: dict[str, tuple[Any, Any]] = {
    "multi_latent_attention": (False, False),
    "rotary_percent": (1.0, 1.0),
    "rotary_interleaved": (False, False),
    "qk_l2_norm": (False, False),
    "heterogeneous_layers_config_path": (None, None),
    "apply_query_key_layer_scaling": (False, False),
    "mtp_num_layers": (None, None),
    "softmax_type": ("vanilla", "vanilla"),
}
_NUMBERS = {
    "n_layers": "num_layers",
    "hidden": "hidden_size",
    "n_heads": "num_attention_heads",
    "ffn_hidden": "ffn_hidden_size",
    "max_seq_length": "max_position_embeddings",
}


def read_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return our `[model]` section, not yet typed or checked.

    Raises: CheckpointError: with everything that the model does and ours cannot.
    """
    problems = [
        Problem(f"args.{name} = {args.get(name)}"[:100], f"must be {allowed}", "convert it with Megatron's own tools")
        for name, (default, allowed) in _FIXED.items()
        if args.get(name, default) != allowed
    ]
    numbers = {ours: args.get(theirs) for ours, theirs in _NUMBERS.items()}
    problems += [
        Problem(f"args.{_NUMBERS[ours]}", "must be given, as a number", "it is no checkpoint of a GPT model")
        for ours, value in numbers.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    norm = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}.get(str(args.get("normalization", "LayerNorm")))
    if norm is None or (norm == "layernorm" and args.get("apply_layernorm_1p")):
        problems.append(Problem(f"args.normalization = {args.get('normalization')}", "must be RMSNorm or LayerNorm"))
    if args.get("num_experts"):
        problems += _foreign_experts(args)
    position = {"rope": "rope", "learned_absolute": "learned", "none": "none"}.get(
        str(args.get("position_embedding_type", "learned_absolute"))
    )
    if position is None:
        rule = "must be rope, learned_absolute or none"
        problems.append(Problem(f"args.position_embedding_type = {args.get('position_embedding_type')}", rule))
    if problems:
        raise CheckpointError(problems)
    grouped = args.get("group_query_attention")
    return {
        **numbers,
        "n_kv_heads": args.get("num_query_groups") if grouped else args["num_attention_heads"],
        "head_dim": args.get("kv_channels"),
        "norm": norm,
        "norm_eps": args.get("norm_epsilon", 1e-5),
        "norm_zero_centered": bool(args.get("apply_layernorm_1p")),
        "activation": _activation(args),
        "position": position,
        "rope_theta": float(args.get("rotary_base", 10000)),
        **_scaling(args),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "qk_norm": bool(args.get("qk_layernorm")),
        "bias": bool(args.get("add_bias_linear", True)),
        "qkv_bias": bool(args.get("add_qkv_bias")),
        "init_std": args.get("init_method_std") or 0.02,
        **_window(args),
        **({"moe": _experts(args)} if args.get("num_experts") else {}),
    }


# Of experts, like `_FIXED`.
_FIXED_OF_EXPERTS: dict[str, tuple[Any, Any]] = {
    "moe_expert_capacity_factor": (None, None),  # whose limit is of a batch, where ours is of a sequence
    "moe_apply_probs_on_input": (False, False),
    "moe_latent_size": (None, None),
    "add_bias_linear": (True, False),
}


def _foreign_experts(args: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with experts that ours cannot be like."""
    problems = [
        Problem(f"args.{name} = {args.get(name)}"[:100], f"must be {allowed} with experts")
        for name, (default, allowed) in _FIXED_OF_EXPERTS.items()
        if args.get(name, default) != allowed
    ]
    balance = args.get("moe_router_load_balancing_type", "aux_loss")
    if balance not in _BALANCES:
        rule = f"must be one of {', '.join(_BALANCES)}"
        problems.append(Problem(f"args.moe_router_load_balancing_type = {balance}"[:100], rule))
    if _pattern(args) is None:
        rule = "must be a first layer with experts, and every n-th from there on"
        problems.append(Problem(f"args.moe_layer_freq = {args.get('moe_layer_freq')}"[:100], rule))
    return problems


_BALANCES = ("none", "aux_loss", "seq_aux_loss")


def _pattern(args: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the first layer with experts, and how many layers lie from one to the next; None if that does not say."""
    every, n_layers = args.get("moe_layer_freq", 1), args.get("num_layers")
    if isinstance(every, int) and every > 0:
        return 0, every
    if not isinstance(every, list) or len(every) != n_layers or 1 not in every:
        return None
    first = every.index(1)
    step = every.index(1, first + 1) - first if every.count(1) > 1 else n_layers
    expected = [int(i >= first and (i - first) % step == 0) for i in range(n_layers)]
    return (first, step) if every == expected else None


def _experts(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return `[model.moe]`."""
    pattern, softmax = _pattern(args), args.get("moe_router_score_function", "softmax") == "softmax"
    assert pattern is not None
    topk = args.get("moe_router_topk", 2)
    coeff = args.get("moe_aux_loss_coeff") or 0.0
    shared = args.get("moe_shared_expert_intermediate_size")
    return {
        "num_experts": args["num_experts"],
        "router_topk": topk,
        "ffn_hidden": args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"],
        "first_k_dense": pattern[0],
        "layer_freq": pattern[1],
        "router_score_function": args.get("moe_router_score_function", "softmax"),
        # A softmax of the chosen scores is that of all, divided by its sum over the chosen.
        "router_norm_topk": not args.get("moe_router_pre_softmax") if softmax else topk > 1,
        "router_topk_scaling_factor": args.get("moe_router_topk_scaling_factor") or 1.0,
        "router_num_groups": args.get("moe_router_num_groups"),
        "router_group_topk": args.get("moe_router_group_topk"),
        "router_load_balancing_type": args.get("moe_router_load_balancing_type", "aux_loss") if coeff else "none",
        "aux_loss_coeff": coeff,
        "z_loss_coeff": args.get("moe_z_loss_coeff") or 0.0,
        "router_enable_expert_bias": bool(args.get("moe_router_enable_expert_bias")),
        "router_bias_update_rate": args.get("moe_router_bias_update_rate", 1e-3),
        "shared_expert_ffn_hidden": shared,
        "shared_expert_gate": bool(shared and args.get("moe_shared_expert_gate")),
    }


def _activation(args: Mapping[str, Any]) -> str:
    if args.get("swiglu"):
        return "swiglu"
    if args.get("squared_relu"):
        return "relu2"
    # Its fused bias and GELU computes the tanh form.
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if fused or args.get("openai_gelu") else "gelu"


def _scaling(args: Mapping[str, Any]) -> dict[str, Any]:
    if args.get("use_rope_scaling"):  # Llama 3's, whose other numbers Megatron has no arguments for
        return {"rope_scaling": {"type": "llama3", "factor": args.get("rope_scaling_factor", 8.0)}}
    factor = args.get("rotary_seq_len_interpolation_factor")
    return {"rope_scaling": {"type": "linear", "factor": factor}} if factor not in (None, 1) else {}


def _window(args: Mapping[str, Any]) -> dict[str, Any]:
    window, every = args.get("window_size"), args.get("window_attn_skip_freq")
    if window is None:
        return {}
    if not (isinstance(window, tuple | list) and len(window) == 2 and isinstance(window[0], int)) or window[1] != 0:
        raise CheckpointError(Problem(f"args.window_size = {window}"[:100], "must be (tokens before, 0)"))
    if every is not None and not isinstance(every, int):
        raise CheckpointError(Problem(f"args.window_attn_skip_freq = {every}"[:100], "must be every n-th layer"))
    return {"sliding_window": window[0] + 1, "window_attn_skip_freq": every}


def write_arguments(model: ModelConfig, tp: int, pp: int, padded_vocab_size: int) -> dict[str, Any]:
    """Return the arguments that Megatron's `--use-checkpoint-args` reads, and what else describes the model.

    Raises: CheckpointError: with everything about the model that they do not express.
    """
    problems = list(_inexpressible(model))
    if problems:
        raise CheckpointError(problems, "the export to Megatron-LM's format")
    scaling = model.rope_scaling
    position = {"rope": "rope", "learned": "learned_absolute", "none": "none"}[model.position]
    window = model.sliding_window
    return {
        **{theirs: getattr(model, ours) for ours, theirs in _NUMBERS.items()},
        "seq_length": model.max_seq_length,
        "group_query_attention": model.n_kv_heads != model.n_heads,
        "num_query_groups": model.n_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        "norm_epsilon": model.norm_eps,
        "apply_layernorm_1p": model.norm_zero_centered,
        "swiglu": model.activation == "swiglu",
        "squared_relu": model.activation == "relu2",
        "openai_gelu": False,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "position_embedding_type": position,
        "add_position_embedding": model.position == "learned",
        "use_rotary_position_embeddings": model.position == "rope",
        "rotary_base": int(model.rope_theta) if model.rope_theta == int(model.rope_theta) else model.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": scaling.factor if scaling and scaling.type == "linear" else None,
        "use_rope_scaling": scaling is not None and scaling.type == "llama3",
        "rope_scaling_factor": scaling.factor if scaling else 8.0,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "qk_layernorm": model.qk_norm,
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.bias or model.qkv_bias,
        "init_method_std": model.init_std,
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": model.window_attn_skip_freq,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        **(_write_experts(model, model.moe) if model.moe is not None else {"num_experts": None}),
    }


def _write_experts(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    has = [int(model.has_experts(layer)) for layer in range(model.n_layers)]
    pre_softmax = moe.router_score_function == "softmax" and not moe.router_norm_topk
    return {
        "num_experts": moe.num_experts,
        "expert_model_parallel_size": 1,
        "moe_router_topk": moe.router_topk,
        "moe_ffn_hidden_size": moe.ffn_hidden,
        "moe_layer_freq": 1 if all(has) else has,
        "moe_router_score_function": moe.router_score_function,
        "moe_router_pre_softmax": pre_softmax,
        "moe_router_topk_scaling_factor": None
        if moe.router_topk_scaling_factor == 1.0
        else moe.router_topk_scaling_factor,
        "moe_router_num_groups": moe.router_num_groups,
        "moe_router_group_topk": moe.router_group_topk,
        "moe_router_load_balancing_type": moe.router_load_balancing_type,
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.router_enable_expert_bias,
        "moe_router_bias_update_rate": moe.router_bias_update_rate,
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_grouped_gemm": False,
    }


def _inexpressible(model: ModelConfig) -> list[Problem]:
    default = {key: field.default for key, field in ModelConfig.model_fields.items()}
    same = (
        *("mla", "norm_position", "scale_embeddings", "qk_norm_across_heads", "query_pre_attn_scalar"),
        *("attn_softcap", "logit_softcap", "rope_local_theta"),
    )
    fixed = "export cannot change it"
    problems = [
        Problem(f"model.{key} = {getattr(model, key)}"[:100], f"must be {default[key]} in Megatron's format", fixed)
        for key in same
        if getattr(model, key) != default[key]
    ]
    if model.activation not in ("swiglu", "relu2", "gelu", "gelu_tanh"):
        rule = "must be swiglu, relu2, gelu or gelu_tanh in Megatron's format"
        problems.append(Problem(f"model.activation = {model.activation}", rule, fixed))
    if model.activation == "gelu_tanh" and not model.bias:
        problems.append(Problem("model.activation = gelu_tanh", "needs model.bias = true in Megatron's format", fixed))
    moe = model.moe
    if moe is not None and moe.expert_capacity_factor is not None:
        rule = "must be left out in Megatron's format"
        value = f"model.moe.expert_capacity_factor = {moe.expert_capacity_factor}"
        problems.append(Problem(value, rule, fixed))
    if moe is not None and moe.router_score_function == "sigmoid" and moe.router_norm_topk != (moe.router_topk > 1):
        rule = f"must be {moe.router_topk > 1} with sigmoid scores in Megatron's format".lower()
        problems.append(Problem(f"model.moe.router_norm_topk = {moe.router_norm_topk}".lower(), rule, fixed))
    scaling = model.rope_scaling
    if scaling is not None and (
        scaling.type in ("yarn", "longrope")
        or (scaling.type == "llama3" and (scaling.low_freq_factor, scaling.high_freq_factor) != (1.0, 4.0))
        or (scaling.type == "llama3" and scaling.original_seq_length != 8192)
    ):
        rule = "must be linear, or llama3 with its published numbers, in Megatron's format"
        problems.append(Problem(f"model.rope_scaling.type = {scaling.type}", rule, fixed))
    return problems
