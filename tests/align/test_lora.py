"""Adapters: nothing at first, merged and exported as they compute."""

from pathlib import Path

import pytest
import torch
from alignment import PACKED_WAYS, save_tokenizer, way_config, write_way
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megascratch.align.methods import METHODS
from megascratch.align.reference import frozen_engine
from megascratch.checkpoint import convert, find
from megascratch.checkpoint.source import own
from megascratch.config import Config, LogConfig
from megascratch.dist.layout import spec_of
from megascratch.dist.mesh import Mesh
from megascratch.engine import Engine, train
from megascratch.engine.state import load_engine, load_weights, save_engine
from megascratch.errors import CheckpointError, ConfigError
from megascratch.infer import load_model
from megascratch.log import make_console
from megascratch.nn import SequenceInfo, packed_weights

QUIET = make_console(1)
LORA = {"lora": {"rank": 4, "alpha": 64.0}}
TOKENS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A base model, and adapters trained beside it."""
    folder = tmp_path_factory.mktemp("lora")
    data = save_tokenizer(folder), write_way("sft", folder)
    base = way_config("sft", *data, folder / "base", True)
    assert train(base, None, METHODS["sft"].open) == 0
    start = {"init": f"{base.log.dir}/checkpoints"}
    config = way_config("sft", *data, folder / "adapted", True, checkpoint=start, **LORA)
    assert train(config, None, METHODS["sft"].open) == 0
    return config, Path(base.log.dir) / "checkpoints"


def _engine(config: Config) -> Engine:
    return Engine(config, Mesh.serial())


def _logits(engine: Engine) -> torch.Tensor:
    stage = engine.stages[0].eval()
    with torch.no_grad():
        return stage(None, TOKENS, SequenceInfo(TOKENS.shape[1])).transpose(0, 1)[..., :300]


def test_only_adapters_learn_and_begin_with_nothing(trained: tuple[Config, Path]) -> None:
    config, base = trained
    fresh = _engine(config)
    load_weights(fresh, base)
    plain = _engine(config.model_copy(update={"lora": None}))
    load_weights(plain, base)
    assert torch.equal(_logits(fresh), _logits(plain))
    learning = [spec_of(p).name for p in fresh.parameters() if p.requires_grad]
    assert learning and all(".adapter." in name for name in learning)
    adapted = _engine(config)
    load_engine(adapted, Path(config.log.dir) / "checkpoints")
    assert not torch.allclose(_logits(adapted), _logits(plain), atol=1e-3)
    with adapted.adapters_off():
        assert torch.equal(_logits(adapted), _logits(plain))
    opened, _ = load_model(Path(config.log.dir) / "checkpoints", Mesh.serial())
    with torch.no_grad():
        generates = opened(None, TOKENS, SequenceInfo(TOKENS.shape[1])).transpose(0, 1)[..., :300]
    assert torch.equal(generates, _logits(adapted))


def test_merged_and_exported_adapters_compute_the_same(trained: tuple[Config, Path], tmp_path: Path) -> None:
    config, base = trained
    source = Path(config.log.dir) / "checkpoints"
    adapted = _engine(config)
    load_engine(adapted, source)
    convert(source, tmp_path / "merged", merge=True, console=QUIET)
    merged = _engine(config.model_copy(update={"lora": None}))
    load_weights(merged, tmp_path / "merged")
    torch.testing.assert_close(_logits(merged), _logits(adapted), rtol=1e-12, atol=1e-12)
    convert(base, tmp_path / "hf", to="hf", console=QUIET)
    convert(source, tmp_path / "peft", to="peft", console=QUIET)
    convert(source, tmp_path / "whole", to="hf", console=QUIET)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "peft"), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        logits = theirs(TOKENS).logits.double()
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)(TOKENS).logits
    for theirs_said in (logits, whole):
        torch.testing.assert_close(theirs_said, _logits(adapted), rtol=1e-5, atol=1e-5)


def test_what_has_no_adapters_is_refused(trained: tuple[Config, Path], tmp_path: Path) -> None:
    config, base = trained
    with pytest.raises(CheckpointError, match="has no adapters"):
        convert(base, tmp_path / "peft", to="peft", console=QUIET)
    lora = config.model_copy(update={"lora": config.lora.model_copy(update={"targets": ["nothing"]})})
    with pytest.raises(ConfigError, match=r"lora\.targets = \['nothing'\] +name no linear layer"):
        _engine(lora)


@pytest.mark.parametrize("way", PACKED_WAYS)
def test_a_base_in_4_bits(way: str, tmp_path: Path) -> None:
    """Training, resuming, generating and merging compute with the packed base of a checkpoint's weights."""
    data = save_tokenizer(tmp_path), write_way(way, tmp_path)
    verb = PACKED_WAYS[way][0]
    config = way_config(way, *data, tmp_path / "adapted", True)
    base = config.model_copy(update={"lora": None, "log": LogConfig(dir=str(tmp_path / "base"))})
    whole = _engine(base)
    save_engine(whole, tmp_path / "base", 0)
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"init": str(tmp_path / "base")})}
    )
    assert train(config, None, METHODS[verb].open) == 0
    source = Path(config.log.dir) / "checkpoints"
    adapted = _engine(config)
    load_engine(adapted, source)
    packed = packed_weights(adapted.stages.values())
    assert len(packed) == 8
    assert sum(p.numel() * p.element_size() for one in packed for p in one.parameters()) * 8 < 4.4 * sum(
        one.blank().numel() for one in packed
    )
    with adapted.adapters_off():
        without = _logits(adapted)
    assert torch.equal(without, _logits(frozen_engine(config, Mesh.serial()))), "the reference has the same base"
    distance = (without - _logits(whole)).norm() / _logits(whole).norm()
    assert 1e-4 < distance < 0.5, "which is nearly the whole one"
    assert not torch.allclose(_logits(adapted), without, atol=1e-3)
    opened, _ = load_model(source, Mesh.serial())
    with torch.no_grad():
        generates = opened(None, TOKENS, SequenceInfo(TOKENS.shape[1])).transpose(0, 1)[..., :300]
    assert torch.equal(generates, _logits(adapted))
    convert(source, tmp_path / "merged", merge=True, console=QUIET)
    merged = _engine(base)
    load_weights(merged, tmp_path / "merged")
    torch.testing.assert_close(_logits(merged), _logits(adapted), rtol=1e-12, atol=1e-12)
    convert(source, tmp_path / "unpacked", console=QUIET)
    assert not any(name.endswith(".codes") for name in own(find(tmp_path / "unpacked")).kinds)
    if way == "experts":
        with pytest.raises(CheckpointError, match=r"experts\.\w+\.adapter.* +is of all experts, for which PEFT"):
            convert(source, tmp_path / "peft", to="peft", console=QUIET)
    else:
        convert(source, tmp_path / "hf", to="hf", console=QUIET)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(theirs(TOKENS).logits, _logits(adapted), rtol=1e-5, atol=1e-5)


def test_blocks_that_a_layout_cuts_apart_are_refused(tmp_path: Path) -> None:
    data = save_tokenizer(tmp_path), write_way("qlora", tmp_path)
    config = way_config("qlora", *data, tmp_path / "run", True, model={"ffn_hidden": 96})
    with pytest.raises(ConfigError, match=r"lora\.base = nf4.* +leaves 96 columns of layers\.0\.mlp\.down\.weight"):
        _engine(config)
