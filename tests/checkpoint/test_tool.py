"""tools/convert_checkpoint.py, by Megatron-LM's flags."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megascratch.checkpoint import convert, describe, verify

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


Tool = Callable[..., tuple[int, str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*flags: object) -> tuple[int, str]:
        """Return the exit code and what was written to stderr."""
        code = module.main(["--model-type", "GPT", *map(str, flags)])
        return code, capsys.readouterr().err

    return run


def test_between_layouts_and_to_hugging_face_and_back(tmp_path: Path, tiny, console, tool: Tool) -> None:
    src, _, values = tiny
    sizes = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
    code, stderr = tool("--load-dir", src, "--save-dir", tmp_path / "four", *sizes, "--megatron-path", "x")
    assert code == 0, stderr
    assert "--megatron-path has no effect" in stderr
    assert describe(tmp_path / "four").layout == {"pp": 2, "dp": 1, "cp": 1, "tp": 2}
    verify(tmp_path / "four", console)

    code, stderr = tool("--saver", "hf", "--load-dir", tmp_path / "four", "--save-dir", tmp_path / "hf")
    assert code == 0, stderr
    norm = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert norm.tolist() == values["norm.weight"].tolist()

    loader = ("--loader", "llama_mistral", "--checkpoint-type", "hf", "--model-size", "llama3", "--bf16")
    code, stderr = tool(*loader, "--saver", "mcore", "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "ours")
    assert code == 0, stderr
    assert {record.dtype for record in describe(tmp_path / "ours").tensors.values()} == {"BF16"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["four", "hf", "ours", "run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loader", "mixtral_hf"), "--loader mixtral_hf  must be one of megatron"),
        (("--saver", "llava"), "--saver llava  must be one of megatron"),
        (("--checkpoint-type", "meta"), "Meta's files are pickles"),
        (("--bf16",), "belongs to --loader llama_mistral"),
        (("--target-expert-parallel-size", "2"), "there are no experts"),
        (("--target-tensor-parallel-size", "3"), "must divide model.n_heads = 4"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, tiny, tool: Tool, flags: tuple[str, ...], message: str) -> None:
    src, _, _ = tiny
    code, stderr = tool("--load-dir", src, "--save-dir", tmp_path / "out", *flags)
    assert code == 2
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_megatron_itself_opens(tmp_path: Path, tiny, console, tool: Tool) -> None:
    src, _, values = tiny
    theirs = convert(src, tmp_path / "theirs", to="megatron", tp=2, console=console)
    code, stderr = tool("--loader", "mcore", "--saver", "mcore", "--load-dir", theirs, "--save-dir", tmp_path / "ours")
    assert code == 0, stderr
    assert set(describe(tmp_path / "ours").tensors) == {name for name in values if not name.startswith("optim/")}
