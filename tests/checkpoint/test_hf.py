"""Against transformers: its models open as ours and ours as its, bit for bit, and both compute the same logits."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ranks_and_models import logical_tensors, tiny_config, write_checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from megascratch.checkpoint import Shard, describe, from_hf, load, read_state, to_hf
from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import extents, spec_of
from megascratch.dist.mesh import Axis
from megascratch.errors import CheckpointError
from megascratch.nn import Placement, SequenceInfo, Stage
from megascratch.tokenizer import train_from_texts

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
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
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
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def saved(path: Path, family: str, changes: dict[str, Any], **options: Any) -> Any:
    model = make(family, changes)
    model.save_pretrained(path, **options)
    return model


def our_model(path: Path) -> tuple[Config, Stage]:
    config = config_from_dict(read_state(path)["config"])
    stage = Stage(config.model, Placement(Axis("tp"), False, torch.float32, torch.device("cpu"))).eval()
    for parameter in stage.parameters():
        spec = spec_of(parameter)
        load(path, [Shard(spec.name, spec.shape, parameter, extents(spec, {}, {}))])
    return config, stage


def our_logits(path: Path, tokens: Tensor) -> Tensor:
    """Return [b, s, v], without the padding of the vocabulary."""
    config, stage = our_model(path)
    with torch.no_grad():
        logits = stage(None, tokens, SequenceInfo(length=tokens.shape[1])).transpose(0, 1)
    return logits[..., : config.model.vocab_size]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, console: Console, name: str) -> None:
    family, changes = MODELS[name]
    theirs = saved(tmp_path / "theirs", family, changes)
    ours = from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)
    back = to_hf(ours, tmp_path / "back", console=console)

    before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        reread = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
        assert torch.equal(reread(tokens).logits, expected)
    torch.testing.assert_close(our_logits(ours, tokens), expected, rtol=0, atol=1e-5 * expected.std().item())
    opened_as = {"mistral": "LlamaForCausalLM"}.get(name, type(theirs).__name__)  # without a window the two are one
    assert type(reread).__name__ == opened_as


def test_our_own_checkpoint_computes_the_same_there(tmp_path: Path, console: Console) -> None:
    """A checkpoint with optimizer state, saved by us: transformers computes our logits from its weights."""
    config = tiny_config(rope_scaling={"type": "llama3", "factor": 4.0, "original_seq_length": 16})
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config))
    folder = to_hf(path, tmp_path / "hf", console=console)
    tokens = torch.randint(0, 33, (2, 32), generator=torch.Generator().manual_seed(1))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(our_logits(path, tokens), expected, rtol=0, atol=1e-5 * expected.std().item())
    assert model.config.max_position_embeddings == 64


def test_the_config_reads_in_both_generations_of_keys(tmp_path: Path, console: Console) -> None:
    family, changes = MODELS["llama3 scaling"]
    saved(tmp_path / "theirs", family, changes)
    ours = from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)
    config = json.loads((to_hf(ours, tmp_path / "back", console=console) / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    for kept in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        folder = tmp_path / "-".join(kept)
        saved(folder, family, changes)
        rope = ("rope_parameters", "rope_theta", "rope_scaling")
        left = {key: value for key, value in config.items() if key not in rope or key in kept}
        (folder / "config.json").write_text(json.dumps(left))
        again = from_hf(folder, folder.with_suffix(".ours"), console=console)
        assert read_state(again)["config"]["model"] == read_state(ours)["config"]["model"]


def test_sharded_both_ways(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "theirs", "Llama", {}, max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours = from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)
    monkeypatch.setattr(importlib.import_module("megascratch.checkpoint.hf"), "LARGEST_FILE_BYTES", 30_000)
    back = to_hf(ours, tmp_path / "back", console=console)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    before = tensors_of(tmp_path / "theirs")
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in before.values())
    assert len(set(index["weight_map"].values())) > 2
    assert all(file.stat().st_size < 31_000 for file in back.glob("model-*.safetensors"))
    reread = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert all(torch.equal(before[name], tensor) for name, tensor in reread.state_dict().items())


def test_bfloat16_stays_bfloat16(tmp_path: Path, console: Console) -> None:
    make("Llama", {}).bfloat16().save_pretrained(tmp_path / "theirs")
    ours = from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)
    assert {record.dtype for record in describe(ours).tensors.values()} == {"BF16"}
    assert describe(ours).config["train"]["dtype"] == "bf16"
    back = to_hf(ours, tmp_path / "back", console=console)
    assert transformers.AutoConfig.from_pretrained(back).dtype == torch.bfloat16


def test_the_tokenizer_goes_along(tmp_path: Path, console: Console) -> None:
    tokenizer = train_from_texts(["a small text about small texts"] * 4, 262)
    tokenizer.save(tmp_path / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size + 3)
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    folder = to_hf(path, tmp_path / "hf", tmp_path / "tokenizer", console=console)
    text = "texts about a small text"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eod_id
    again = from_hf(folder, tmp_path / "again", console=console)
    assert read_state(again)["config"]["data"]["tokenizer"] == str(folder / "tokenizer.json")

    small = tiny_config(vocab_size=100)
    path = write_checkpoint(tmp_path / "small", small, logical_tensors(small, optimizer=False))
    with pytest.raises(CheckpointError, match=r"has \d+ ids, the model has 100"):
        to_hf(path, tmp_path / "no", tmp_path / "tokenizer", console=console)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"norm": "layernorm"}, "model.norm = layernorm +llama, mistral, qwen2, qwen3, .* have norm = rmsnorm"),
        ({"position": "learned"}, "model.position = learned .*have position = rope"),
        ({"activation": "gelu"}, "model.activation = gelu .*have activation = swiglu"),
        ({"norm_position": "post"}, "model.norm_position = post .*have norm_position = pre"),
        ({"qk_norm": True, "bias": True}, "no family has both"),
    ],
)
def test_models_that_no_family_expresses_are_refused(
    tmp_path: Path, console: Console, model: dict[str, Any], message: str
) -> None:
    config = tiny_config(**model)
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    with pytest.raises(CheckpointError, match=message):
        to_hf(path, tmp_path / "hf", console=console)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = gpt2 +is not a family that can be read: llama, mistral, qwen2, qwen3"),
        ({"model_type": "deepseek_v3", "rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 +must be 1e-06"),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave = False +must be True"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] +layers with experts follow"),
        ({"model_type": "mixtral"}, "num_local_experts +must be given, as a number"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu +must be silu"),
        ({"attention_bias": True}, "attention_bias = true, mlp_bias = false +biases are on every linear layer here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* must be None"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096 +must be None"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = dynamic +must be default, linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "rope_type = yarn"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor +must be 1"),
        ({"num_hidden_layers": None}, "num_hidden_layers +must be given"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 +is more than a folder of 30 tensors"),
        ({"hidden_size": 40}, r"tensor model.embed_tokens.weight +is torch.float32 \[67, 32\], config.json asks for"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.input_layernorm.weight +is not in the folder"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2.input_layernorm.weight +has no place"),
    ],
)
def test_folders_that_cannot_be_ours_are_refused(
    tmp_path: Path, console: Console, changes: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "theirs", "Llama", {})
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)
    assert not (tmp_path / "ours").exists()


def test_pickles_are_refused(tmp_path: Path, console: Console) -> None:
    saved(tmp_path / "theirs", "Llama", {})
    (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"are pickles, .* +save it with transformers"):
        from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)


def test_damaged_folders_are_refused(tmp_path: Path, console: Console) -> None:
    theirs = tmp_path / "theirs"
    saved(theirs, "Llama", {}, max_shard_size="20KB")
    file = sorted(theirs.glob("model-*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} +is damaged"):
        from_hf(theirs, tmp_path / "ours", console=console)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} +is missing"):
        from_hf(theirs, tmp_path / "ours", console=console)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"must name \*.safetensors files in the folder itself"):
        from_hf(theirs, tmp_path / "ours", console=console)
    (theirs / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json +is not JSON"):
        from_hf(theirs, tmp_path / "ours", console=console)
    with pytest.raises(CheckpointError, match=r"config.json +cannot be read"):
        from_hf(tmp_path / "nothing", tmp_path / "ours", console=console)


def test_integer_weights_are_refused(tmp_path: Path, console: Console) -> None:
    saved(tmp_path / "theirs", "Llama", {})
    save_file({"model.norm.weight": torch.ones(3, dtype=torch.int8)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight +is I8, a quantised or integer weight"):
        from_hf(tmp_path / "theirs", tmp_path / "ours", console=console)
