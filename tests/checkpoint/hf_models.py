"""Random models of every family, as transformers makes them, and what our stage computes from a checkpoint."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megascratch.dist.mesh import Mesh
from megascratch.infer.load import load_model
from megascratch.nn import SequenceInfo, Stage

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_theta": 500.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GEMMA = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 5,
    "sliding_window": 7,
    "pad_token_id": None,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
LONGROPE = {
    "rope_type": "longrope",
    **ROPE,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 1.5, 4.0, 9.0],
}
PHI3 = {"sliding_window": None, "pad_token_id": None}
GPT2 = {"n_inner": 44, "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEEPSEEK = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("Llama", {"rope_parameters": {"rope_type": "default", **ROPE}}),
    "mha": ("Llama", {"num_key_value_heads": 4}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "wide heads": ("Llama", {"head_dim": 12}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 scaling": ("Llama", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}}),
    "linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", **ROPE, "factor": 4.0}}),
    "yarn": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", **ROPE, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, windows": ("Qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma2, no caps": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE}),
    "gemma3, scaled": (
        "Gemma3",
        {**GEMMA, "rope_parameters": {**GEMMA3_ROPE, "full_attention": {"rope_type": "linear", **ROPE, "factor": 8.0}}},
    ),
    "phi3": ("Phi3", {"sliding_window": 9, "pad_token_id": None}),
    "phi3, long": (
        "Phi3",
        {**PHI3, "original_max_position_embeddings": 8, "rope_parameters": {**LONGROPE, "factor": 2.0}},
    ),
    "phi3, short": ("Phi3", {**PHI3, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "olmo2": ("Olmo2", {"pad_token_id": None}),
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied and exact": ("GPT2", {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False}),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek, yarn": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "rope_parameters": {
                "rope_type": "yarn",
                **ROPE,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 20, "norm_topk_prob": False}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe, every second layer": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}),
}


def make(family: str, changes: dict[str, Any]) -> Any:
    """Make a random model. Norms and biases are random too: at their initial ones and zeros a mistake would hide."""
    kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**{**SHAPE, **changes})
    torch.manual_seed(3)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{head}")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Around what they start from: 0 for the weights of Gemma's norms, which multiply by 1 + w.
            parameter.normal_(1.0 if parameter.dim() == 1 and "Gemma" not in family else 0.0, 0.2)
    return model


def saved(path: Path, family: str, changes: dict[str, Any], **options: Any) -> Any:
    model = make(family, changes)
    model.save_pretrained(path, **options)
    return model


def our_model(path: Path) -> Stage:
    return load_model(path, Mesh.serial(), torch.float32)[0]


def our_logits(path: Path, tokens: Tensor) -> Tensor:
    """Return [b, s, v], without the padding of the vocabulary."""
    stage = our_model(path)
    with torch.no_grad():
        logits = stage(None, tokens, SequenceInfo(length=tokens.shape[1])).transpose(0, 1)
    return logits[..., : stage.model.vocab_size]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
