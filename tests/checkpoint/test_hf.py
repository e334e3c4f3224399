"""Against transformers: its models open as ours and ours as its, bit for bit, and both compute the same logits."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import LLAMA3, MODELS, make, our_logits, saved, tensors_of
from ranks_and_models import logical_tensors, tiny_config, write_checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file

from megascratch.checkpoint import convert, describe, read_state
from megascratch.errors import CheckpointError
from megascratch.tokenizer import train_from_texts


def test_our_own_checkpoint_computes_the_same_there(tmp_path: Path, console: Console) -> None:
    """A checkpoint with optimizer state, saved by us: transformers computes our logits from its weights."""
    config = tiny_config(rope_scaling={"type": "llama3", "factor": 4.0, "original_seq_length": 16})
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config))
    folder = convert(path, tmp_path / "hf", to="hf", console=console)
    tokens = torch.randint(0, 33, (2, 32), generator=torch.Generator().manual_seed(1))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(our_logits(path, tokens), expected, rtol=0, atol=1e-5 * expected.std().item())
    assert model.config.max_position_embeddings == 64


def test_the_config_reads_in_both_generations_of_keys(tmp_path: Path, console: Console) -> None:
    family, changes = MODELS["llama3 scaling"]
    saved(tmp_path / "theirs", family, changes)
    ours = convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    config = json.loads((convert(ours, tmp_path / "back", to="hf", console=console) / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    for kept in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        folder = tmp_path / "-".join(kept)
        saved(folder, family, changes)
        rope = ("rope_parameters", "rope_theta", "rope_scaling")
        left = {key: value for key, value in config.items() if key not in rope or key in kept}
        (folder / "config.json").write_text(json.dumps(left))
        again = convert(folder, folder.with_suffix(".ours"), console=console)
        assert read_state(again)["config"]["model"] == read_state(ours)["config"]["model"]


def test_sharded_both_ways(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "theirs", "Llama", {}, max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours = convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    monkeypatch.setattr(importlib.import_module("megascratch.checkpoint.hf"), "LARGEST_FILE_BYTES", 30_000)
    back = convert(ours, tmp_path / "back", to="hf", console=console)
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
    ours = convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    assert {record.dtype for record in describe(ours).tensors.values()} == {"BF16"}
    assert describe(ours).config["train"]["dtype"] == "bf16"
    back = convert(ours, tmp_path / "back", to="hf", console=console)
    assert transformers.AutoConfig.from_pretrained(back).dtype == torch.bfloat16


def test_the_tokenizer_goes_along(tmp_path: Path, console: Console) -> None:
    tokenizer = train_from_texts(["a small text about small texts"] * 4, 262)
    tokenizer.save(tmp_path / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size + 3)
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    folder = convert(path, tmp_path / "hf", tokenizer=tmp_path / "tokenizer", to="hf", console=console)
    text = "texts about a small text"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eod_id
    again = convert(folder, tmp_path / "again", console=console)
    assert read_state(again)["config"]["data"]["tokenizer"] == str(tmp_path / "again" / "tokenizer.json")
    once_more = convert(again, tmp_path / "once_more", to="hf", console=console)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (once_more / name).read_bytes() == (folder / name).read_bytes()

    small = tiny_config(vocab_size=100)
    path = write_checkpoint(tmp_path / "small", small, logical_tensors(small, optimizer=False))
    with pytest.raises(CheckpointError, match=r"has \d+ ids, the model has 100"):
        convert(path, tmp_path / "no", tokenizer=tmp_path / "tokenizer", to="hf", console=console)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"norm": "layernorm"}, "model.norm = layernorm +must be rmsnorm in llama"),
        ({"position": "learned"}, "model.position = learned +must be rope in llama"),
        ({"activation": "gelu"}, "model.activation = gelu +must be swiglu in llama"),
        ({"norm_position": "post"}, "model.norm_position = post +must be pre in llama"),
        ({"qk_norm": True, "bias": True}, "model.qk_norm = true +must be false in llama"),
        ({"logit_softcap": 3.0}, r"model.logit_softcap = 3.0 +must be none in llama"),
    ],
)
def test_models_that_no_family_expresses_are_refused(
    tmp_path: Path, console: Console, model: dict[str, Any], message: str
) -> None:
    config = tiny_config(**model)
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "hf", to="hf", console=console)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type = bert +is not a family that can be read: llama, mistral, qwen2, qwen3"),
        ({"model_type": "gpt2"}, "n_embd +must be given, as a number"),
        ({"model_type": "gemma2", "hidden_act": "silu"}, "tensor model.layers.0.post_feedforward_layernorm.weight +is"),
        (
            {"model_type": "gemma2", "layer_types": [*["full_attention"] * 2, "sliding_attention"]},
            "every n-th layer sees",
        ),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern = 0 +must be a number"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "olmo2", "attention_bias": True}, "attention_bias = True +must be False"),
        ({"model_type": "deepseek_v3", "rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 +must be 1e-06"),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave = False +must be True"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] +layers with experts follow"),
        ({"model_type": "mixtral"}, "num_local_experts +must be given, as a number"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu +must be silu"),
        ({"attention_bias": True}, "attention_bias = true, mlp_bias = false +biases are on every linear layer here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* must be None"),
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
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    assert not (tmp_path / "ours").exists()


def test_pickles_are_refused(tmp_path: Path, console: Console) -> None:
    saved(tmp_path / "theirs", "Llama", {})
    (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"are pickles, .* +save it with transformers"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)


def test_damaged_folders_are_refused(tmp_path: Path, console: Console) -> None:
    theirs = tmp_path / "theirs"
    saved(theirs, "Llama", {}, max_shard_size="20KB")
    file = sorted(theirs.glob("model-*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} +is damaged"):
        convert(theirs, tmp_path / "ours", console=console)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} +is missing"):
        convert(theirs, tmp_path / "ours", console=console)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"must name \*.safetensors files in the folder itself"):
        convert(theirs, tmp_path / "ours", console=console)
    (theirs / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json +is not JSON"):
        convert(theirs, tmp_path / "ours", console=console)
    with pytest.raises(CheckpointError, match=r"config.json +cannot be read"):
        convert(tmp_path / "nothing", tmp_path / "ours", from_="hf", console=console)


def test_integer_weights_are_refused(tmp_path: Path, console: Console) -> None:
    saved(tmp_path / "theirs", "Llama", {})
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(32, dtype=torch.int8)}, file)
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight +is torch.int8, a quantised"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)


def _header(file: Path, length: int, text: str) -> None:
    file.write_bytes(length.to_bytes(8, "little") + text.encode() + b"\0" * 64)


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (2**62, "{}"),
        (2, "[]"),
        (4000, "{}"),
        (0, json.dumps({n: {"dtype": "F32", "shape": [4], "data_offsets": [n * 8, n * 8 + 16]} for n in (0, 1)})),
        (0, '{"a": {"dtype": "F32", "shape": [1073741824, 1073741824, 64], "data_offsets": [0, 64]}}'),
        (0, '{"a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}'),
        (0, '{"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 64]}}'),
        (0, "{" * 100_000),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, console: Console, length: int, text: str) -> None:
    """Sizes that no file has, no table, ends beyond the file, overlaps, sizes that overflow, unknown types, depth."""
    saved(tmp_path / "theirs", "Llama", {})
    _header(tmp_path / "theirs" / "model.safetensors", length or len(text), text)
    with pytest.raises(CheckpointError, match=r"model.safetensors +is damaged"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    assert not (tmp_path / "ours").exists()


def test_dtype_and_layout_on_the_way_in_and_out(tmp_path: Path, console: Console) -> None:
    theirs = saved(tmp_path / "theirs", "Llama", {})
    ours = convert(tmp_path / "theirs", tmp_path / "ours", tp=2, pp=3, dtype="bf16", console=console)
    assert describe(ours).layout == {"pp": 3, "dp": 1, "cp": 1, "tp": 2}
    back = convert(ours, tmp_path / "back", to="hf", dtype="fp16", console=console)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensors_of(back)[name], tensor.bfloat16().half())
    assert transformers.AutoConfig.from_pretrained(back).dtype == torch.float16


def test_the_family_can_be_chosen(tmp_path: Path, console: Console) -> None:
    config = tiny_config()
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    for family, architecture in (("mistral", "MistralForCausalLM"), ("phi3", "Phi3ForCausalLM")):
        folder = convert(path, tmp_path / family, to="hf", family=family, console=console)
        assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    with pytest.raises(CheckpointError, match=r"model.qk_norm = false +must be true in olmo2"):
        convert(path, tmp_path / "olmo2", to="hf", family="olmo2", console=console)
    with pytest.raises(CheckpointError, match=r"family = bert +must be one of llama, mistral"):
        convert(path, tmp_path / "bert", to="hf", family="bert", console=console)


def test_a_bare_gpt2_of_the_hub_is_read(tmp_path: Path, console: Console) -> None:
    """Its names lack `transformer.`, and its masks stand among the weights."""
    theirs = saved(tmp_path / "theirs", *MODELS["gpt2"])
    file = tmp_path / "theirs" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, file, {"format": "pt"})
    ours = convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    tokens = torch.randint(0, 67, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens), theirs(tokens).logits, rtol=0, atol=2e-5)
