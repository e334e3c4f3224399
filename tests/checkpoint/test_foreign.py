"""Files of other software with random damage: each ends in one clear error, or in the same model; nothing else."""

import json
import random
import shutil
from pathlib import Path

import pytest
from hf_models import MODELS, saved
from ranks_and_models import logical_tensors, tiny_config, write_checkpoint
from rich.console import Console

from megascratch.checkpoint import convert
from megascratch.checkpoint.convert import Format
from megascratch.errors import UserError

N_DAMAGES = 40
# By format: the files whose first bytes say what all others are.
TABLES: dict[Format, tuple[str, ...]] = {
    "hf": ("config.json", "model.safetensors"),
    "dcp": (".metadata", "config.json"),
    "megatron": ("release/mp_rank_00/model_optim_rng.pt",),
    "megatron-dist": ("release/.metadata", "release/common.pt"),
}


def _damaged(data: bytes, source: random.Random) -> bytes:
    """Flip, drop, repeat or overwrite some of the first bytes."""
    at, length = source.randrange(min(len(data), 4000)), source.randrange(1, 9)
    part = bytes(source.randrange(256) for _ in range(length))
    return source.choice(
        [
            data[:at] + part + data[at + length :],
            data[:at] + data[at + length :],
            data[:at] + data[at : at + length] + data[at:],
            data[:at],
            data[: len(data) - length],
        ]
    )


@pytest.mark.parametrize("format", TABLES)
def test_damage_is_told_or_harmless(tmp_path: Path, console: Console, format: Format) -> None:
    config = tiny_config()
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    folder = convert(path, tmp_path / "theirs", to=format, console=console)
    source = random.Random(format)
    for name in TABLES[format]:
        good = (folder / name).read_bytes()
        for n in range(N_DAMAGES):
            (folder / name).write_bytes(_damaged(good, source))
            try:
                convert(folder, tmp_path / f"out{n}", from_=format, console=console)
            except UserError:
                assert not (tmp_path / f"out{n}").exists()
            shutil.rmtree(tmp_path / f"out{n}", ignore_errors=True)
        (folder / name).write_bytes(good)
    convert(folder, tmp_path / "again", from_=format, console=console)


WRONG = (None, 0, -1, 2**70, 1.5, float("nan"), "x", [], {}, True, [1, 2], {"a": 1})


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "gpt2", "phi3", "mixtral", "deepseek", "llama3 scaling"])
def test_any_value_of_any_key_is_told_or_harmless(tmp_path: Path, console: Console, name: str) -> None:
    """A config.json of which one key says something else, of whatever kind."""
    saved(tmp_path / "theirs", *MODELS[name])
    file = tmp_path / "theirs" / "config.json"
    good = json.loads(file.read_text())
    source = random.Random(name)
    for key in good:
        file.write_text(json.dumps({**good, key: source.choice(WRONG)}))
        try:
            convert(tmp_path / "theirs", tmp_path / "ours", console=console)
        except UserError:
            assert not (tmp_path / "ours").exists()
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
