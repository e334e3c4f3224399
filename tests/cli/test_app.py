"""How verbs end: exit codes, one message without a traceback, and answers before torch is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Run

import megascratch.cli.config as config_verb
from megascratch import __version__

VERBS = ("tokenizer", "preprocess", "merge", "pretrain", "convert", "generate", "eval", "inspect", "config")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_lists_the_verbs(run: Run) -> None:
    finished = run("--help")
    assert finished.code == 0
    assert all(verb in finished.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run: Run, verb: str) -> None:
    finished = run(verb, "--help")
    assert finished.code == 0
    assert verb in finished.out


def test_version(run: Run) -> None:
    assert run("--version").out == f"megascratch {__version__}\n"


def test_python_dash_m_is_the_same_command() -> None:
    finished = python("-m", "megascratch", "config", "model.preset=tini")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        "1 problem in the command line\n  model.preset = tini  is not a known preset  did you mean tiny?\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["config", "model.preset=tiny"],
        ["config", "model.preset=tini"],
        ["config", "--list-presets"],
        ["tokenizer", "train", "--vocab-size", "300", "--output", "nowhere.json", "nothing.jsonl"],
        ["inspect", "nothing"],
        ["merge", "nothing", "--output-prefix", "nowhere"],
        ["convert", "a", "b", "--to", "hf", "--tp", "2"],
    ],
)
def test_answers_without_loading_torch(arguments: list[str]) -> None:
    program = (
        "import sys, megascratch.cli\n"
        f"try: megascratch.cli.main({arguments!r})\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    finished = python("-c", program)
    assert "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "No such command 'pretrian'. Did you mean 'pretrain'"),
        (["preprocess"], "Missing option"),
        (["merge", "a", "--output-prefx", "b"], "No such option"),
        (["generate", "x", "--prompt", "y", "--top-p", "2"], "--top-p"),
        (["config", "a.toml", "b.toml"], "one recipe at most"),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str], message: str) -> None:
    finished = run(*arguments)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err
    assert "Traceback" not in finished.err


def test_no_verb_shows_the_help_and_exits_with_2(run: Run) -> None:
    finished = run()
    assert finished.code == 2
    assert "pretrain" in finished.out + finished.err


def test_interrupt_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config_verb, "_print_presets", interrupted)
    assert run("config", "--list-presets").code == 130


def test_a_fault_of_ours_has_a_traceback_and_exits_with_1() -> None:
    program = (
        "import megascratch.cli.config as verb, megascratch.cli\n"
        "verb._print_presets = lambda: 1 / 0\n"
        "megascratch.cli.main(['config', '--list-presets'])"
    )
    finished = python("-c", program)
    assert finished.returncode == 1
    assert finished.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in finished.stderr


def test_config_prints_toml_that_reads_back(run: Run, tmp_path: Path) -> None:
    first = run("config", "model.preset=llama3-8b", "parallel.tp=2")
    recipe = tmp_path / "run.toml"
    recipe.write_text(first.out)
    assert first.code == 0
    assert run("config", recipe).out == first.out
    assert "tp = 4\n" in run("config", recipe, "parallel.tp=4").out


def test_config_tells_all_problems_of_a_recipe(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text('[model]\npreset = "tiny"\n[parallel]\ntp = 3\ndp = 5\n[train]\nglobal_batch = 48\n')
    finished = run("config", recipe, "train.micro_batch=4")
    assert (finished.code, finished.out) == (2, "")
    assert finished.err.splitlines() == [
        f"2 problems in {recipe}",
        "  parallel.tp = 3          must divide model.n_heads = 8        use 1, 2, 4 or 8",
        "  train.global_batch = 48  must divide by micro_batch 4 × dp 5  use 40 or 60",
    ]


def test_config_lists_the_presets(run: Run) -> None:
    out = run("config", "--list-presets").out
    row = next(line for line in out.splitlines() if "llama3-70b" in line)
    assert row.split() == ["llama3-70b", "80", "8192", "64", "8", "28672", "128256", "8192"]
