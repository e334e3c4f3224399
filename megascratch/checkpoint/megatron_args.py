"""Megatron-LM's arguments, which its checkpoints carry, as our `[model]` section, and back."""

from collections.abc import Mapping
from typing import Any

from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

# What our models have one value of: by name, what an argument is when it is not there, and what it must be.
_FIXED: dict[str, tuple[Any, Any]] = {
    "num_experts": (None, None),
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
        "num_experts": None,
    }


def _inexpressible(model: ModelConfig) -> list[Problem]:
    default = {key: field.default for key, field in ModelConfig.model_fields.items()}
    same = (
        *("moe", "mla", "norm_position", "scale_embeddings", "qk_norm_across_heads", "query_pre_attn_scalar"),
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
    scaling = model.rope_scaling
    if scaling is not None and (
        scaling.type == "yarn"
        or (scaling.type == "llama3" and (scaling.low_freq_factor, scaling.high_freq_factor) != (1.0, 4.0))
        or (scaling.type == "llama3" and scaling.original_seq_length != 8192)
    ):
        rule = "must be linear, or llama3 with its published numbers, in Megatron's format"
        problems.append(Problem(f"model.rope_scaling.type = {scaling.type}", rule, fixed))
    return problems
