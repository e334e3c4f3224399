"""Supervised fine-tuning end to end: the verb, the run directory, starting from weights, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
from alignment import recipe, save_tokenizer, turns, write_records
from command_line import exit_code

from megascratch.align.dpo import preferences
from megascratch.align.reward import reward_model
from megascratch.align.sft import supervised
from megascratch.config import Config, to_toml
from megascratch.engine import train
from megascratch.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sft")
    words = ["one", "two", "seven", "eight"]
    records = [{"messages": turns(f"what is {i}?", words[i % 4])} for i in range(40)]
    return save_tokenizer(folder), write_records(folder / "chat.jsonl", records)


def _records(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.log.dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_saved_weights_learns_and_resumes(data: tuple[Path, Path], tmp_path: Path) -> None:
    base = recipe(*data, tmp_path / "base", train={"steps": 2})
    assert train(base, None, supervised) == 0
    start = {"init": str(tmp_path / "base/run/checkpoints")}
    straight = recipe(*data, tmp_path / "straight", checkpoint=start, train={"steps": 6})
    assert train(straight, None, supervised) == 0
    records = _records(straight)
    assert records[0]["step"] == 1, "a new run, whatever the steps of the weights it began with"
    assert records[0]["loss"] < _records(base)[0]["loss"], "it began with the weights"
    assert records[-1]["loss"] < records[0]["loss"]
    assert 0 <= records[-1]["mean_token_accuracy"] <= 1
    assert {"valid_loss", "valid_mean_token_accuracy"} <= records[-1].keys()
    assert (tmp_path / "straight/run/chat_template.jinja").is_file()
    parts = {"steps": 6, "stop_step": 3}
    assert train(recipe(*data, tmp_path / "parts", checkpoint=start, train=parts), None, supervised) == 0
    resumed = recipe(*data, tmp_path / "parts", checkpoint=start, train={"steps": 6})
    assert train(resumed, None, supervised) == 0
    assert [r["loss"] for r in _records(resumed)] == [r["loss"] for r in records]


def test_the_verb_takes_shape_and_tokenizer_of_its_start(
    data: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = recipe(*data, tmp_path / "base", train={"steps": 1, "dtype": "fp32"})
    file = tmp_path / "base.toml"
    file.write_text(to_toml(base))
    assert exit_code("sft", file) == 0
    arguments = [
        f"data.paths=['{data[1]}']",
        "data.seq_length=64",
        "train.steps=1",
        "train.dtype=fp32",
        f"checkpoint.init={tmp_path}/base/run/checkpoints",
        f"log.dir={tmp_path}/next",
        "chat.template=chatml",
    ]
    assert exit_code("sft", *arguments) == 0
    capfd.readouterr()
    assert exit_code("sft", "--preview", 1, *arguments) == 0
    assert "tokens, 5 learned" in capfd.readouterr().out
    assert exit_code("sft", *arguments[1:]) == 2
    assert "data.paths" in capfd.readouterr().err


def test_what_does_not_go_together_is_told_before_training(data: tuple[Path, Path], tmp_path: Path) -> None:
    experts = {"num_experts": 4, "ffn_hidden": 24, "aux_loss_coeff": 0.1, "router_load_balancing_type": "aux_loss"}
    for method, sections, message in (
        (preferences, {"chat": {"packing": False}}, r"micro_batch = 1 +must be even: without packing, a pair is two"),
        (preferences, {"model": {"moe": experts}}, r"aux_loss_coeff = 0\.1 +weighs tokens, and a loss of answers"),
        (reward_model, {"model": {"mtp_num_layers": 1}}, r"mtp_num_layers = 1 +predicts tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(recipe(*data, tmp_path, **sections), None, method)
    assert not (tmp_path / "run").exists()


def test_tokens_further_ahead_are_learned_too(data: tuple[Path, Path], tmp_path: Path) -> None:
    config = recipe(*data, tmp_path, model={"mtp_num_layers": 1}, train={"steps": 2})
    assert train(config, None, supervised) == 0
    assert _records(config)[0]["mtp_loss"] > 0
