"""Pretraining and what follows it, through the command line: a run, its end, its checkpoint, and what is refused."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Files, Run

RECIPE = """
[model]
preset = "tiny"
n_layers = 2
hidden = 32
n_heads = 4
n_kv_heads = 2
ffn_hidden = 64
[data]
paths = ["{dataset}"]
tokenizer = "{tokenizer}"
seq_length = 32
split = "90,10,0"
[train]
steps = 4
global_batch = 4
dtype = "fp32"
[eval]
batches = 2
[log]
dir = "{folder}/run"
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a verb in a process of its own: a run sets signal handlers."""
    command = [sys.executable, "-m", "megascratch", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def write_recipe(folder: Path, files: Files) -> Path:
    recipe = folder / "run.toml"
    recipe.write_text(RECIPE.format(dataset=files.dataset, tokenizer=files.tokenizer, folder=folder))
    return recipe


@pytest.fixture
def recipe(tmp_path: Path, files: Files) -> Path:
    return write_recipe(tmp_path, files)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Path:
    """Return the folder of a run of four steps on one rank; its tokenizer decides the vocabulary."""
    folder = tmp_path_factory.mktemp("trained")
    process = start("pretrain", write_recipe(folder, files))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, ""), err
    return folder


def test_run_directory_holds_what_it_should(trained: Path) -> None:
    assert [record["step"] for record in records(trained)] == [1, 2, 3, 4]
    assert abs(records(trained)[0]["loss"] - math.log(300)) < 0.2
    assert records(trained)[-1]["valid_loss"] > 0
    assert "vocab_size = 300\n" in (trained / "run/config.toml").read_text()
    assert (trained / "run/checkpoints/latest").exists()
    assert list((trained / "run/tensorboard").iterdir())


def test_inspect_a_checkpoint(run: Run, trained: Path) -> None:
    shown = run("inspect", trained / "run/checkpoints", "--verify")
    assert shown.code == 0
    assert re.search(r"step +4, 16 samples consumed", shown.out)
    assert re.search(r"embed\.weight +F32 +300 × 32\n", shown.out)
    assert "all checksums match" in shown.out


def test_convert_generate_and_eval(run: Run, trained: Path, files: Files, tmp_path: Path) -> None:
    converted = run("convert", trained / "run/checkpoints", tmp_path / "tp2", "--tp", 2, "--weights-only")
    assert converted.code == 0
    assert converted.out.startswith(f"{tmp_path / 'tp2'}: ")
    assert run("convert", trained / "run/checkpoints", tmp_path / "hf", "--to", "hf").code == 0
    assert (tmp_path / "hf/tokenizer.json").exists()
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--from", "hf").code == 0

    prompt = ["--prompt", "def read", "--max-tokens", 8, "--seed", 3]
    completions = [run("generate", folder, *prompt) for folder in (tmp_path / "tp2", tmp_path / "back")]
    assert [finished.code for finished in completions] == [0, 0]
    assert completions[0].out.startswith("def read")
    assert completions[0].out == completions[1].out

    window = ["--data", files.dataset, "--seq-length", 32]
    evaluated = [run("eval", folder, *window) for folder in (trained / "run/checkpoints", tmp_path / "back")]
    assert evaluated[0].code == 0
    assert evaluated[0].out == evaluated[1].out
    nats = float(re.search(r"nats/token +([\d.]+)", evaluated[0].out)[1])  # type: ignore[index]
    perplexity = float(re.search(r"perplexity +([\d.]+)", evaluated[0].out)[1])  # type: ignore[index]
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-4)


def test_convert_refuses_to_overwrite(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    finished = run("convert", trained / "run/checkpoints", tmp_path / "mine")
    assert (finished.code, finished.out) == (2, "")
    assert "exist" in finished.err
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hf", "--tp", "2"], "--tp  has no meaning for --to hf"),
        (["--from", "hf", "--tokenizer", "x"], "--tokenizer  has no meaning for --to megascratch"),
        ([], "nothing"),
    ],
)
def test_convert_refuses(run: Run, options: list[str], message: str) -> None:
    finished = run("convert", "nothing", "nowhere", *options)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err


def test_flipped_byte_is_one_message(run: Run, trained: Path, tmp_path: Path) -> None:
    run("convert", trained / "run/checkpoints", tmp_path / "damaged", "--weights-only")
    file = next((tmp_path / "damaged").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    for verb in (["inspect", "--verify"], ["generate", "--prompt", "x"]):
        finished = run(*verb, tmp_path / "damaged")
        assert finished.code == 2
        assert "Traceback" not in finished.err
        assert file.name in finished.err


def test_missing_piece_is_one_message(run: Run, trained: Path, tmp_path: Path) -> None:
    run("convert", trained / "run/checkpoints", tmp_path / "holed", "--weights-only")
    file = next((tmp_path / "holed").glob("*.safetensors"))
    file.unlink()
    finished = run("generate", "--prompt", "x", tmp_path / "holed")
    assert (finished.code, finished.out) == (2, "")
    assert "Traceback" not in finished.err
    assert file.name in finished.err


def test_stop_file_saves_and_exits_with_75_and_the_same_command_resumes(recipe: Path) -> None:
    folder = recipe.parent
    many = [recipe, "train.steps=100000", "eval.every=0"]
    process = start("pretrain", *many)
    deadline = time.monotonic() + 60
    while not (folder / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder / "run/stop").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    done = int(records(folder)[-1]["step"])
    assert f"step_{done:08d}" in (folder / "run/checkpoints/latest").read_text()

    process = start("pretrain", *many, f"train.stop_step={done + 2}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [record["step"] for record in records(folder)][done - 1 :] == [done, done + 1, done + 2]


def test_error_met_by_every_rank_is_told_once(recipe: Path) -> None:
    process = start("pretrain", recipe, "parallel.tp=2", "data.split=99.9,0.1,0", "data.seq_length=1024")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert len(err.splitlines()) == 2, err
    assert "not enough for one sample of data.seq_length + 1 = 1,025 tokens" in err
    assert not (recipe.parent / "run").exists()


def test_all_missing_files_are_told_before_any_work(run: Run, recipe: Path, files: Files) -> None:
    finished = run("pretrain", recipe, 'data.paths=["nothing", "nowhere"]', "data.tokenizer=nobody.json")
    assert (finished.code, finished.out) == (2, "")
    assert finished.err.startswith(f"5 problems in {recipe}\n")
    assert "dataset nothing: nothing.bin  no such file" in finished.err
    assert "nobody.json" in finished.err
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.paths=[]", r"data\.paths +names no dataset +give the prefixes that preprocess printed"),
        ("model.vocab_size=100", r"model\.vocab_size = 100 +must be at least the tokenizer's 300"),
        ("train.stesp=1", r"train\.stesp +is not a known key +did you mean steps\?"),
        ("parallel.tp=3", r"parallel\.tp = 3 +must divide model\.n_heads = 4"),
    ],
)
def test_wrong_recipe(run: Run, recipe: Path, override: str, message: str) -> None:
    finished = run("pretrain", recipe, override)
    assert (finished.code, finished.out) == (2, "")
    assert re.search(message, finished.err)


def test_vocabulary_must_come_from_somewhere(run: Run, recipe: Path) -> None:
    recipe.write_text(re.sub(r"tokenizer = .*", "", recipe.read_text()))
    assert "model.vocab_size  must be given  set it, or set data.tokenizer" in run("pretrain", recipe).err


def test_wrong_world_size_is_told_by_rank_0_alone(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    finished = run("pretrain", recipe, "parallel.tp=2")
    assert finished.code == 2
    assert "world size = 3  must divide by tp 2 × pp 1 × cp 1 = 2  start 2 or 4 ranks" in finished.err
    monkeypatch.setenv("RANK", "1")
    finished = run("pretrain", recipe, "parallel.tp=2")
    assert (finished.code, finished.err) == (2, "")


def test_token_outside_the_vocabulary(run: Run, recipe: Path) -> None:
    recipe.write_text(re.sub(r"tokenizer = .*", "", recipe.read_text()))
    finished = run("pretrain", recipe, "model.vocab_size=299")
    assert (finished.code, finished.out) == (2, "")
    assert "token id 299 in document 0  must be 0 to 298, as model.vocab_size = 299" in finished.err
    assert not (recipe.parent / "run").exists()


def test_all_data_may_be_for_training(recipe: Path) -> None:
    process = start("pretrain", recipe, "data.split=100,0", "train.steps=1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "valid_loss" not in records(recipe.parent)[0]
