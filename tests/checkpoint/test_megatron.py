"""Against megatron-core: its checkpoints open here, ours there, bit for bit and with the same logits."""

import multiprocessing
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import our_logits
from megatron_models import KINDS, V, arguments, logits, make_model, on_a_cpu, start, stop
from ranks_and_models import logical_tensors, tiny_config, write_checkpoint
from rich.console import Console
from torch import Tensor

from megascratch.checkpoint import convert, describe, verify
from megascratch.checkpoint.convert import open_source
from megascratch.dist.testing import run_ranks
from megascratch.errors import CheckpointError

pytest.importorskip("megatron.core")

# What Transformer Engine's layers are called, and megatron-core's own.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """megatron-core with one rank."""
    with on_a_cpu():
        start(tmp_path_factory.mktemp("store") / "store")
        yield
        stop()


def tokens_of() -> Tensor:
    return torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(1))


def weights_of(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return {name: source.read(name) for name in source.weights}


def assert_equal_weights(a: Path, b: Path) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def save_legacy(folder: Path, name: str, model: Any) -> Path:
    """Save as Megatron-LM does on one rank, with what else its files hold."""
    import numpy as np

    rank = folder / "iter_0000100" / "mp_rank_00"
    rank.mkdir(parents=True)
    state = {
        "args": arguments(name),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": model.state_dict_for_save_checkpoint(),
        "rng_state": [
            {
                "np_rng_state": ("MT19937", np.zeros(624, dtype=np.uint32), 1, 0, 0.0),
                "random_rng_state": (3, (1, 2), None),
            }
        ],
    }
    torch.save(state, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_both_formats_in_and_out(tmp_path: Path, console: Console, megatron: None, name: str) -> None:
    from megatron.core import dist_checkpointing

    model = make_model(name)
    expected = logits(model, tokens_of())
    legacy = convert(save_legacy(tmp_path / "legacy", name, model), tmp_path / "ours", tp=2, console=console)
    verify(legacy, console)
    got = our_logits(legacy, tokens_of())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.std().item())

    sharded = tmp_path / "sharded" / "iter_0000100"
    sharded.mkdir(parents=True)
    saved = {"model": model.sharded_state_dict(), "args": arguments(name), "iteration": 100}
    dist_checkpointing.save(saved, str(sharded))
    (tmp_path / "sharded" / "latest_checkpointed_iteration.txt").write_text("100")
    assert_equal_weights(legacy, tmp_path / "sharded")

    # Out, in both formats, into another model of theirs.
    out = convert(legacy, tmp_path / "out", to="megatron-dist", console=console)
    other = make_model(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    wanted = other.sharded_state_dict()
    for key, tensor in wanted.items():
        # In front of experts the norm is a module of its own with Transformer Engine too.
        if "pre_mlp_layernorm." in key and key.split(".pre_mlp")[0] + ".mlp.router.weight" in wanted:
            tensor.key = tensor.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    loaded = dist_checkpointing.load({"model": wanted}, str(out / "release"), strict="log_all")
    other.load_state_dict(loaded["model"], strict=False)
    assert torch.equal(logits(other, tokens_of()), expected)

    ranks = convert(legacy, tmp_path / "ranks", to="megatron", console=console)
    state = torch.load(ranks / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    renamed = {}
    for key, tensor in state["model"].items():
        for te, local in LOCAL_NAMES.items():
            key = key.replace(te, local)
        renamed[key] = tensor
    assert renamed.keys() == model.state_dict().keys()
    other.load_state_dict({k: v for k, v in renamed.items() if v is not None}, strict=False)
    assert torch.equal(logits(other, tokens_of()), expected)
    for argument, value in vars(arguments(name)).items():
        assert getattr(state["args"], argument) == value, argument


def test_experts_of_a_group_are_those_of_modules(tmp_path: Path, console: Console, megatron: None) -> None:
    """Transformer Engine's grouped product names a layer's experts otherwise; no CPU computes it."""
    model = make_model("mixtral")
    singly = save_legacy(tmp_path / "singly", "mixtral", model)
    grouped = save_legacy(tmp_path / "grouped", "mixtral", model)
    file = grouped / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    pattern = r"local_experts\.(\d)\.(linear_fc.)\.weight"
    state["model"] = {re.sub(pattern, r"\2.weight\1", name): value for name, value in state["model"].items()}
    assert "decoder.layers.2.mlp.experts.linear_fc1.weight3" in state["model"]
    torch.save(state, file)
    assert_equal_weights(singly, grouped)


def _save_both(folder: Path, tp: int, pp: int, name: str) -> None:
    """Save this rank's part of a model in both formats of megatron-core."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state

    multiprocessing.current_process()._config["daemon"] = False  # megatron-core writes in processes of its own
    with on_a_cpu():
        parallel_state.initialize_model_parallel(tp, pp)
        model = make_model(name, tp, pp)
        place = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        # What every rank of tp holds whole is the same on all of them.
        for parameter in model.parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                dist.broadcast(
                    parameter.data,
                    parallel_state.get_tensor_model_parallel_src_rank(),
                    group=parallel_state.get_tensor_model_parallel_group(),
                )
        rank = folder / "legacy" / "mp_rank_{:02d}_{:03d}".format(*place)
        rank.mkdir(parents=True)
        state = {"args": arguments(name, tp, pp), "model": model.state_dict_for_save_checkpoint()}
        torch.save(state, rank / "model_optim_rng.pt")
        if dist.get_rank() == 0:
            (folder / "sharded").mkdir()
        dist.barrier()
        dist_checkpointing.save({"model": model.sharded_state_dict(), "args": arguments(name)}, str(folder / "sharded"))
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("name", ["qwen", "sigmoid"])
def test_what_tp_and_pp_divided_is_joined(tmp_path: Path, console: Console, name: str) -> None:
    """Four ranks save their own files, and one checkpoint together: both must open as the same model."""
    run_ranks(4, _save_both, tmp_path, 2, 2, name, timeout_s=100)
    assert_equal_weights(tmp_path / "legacy", tmp_path / "sharded")
    whole_model = weights_of(tmp_path / "legacy")
    assert whole_model["embed.weight"].shape == (V, 32)
    assert len({tuple(whole_model[f"layers.{i}.attn.qkv.weight"][0].tolist()) for i in range(4)}) == 4

    # And divided again by us: as they were, but for the padding's values.
    again = convert(tmp_path / "legacy", tmp_path / "again", to="megatron", tp=2, pp=2, console=console)
    assert_equal_weights(tmp_path / "legacy", again)
    for tp_rank in range(2):
        for pp_rank in range(2):
            file = f"mp_rank_{tp_rank:02d}_{pp_rank:03d}/model_optim_rng.pt"
            ours = torch.load(again / "release" / file, weights_only=False)["model"]
            theirs = torch.load(tmp_path / "legacy" / file, weights_only=False)["model"]
            for key, tensor in ours.items():
                for te, local in LOCAL_NAMES.items():
                    key = key.replace(te, local)
                if tensor is not None:
                    n = len(tensor) if "embedding" not in key and "output" not in key else min(128, V - 128 * tp_rank)
                    assert torch.equal(tensor[:n], theirs[key][:n]), key


def test_a_tied_model_over_two_stages(tmp_path: Path, console: Console) -> None:
    config = tiny_config(tie_embeddings=True, vocab_size=300)
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config))
    out = convert(path, tmp_path / "out", to="megatron", pp=2, dtype="bf16", console=console)
    last = torch.load(out / "release/mp_rank_00_001/model_optim_rng.pt", weights_only=False)["model"]
    assert last["output_layer.weight"].shape == (384, 24)
    assert last["output_layer.weight"].dtype == torch.bfloat16
    back = convert(out, tmp_path / "back", console=console)
    assert not any(name.startswith("optim/") for name in describe(back).tensors)
    for name, tensor in weights_of(path).items():
        assert torch.equal(weights_of(back)[name], tensor.bfloat16())


class _Harmful:
    def __reduce__(self) -> Any:
        return (exec, ("raise AssertionError('a pickle ran')",))


def _legacy(folder: Path, **changes: Any) -> Path:
    rank = folder / "mp_rank_00"
    rank.mkdir(parents=True)
    state = {
        "args": arguments("llama"),
        "model": OrderedDict({"embedding.word_embeddings.weight": torch.zeros(256, 32)}),
    }
    torch.save({**state, **changes}, rank / "model_optim_rng.pt")
    return folder


def _moe(**changes: Any) -> dict[str, Any]:
    return {"args": Namespace(**{**vars(arguments("mixtral")), **changes})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": _Harmful()}, r"model_optim_rng.pt +names builtins.exec"),
        ({"model": None}, "the model of tensor rank 0 +is not in the checkpoint"),
        ({"args": None}, "args +are not in the checkpoint"),
        (_moe(moe_layer_freq=[0, 1, 1, 0]), r"args.moe_layer_freq = .* +must be a first layer with experts, and every"),
        (_moe(moe_router_load_balancing_type="sinkhorn"), "load_balancing_type = sinkhorn +must be one of none, aux"),
        (_moe(moe_expert_capacity_factor=1.5), "capacity_factor = 1.5 +must be None with experts"),
        (_moe(expert_model_parallel_size=2), "args.expert_model_parallel_size +must be 1 in the legacy format"),
        (_moe(num_experts=10**9), "num_experts = .* must not exceed"),
        ({"args": Namespace(**{**vars(arguments("llama")), "hidden_size": "x"})}, "args.hidden_size +must be given"),
        ({"args": Namespace(**{**vars(arguments("llama")), "hidden_size": 2**70})}, "hidden = .* must not exceed"),
        (
            {"args": Namespace(**{**vars(arguments("llama")), "rotary_base": []})},
            "args +have a value of the wrong kind",
        ),
        ({"args": Namespace(num_layers=10**9)}, "args.hidden_size +must be given"),
        ({}, "args.num_layers = 4 +is not the number of layers that there are, 0"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, console: Console, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(_legacy(tmp_path / "theirs", **changes), tmp_path / "ours", console=console)
    assert not (tmp_path / "ours").exists()


def test_damaged_files_are_refused(tmp_path: Path, console: Console) -> None:
    file = _legacy(tmp_path / "theirs") / "mp_rank_00" / "model_optim_rng.pt"
    data = file.read_bytes()
    for broken in (b"", data[: len(data) // 2], pickle.dumps(_Harmful()), b"\x80\x02" + b"(" * 10_000):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model_optim_rng.pt +is no archive of torch.save"):
            convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(CheckpointError, match=r"is compressed, which torch.save never does"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    file.parent.rename(tmp_path / "theirs" / "mp_rank_01_000_003")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_000_003 +is a rank of divided experts"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="must be the number of an iteration, or release"):
        convert(tmp_path / "theirs", tmp_path / "ours", console=console)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"scale_embeddings": True}, "model.scale_embeddings = True +must be False in Megatron's format"),
        ({"activation": "geglu"}, "model.activation = geglu +must be swiglu"),
        ({"n_layers": 3}, "pp = 2 +must divide model.n_layers = 3"),
    ],
)
def test_models_that_megatron_has_not_are_refused(
    tmp_path: Path, console: Console, model: dict[str, Any], message: str
) -> None:
    config = tiny_config(**model)
    path = write_checkpoint(tmp_path / "run", config, logical_tensors(config, optimizer=False))
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "out", to="megatron", pp=2, console=console)
