"""`generate` and `eval`: what a saved model says, on one rank and on several, and how wrong requests end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Run
from saved_models import TEXTS, save_model, tokenizer

from megascratch.data.writer import IndexedDatasetWriter
from megascratch.evals import evaluate
from megascratch.infer import generate_text
from megascratch.log import make_console

OPTIONS = ("--prompt", "def ", "--max-tokens", "20", "--temperature", "0.8", "--top-k", "40", "--seed", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run"))


def _expected(checkpoint: Path) -> str:
    return "def " + "".join(generate_text(checkpoint, "def ", max_tokens=20, temperature=0.8, top_k=40, seed=3)) + "\n"


def test_generate_prints_prompt_and_completion(run: Run, checkpoint: Path) -> None:
    finished = run("generate", str(checkpoint), *OPTIONS)
    assert (finished.code, finished.out) == (0, _expected(checkpoint))


def test_generate_starts_its_ranks_and_only_one_prints(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "megascratch", "generate", str(checkpoint), *OPTIONS, "--tp", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout) == (0, _expected(checkpoint)), finished.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "#!" * 32), "a prompt of 64 tokens"),
        (("--prompt", "x", "--top-p", "0"), "top_p = 0.0"),
        (("--prompt", "x", "--tokenizer", "nowhere.json"), "nowhere.json"),
    ],
)
def test_wrong_requests_print_nothing_but_the_problem(
    run: Run, checkpoint: Path, options: tuple[str, ...], message: str
) -> None:
    finished = run("generate", str(checkpoint), *options)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err
    assert "Traceback" not in finished.err


def test_eval_prints_what_evaluate_finds(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "text", np.dtype("<u2")) as writer:
        for text in TEXTS:
            writer.add_document(tokenizer().encode(text))
    result = evaluate(checkpoint, tmp_path / "text", console=make_console(1))
    finished = run("eval", str(checkpoint), "--data", str(tmp_path / "text"))
    assert finished.code == 0
    assert f"{result.nats_per_token:.6f}" in finished.out
    assert f"{result.bits_per_byte:.6f}" in finished.out
    assert run("eval", str(checkpoint), "--data", str(tmp_path / "none")).code == 2


def test_eval_asks_questions_on_any_layout(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = ({"context": "with open", "choices": ["(path)", " große"], "answer": n % 2} for n in range(4))
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = run("eval", str(checkpoint), "--questions", str(questions))
    assert (finished.code, finished.out.split()) == (
        0,
        ["questions", "4", "accuracy", "0.5000", "accuracy_norm", "0.5000"],
    )
    command = [sys.executable, "-m", "megascratch", "eval", str(checkpoint), "--questions", str(questions), "--dp", "2"]
    several = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (several.returncode, several.stdout) == (0, finished.out), several.stderr
    assert "one of them must be given" in run("eval", str(checkpoint)).err
