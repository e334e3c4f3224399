"""What tests of alignment share: a small tokenizer, records, recipes."""

import json
from pathlib import Path
from typing import Any

from megascratch.config import Config, config_from_dict
from megascratch.tokenizer import Tokenizer, train_from_texts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of 300 ids, ChatML's marks among them."""
    texts = ["what is the number of a word? the answer is seven. " * 3, "user assistant system"]
    file = folder / "tokenizer.json"
    train_from_texts(texts, vocab_size=300, special_tokens=SPECIAL).save(file)
    return file


def open_saved(file: Path) -> Tokenizer:
    return Tokenizer.from_file(file)


def write_records(path: Path, records: list[Any]) -> Path:
    """Write JSON Lines; a string is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    """Return messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def recipe(tokenizer: Path, records: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    """Return the configuration of a small run of 4 steps in float64."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"n_layers": 2, "hidden": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden": 48, "vocab_size": 300},
        "data": {"paths": [str(records)], "seq_length": 64, "split": "80,20,0", "tokenizer": str(tokenizer)},
        "train": {"steps": 4, "global_batch": 4, "dtype": "fp64"},
        "optim": {"lr": 0.01},
        "eval": {"batches": 1},
        "log": {"dir": str(folder / "run"), "tensorboard": False},
        "chat": {"template": "chatml"},
    }
    for section, keys in sections.items():
        raw[section] = {**raw.get(section, {}), **keys}
    return config_from_dict(raw)


# Ways of training as (verb, sections besides); every kind of reference is among them.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "reward": ("reward", {"reward": {"center_coeff": 0.1}, "model": {"head": "scalar"}}),
    "dpo": ("dpo", {"dpo": {"loss": "sigmoid", "sft_coeff": 0.2, "cross_entropy": "token"}}),
    "kto": ("dpo", {"dpo": {"loss": "kto", "reference": "live"}}),
    "lora": ("dpo", {"dpo": {"loss": "ipo", "reference": "base"}, "lora": {"rank": 4, "alpha": 64.0}}),
}
# Adapters beside weights in 4 bits, whose blocks need larger matrices; of experts too.
ADAPTED = {"rank": 4, "alpha": 64.0, "base": "nf4"}
LARGE = {"hidden": 128, "ffn_hidden": 128}
EXPERTS = {
    "num_experts": 4,
    "router_topk": 2,
    "ffn_hidden": 128,
    "router_load_balancing_type": "seq_aux_loss",
    "aux_loss_coeff": 0.1,
}
PACKED_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora": ("dpo", {"lora": ADAPTED, "model": LARGE}),
    "experts": (
        "sft",
        {"lora": {**ADAPTED, "targets": ["attn.qkv", "mlp.experts.*"]}, "model": {**LARGE, "moe": EXPERTS}},
    ),
}
WAYS_AND_PACKED = {**WAYS, **PACKED_WAYS}


def write_way(way: str, folder: Path) -> Path:
    """Write records that a way of training reads, of answers as unequal as may be."""
    words = ["one", "two words", "the number seven", "eight", "a word or two of it"]
    records: list[Any] = []
    for i in range(20):
        prompt, first, second = f"what {'is ' * (i % 3)}{i}? ", words[i % 5], words[(i + 2) % 5]
        if WAYS_AND_PACKED[way][0] == "sft":
            records.append({"prompt": prompt, "completion": first})
        elif way == "kto":
            records.append({"prompt": prompt, "completion": first, "label": i % 3 > 0})
        else:
            records.append({"prompt": prompt, "chosen": first, "rejected": second, "margin": 0.1 * (i % 4)})
    return write_records(folder / f"{way}.jsonl", records)


def way_config(way: str, tokenizer: Path, records: Path, folder: Path, packing: bool, **sections: Any) -> Config:
    """Return a recipe of a few float64 steps; unpacked, a micro-batch holds whole pairs."""
    given = dict(WAYS_AND_PACKED[way][1])
    model = {"n_heads": 4, "n_kv_heads": 2, "init_std": 0.1, **given.pop("model", {}), **sections.pop("model", {})}
    optim = {"lr": 0.01, "warmup_steps": 2, "clip": 0.5, "bucket_numel": 4000, "eps": 1e-4}
    return recipe(
        tokenizer,
        records,
        folder,
        model=model,
        data={"seq_length": 48},
        train={"global_batch": 8, "micro_batch": 2, **sections.pop("train", {})},
        optim=optim,
        chat={"template": "plain", "packing": packing},
        **given,
        **sections,
    )
