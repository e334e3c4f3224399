"""Published model shapes by name.

A preset gives the defaults of `[model]`; keys that the recipe names win. Sources: the `config.json` that each owner
publishes, and Radford et al. 2019 for GPT-2; `tiny` is ours, for laptops and tests.
"""

from typing import Any

_LLAMA3 = {
    "vocab_size": 128256,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "activation": "swiglu",
    "position": "rope",
    "rope_theta": 500000.0,
    "max_seq_length": 8192,
}

_LLAMA31_SCALING = {
    "type": "llama3",
    "factor": 8.0,
    "original_seq_length": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

_QWEN3 = {
    "vocab_size": 151936,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "activation": "swiglu",
    "position": "rope",
    "rope_theta": 1000000.0,
    "max_seq_length": 40960,
    "qk_norm": True,
}

_GEMMA = {
    "head_dim": 256,
    "norm_eps": 1e-6,
    "norm_position": "both",
    "norm_zero_centered": True,
    "activation": "geglu_tanh",
    "tie_embeddings": True,
    "scale_embeddings": True,
    "query_pre_attn_scalar": 256.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "n_layers": 4,
        "hidden": 256,
        "n_heads": 8,
        "n_kv_heads": 4,
        "ffn_hidden": 704,
        "rope_theta": 10000.0,
        "max_seq_length": 2048,
    },
    "gpt2-124m": {
        "n_layers": 12,
        "hidden": 768,
        "n_heads": 12,
        "ffn_hidden": 3072,
        "vocab_size": 50257,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": "gelu_tanh",
        "position": "learned",
        "max_seq_length": 1024,
        "tie_embeddings": True,
        "bias": True,
    },
    # Llama 3.2 1B: https://huggingface.co/meta-llama/Llama-3.2-1B
    "llama-1b": {
        **_LLAMA3,
        "n_layers": 16,
        "hidden": 2048,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 64,
        "ffn_hidden": 8192,
        "tie_embeddings": True,
        "max_seq_length": 131072,
        "rope_scaling": {**_LLAMA31_SCALING, "factor": 32.0},
    },
    "llama3-8b": {**_LLAMA3, "n_layers": 32, "hidden": 4096, "n_heads": 32, "n_kv_heads": 8, "ffn_hidden": 14336},
    "llama3-70b": {**_LLAMA3, "n_layers": 80, "hidden": 8192, "n_heads": 64, "n_kv_heads": 8, "ffn_hidden": 28672},
    # The 405B model exists only as Llama 3.1, with its long context (Llama 3 herd, arXiv:2407.21783, table 3).
    "llama3-405b": {
        **_LLAMA3,
        "n_layers": 126,
        "hidden": 16384,
        "n_heads": 128,
        "n_kv_heads": 8,
        "ffn_hidden": 53248,
        "max_seq_length": 131072,
        "rope_scaling": _LLAMA31_SCALING,
    },
    # Yang et al. 2025, arXiv:2505.09388; https://huggingface.co/Qwen/Qwen3-8B
    "qwen3-8b": {
        **_QWEN3,
        "n_layers": 36,
        "hidden": 4096,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "ffn_hidden": 12288,
    },
    # Gemma team 2024, arXiv:2408.00118; https://huggingface.co/google/gemma-2-9b
    "gemma2-9b": {
        **_GEMMA,
        "n_layers": 42,
        "hidden": 3584,
        "n_heads": 16,
        "n_kv_heads": 8,
        "ffn_hidden": 14336,
        "vocab_size": 256000,
        "rope_theta": 10000.0,
        "max_seq_length": 8192,
        "attn_softcap": 50.0,
        "logit_softcap": 30.0,
        "sliding_window": 4096,
        "window_attn_skip_freq": 2,
    },
    # Gemma team 2025, arXiv:2503.19786; https://huggingface.co/google/gemma-3-1b-pt
    "gemma3-1b": {
        **_GEMMA,
        "n_layers": 26,
        "hidden": 1152,
        "n_heads": 4,
        "n_kv_heads": 1,
        "ffn_hidden": 6912,
        "vocab_size": 262144,
        "rope_theta": 1000000.0,
        "rope_local_theta": 10000.0,
        "max_seq_length": 32768,
        "qk_norm": True,
        "sliding_window": 512,
        "window_attn_skip_freq": 6,
    },
    # Abdin et al. 2024, arXiv:2404.14219; https://huggingface.co/microsoft/Phi-3-mini-4k-instruct
    "phi3-mini": {
        "n_layers": 32,
        "hidden": 3072,
        "n_heads": 32,
        "ffn_hidden": 8192,
        "vocab_size": 32064,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_seq_length": 4096,
        "sliding_window": 2047,
    },
    # OLMo team 2024, arXiv:2501.00656; https://huggingface.co/allenai/OLMo-2-1124-7B
    "olmo2-7b": {
        "n_layers": 32,
        "hidden": 4096,
        "n_heads": 32,
        "ffn_hidden": 11008,
        "vocab_size": 100352,
        "norm_eps": 1e-6,
        "norm_position": "post",
        "qk_norm": True,
        "qk_norm_across_heads": True,
        "rope_theta": 500000.0,
        "max_seq_length": 4096,
    },
    # Jiang et al. 2024, arXiv:2401.04088; https://huggingface.co/mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": {
        "n_layers": 32,
        "hidden": 4096,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_hidden": 14336,
        "vocab_size": 32000,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "swiglu",
        "position": "rope",
        "rope_theta": 1000000.0,
        "max_seq_length": 32768,
        "moe": {
            "num_experts": 8,
            "router_topk": 2,
            "ffn_hidden": 14336,
            "router_load_balancing_type": "aux_loss",
            "aux_loss_coeff": 0.02,
        },
    },
    # Yang et al. 2025, arXiv:2505.09388; https://huggingface.co/Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": {
        **_QWEN3,
        "n_layers": 48,
        "hidden": 2048,
        "n_heads": 32,
        "n_kv_heads": 4,
        "head_dim": 128,
        "ffn_hidden": 6144,
        "moe": {
            "num_experts": 128,
            "router_topk": 8,
            "ffn_hidden": 768,
            "router_load_balancing_type": "aux_loss",
            "aux_loss_coeff": 0.001,
        },
    },
    # DeepSeek-AI 2024, arXiv:2412.19437, section 4.2; https://huggingface.co/deepseek-ai/DeepSeek-V3
    "deepseek-v3": {
        "n_layers": 61,
        "hidden": 7168,
        "n_heads": 128,
        "ffn_hidden": 18432,
        "vocab_size": 129280,
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
        "activation": "swiglu",
        "position": "rope",
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 40.0, "original_seq_length": 4096},
        "max_seq_length": 163840,
        "init_std": 0.006,
        "mla": {
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
        },
        "moe": {
            "num_experts": 256,
            "router_topk": 8,
            "ffn_hidden": 2048,
            "first_k_dense": 3,
            "router_score_function": "sigmoid",
            "router_topk_scaling_factor": 2.5,
            "router_num_groups": 8,
            "router_group_topk": 4,
            "router_load_balancing_type": "seq_aux_loss",
            "aux_loss_coeff": 0.0001,
            "router_enable_expert_bias": True,
            "router_bias_update_rate": 0.001,
            "shared_expert_ffn_hidden": 2048,
        },
    },
}
