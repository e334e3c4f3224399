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
