"""Logits of the whole decoder against `transformers`, with the same random weights in both."""

from typing import Any

import pytest
import torch
from logical import fill
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megascratch.config import Config, ModelConfig, RopeScaling, resolve
from megascratch.dist.mesh import Mesh
from megascratch.nn import Placement, SequenceInfo, Stage

H, N, K, D, F, V, LAYERS, LENGTH = 32, 4, 2, 8, 48, 101, 2, 40

LLAMA: dict[str, Any] = {
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": D,
    "intermediate_size": F,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _stage(**changes: Any) -> tuple[Stage, dict[str, Tensor]]:
    shape: dict[str, Any] = {"n_layers": LAYERS, "hidden": H, "n_heads": N, "head_dim": D, "ffn_hidden": F}
    model = resolve(Config(model=ModelConfig(**{**shape, "vocab_size": V, "max_seq_length": 64, **changes}))).model
    mesh = Mesh.serial()
    stage = Stage(model, Placement(mesh.tp, False, torch.float32, mesh.device)).eval()
    fill(stage, mesh)
    return stage, {name: param.detach() for name, param in stage.named_parameters()}


def _llama_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of Llama's family; rows of qkv are grouped [q … q, k, v] a key/value head."""
    theirs = {"model.embed_tokens.weight": ours["embed.weight"][:V], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours.get("head.weight", ours["embed.weight"])[:V]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in ours.items() if name.startswith(f"layers.{i}.")}
        grouped = layer["attn.qkv.weight"].view(K, N // K + 2, D, H)
        gate, up = layer["mlp.gate_up.weight"].split(F)
        renamed = {
            "input_layernorm": layer["attn_norm.weight"],
            "self_attn.q_proj": grouped[:, : N // K].reshape(N * D, H),
            "self_attn.k_proj": grouped[:, -2].reshape(K * D, H),
            "self_attn.v_proj": grouped[:, -1].reshape(K * D, H),
            "self_attn.o_proj": layer["attn.proj.weight"],
            "post_attention_layernorm": layer["mlp_norm.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer["mlp.down.weight"],
        }
        if "attn.q_norm.weight" in layer:
            renamed["self_attn.q_norm"] = layer["attn.q_norm.weight"]
            renamed["self_attn.k_norm"] = layer["attn.k_norm.weight"]
        theirs |= {f"model.layers.{i}.{name}.weight": t for name, t in renamed.items()}
    return theirs


def _gpt2_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of GPT-2, whose linear weights are transposed and whose qkv is [all q; all k; all v]."""

    def ungrouped(qkv: Tensor) -> Tensor:
        return qkv.view(N, 3, D, -1).transpose(0, 1).reshape(3 * N * D, -1)

    wte = ours["embed.weight"][:V]
    theirs = {"transformer.wte.weight": wte, "lm_head.weight": wte, "transformer.wpe.weight": ours["position.weight"]}
    theirs |= {f"transformer.ln_f.{kind}": ours[f"norm.{kind}"] for kind in ("weight", "bias")}
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            layer = {name: ours[f"layers.{i}.{name}.{kind}"] for name in ("attn_norm", "attn.qkv", "attn.proj")}
            layer |= {name: ours[f"layers.{i}.{name}.{kind}"] for name in ("mlp_norm", "mlp.up", "mlp.down")}
            renamed = {
                "ln_1": layer["attn_norm"],
                "attn.c_attn": ungrouped(layer["attn.qkv"]).squeeze(-1)
                if kind == "bias"
                else ungrouped(layer["attn.qkv"]),
                "attn.c_proj": layer["attn.proj"],
                "ln_2": layer["mlp_norm"],
                "mlp.c_fc": layer["mlp.up"],
                "mlp.c_proj": layer["mlp.down"],
            }
            theirs |= {f"transformer.h.{i}.{n}.{kind}": t.t() if t.dim() == 2 else t for n, t in renamed.items()}
    return theirs


def _assert_same_logits(stage: Stage, theirs: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    tokens = torch.randint(0, V, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        actual = stage(None, tokens, SequenceInfo(LENGTH)).transpose(0, 1)[..., :V]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool) -> None:
    scaling = RopeScaling(type="llama3", factor=8, original_seq_length=32)
    stage, ours = _stage(n_kv_heads=K, rope_theta=500000.0, rope_scaling=scaling, tie_embeddings=tied)
    rope = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    theirs = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "tie_word_embeddings": tied}, rope_parameters=rope))
    _assert_same_logits(stage, theirs, _llama_names(ours))


def test_qwen3() -> None:
    stage, ours = _stage(n_kv_heads=K, qk_norm=True)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    _assert_same_logits(stage, Qwen3ForCausalLM(Qwen3Config(**LLAMA, rope_parameters=rope)), _llama_names(ours))


@pytest.mark.parametrize(("activation", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
def test_gpt2(activation: str, theirs: str) -> None:
    stage, ours = _stage(norm="layernorm", activation=activation, position="learned", bias=True, tie_embeddings=True)
    config = GPT2Config(
        n_embd=H, n_layer=LAYERS, n_head=N, n_inner=F, vocab_size=V, n_positions=64, activation_function=theirs
    )
    _assert_same_logits(stage, GPT2LMHeadModel(config), _gpt2_names(ours))
