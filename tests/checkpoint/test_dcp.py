"""Against torch.distributed.checkpoint: what it saves opens here, what we write opens there, and nothing runs."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hf_models import MODELS, our_logits, saved
from rich.console import Console
from torch.distributed.checkpoint.metadata import Metadata

from megascratch.checkpoint import convert
from megascratch.checkpoint.dcp import DcpFolder
from megascratch.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")


def _write(folder: Path, name: str = "qwen3", nested: bool = True) -> Any:
    """Save a model as a training script does, within a state that has an optimizer, and its config.json."""
    model = saved(folder, *MODELS[name])
    (folder / "model.safetensors").unlink()
    state = {"model": model.state_dict(), "optimizer": {"step": 3, "moment": torch.ones(5)}}
    dcp.save(state if nested else state["model"], checkpoint_id=folder, no_dist=True)
    return model


def _tokens() -> torch.Tensor:
    return torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "nested"), [("qwen3", True), ("gpt2", False)])
def test_in_and_out(tmp_path: Path, console: Console, name: str, nested: bool) -> None:
    theirs = _write(tmp_path / "theirs", name, nested)
    ours = convert(tmp_path / "theirs", tmp_path / "ours", pp=3, console=console)
    with torch.no_grad():
        expected = theirs(_tokens()).logits
    torch.testing.assert_close(our_logits(ours, _tokens()), expected, rtol=0, atol=1e-5 * expected.std().item())

    out = convert(ours, tmp_path / "out", to="dcp", console=console)
    state = {key: torch.zeros_like(tensor) for key, tensor in theirs.state_dict().items() if key != "lm_head.weight"}
    if not theirs.config.tie_word_embeddings:
        state["lm_head.weight"] = torch.zeros_like(theirs.lm_head.weight)
    dcp.load(state, checkpoint_id=out, no_dist=True)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in state.items())
    assert transformers.AutoConfig.from_pretrained(out).model_type == theirs.config.model_type
    straight = convert(tmp_path / "theirs", tmp_path / "hf", to="hf", console=console)
    reread = transformers.AutoModelForCausalLM.from_pretrained(straight, dtype=torch.float32)
    assert all(torch.equal(tensor, reread.state_dict()[key]) for key, tensor in state.items())


class _Harmful:
    def __reduce__(self) -> Any:
        return (exec, ("raise AssertionError('a pickle ran')",))


def _edited(folder: Path, edit: Callable[[Metadata], Any]) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    replaced = edit(metadata)
    file.write_bytes(pickle.dumps(metadata if replaced is None else replaced))


NORM = "model.model.norm.weight"


def _place(metadata: Metadata) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == NORM)


def _resize(metadata: Metadata) -> None:
    chunk = metadata.state_dict_metadata[NORM].chunks[0]
    metadata.state_dict_metadata[NORM].size = chunk.sizes = torch.Size([1 << 40])


def _hole(metadata: Metadata) -> None:
    metadata.state_dict_metadata[NORM].chunks[0].sizes = torch.Size([31])


def _twice(metadata: Metadata) -> None:
    metadata.state_dict_metadata[NORM].chunks *= 2


def _elsewhere(metadata: Metadata) -> None:
    _place(metadata).relative_path = "../outside.distcp"


def _beyond(metadata: Metadata) -> None:
    _place(metadata).offset = 1 << 40


def _another(metadata: Metadata) -> None:
    _place(metadata).offset = 0


def _code(metadata: Metadata) -> None:
    metadata.planner_data = _Harmful()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_code, "names builtins.exec"),
        (lambda _: [1], "is no metadata of a checkpoint"),
        (_resize, "is larger than all files together"),
        (_hole, "lacks 1 of its 32 elements"),
        (_twice, "has pieces that overlap"),
        (_elsewhere, "must stand in a file of the folder itself"),
        (_beyond, "claims bytes that __0_0.distcp has not"),
        (_another, "cannot be read|does not hold tensor|is no archive"),
    ],
)
def test_hostile_metadata_is_refused(
    tmp_path: Path, console: Console, edit: Callable[[Metadata], Any], message: str
) -> None:
    _write(tmp_path / "theirs")
    _edited(tmp_path / "theirs", edit)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    assert not (tmp_path / "ours").exists()


def test_hostile_chunks_are_refused(tmp_path: Path, console: Console) -> None:
    _write(tmp_path / "theirs")
    places = DcpFolder(tmp_path / "theirs")._chunks
    stored = places[NORM][0]
    file = tmp_path / "theirs" / stored.file
    data = bytearray(file.read_bytes())
    code = pickle.dumps(_Harmful())
    data[stored.offset : stored.offset + len(code)] = code
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp.* (is no archive|cannot be read)"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    file.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match=r"claims bytes that __0_0.distcp has not"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"claims bytes that __0_0.distcp has not"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    (tmp_path / "theirs" / "config.json").unlink()
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config.json +cannot be read"):
        convert(tmp_path / "theirs", tmp_path / "ours", from_="dcp", console=console)
