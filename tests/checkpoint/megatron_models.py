"""Models of megatron-core on a CPU: its own names, shapes and files.

It asks for CUDA in a few places that a CPU has no need of; `on_a_cpu` answers them.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 44,
}
V, LENGTH = 131, 64
# By name: changes to the shape, keyword arguments of GPTModel, arguments of the run.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"rotary_base": 500}, {"rotary_base": 500}),
    "qwen": ({"add_qkv_bias": True, "qk_layernorm": True}, {}, {"add_qkv_bias": True, "qk_layernorm": True}),
    "gpt2": (
        {"normalization": "LayerNorm", "num_query_groups": 4, "add_bias_linear": True, "gated_linear_unit": False},
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
        {
            "normalization": "LayerNorm",
            "swiglu": False,
            "group_query_attention": False,
            "add_bias_linear": True,
            "bias_gelu_fusion": False,
            "num_query_groups": 4,
            "position_embedding_type": "learned_absolute",
            "untie_embeddings_and_output_weights": False,
        },
    ),
}


_EXPERTS: dict[str, Any] = {
    "moe_ffn_hidden_size": 20,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}
_SIGMOID: dict[str, Any] = {
    **_EXPERTS,
    "moe_layer_freq": [0, 1, 0, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 12,
    "moe_shared_expert_gate": True,
}
_PRE_SOFTMAX = {**_EXPERTS, "moe_router_pre_softmax": True}
for _name, _keys in {"mixtral": _EXPERTS, "pre-softmax": _PRE_SOFTMAX, "sigmoid": _SIGMOID}.items():
    KINDS[_name] = ({**_keys, "num_moe_experts": 4}, {}, {**_keys, "num_experts": 4})


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """Let megatron-core run where there is no CUDA."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    made = torch.ones

    def ones(*sizes: Any, device: Any = None, **options: Any) -> Tensor:
        return made(*sizes, device=None if device == "cuda" else device, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch, "ones", ones)
        patch.setattr(filesystem_async, "_process_memory", lambda: 0)
        # Which it looks up, but imports with Transformer Engine alone.
        patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        patch.setattr(CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext())
        yield


def arguments(name: str, tp: int = 1, pp: int = 1) -> Namespace:
    """Return the arguments that a run of such a model has."""
    base = {
        **SHAPE,
        "group_query_attention": True,
        "max_position_embeddings": LENGTH,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "untie_embeddings_and_output_weights": True,
        "vocab_size": V,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
    }
    return Namespace(**{**base, **KINDS[name][2]})


def make_model(name: str, tp: int = 1, pp: int = 1) -> Any:
    """Make this rank's part of a model; `parallel_state` says which part. Weights are random, norms and biases too."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    changes, keywords, _ = KINDS[name]
    shape = {
        **SHAPE,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        **changes,
    }
    config = TransformerConfig(
        **shape,
        activation_func=torch.nn.functional.silu if shape["gated_linear_unit"] else torch.nn.functional.gelu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        layernorm_epsilon=1e-5,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = GPTModel(
        config,
        spec,
        vocab_size=256,  # padded
        max_sequence_length=LENGTH,
        pre_process=stage == 0,
        post_process=stage == pp - 1,
        **{"position_embedding_type": "rope", "share_embeddings_and_output_weights": False, **keywords},
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return [b, s, v] of the vocabulary without padding."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        out: Tensor = model(tokens, positions, None)
    return out[..., :V]


def start(store: Path, rank: int = 0, world: int = 1, tp: int = 1, pp: int = 1) -> None:
    """Set up megatron-core's process groups, in this process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(str(store), world))
    parallel_state.initialize_model_parallel(tp, pp)


def stop() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
