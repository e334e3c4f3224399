"""Checkpoints of Megatron-LM, weights only: both of its formats in and out.

    legacy                                     torch_dist
    latest_checkpointed_iteration.txt          latest_checkpointed_iteration.txt
    iter_0001000/                              iter_0001000/
      mp_rank_00_000/model_optim_rng.pt          metadata.json    says that it is one
      mp_rank_01_000/…     tp 1, pp 0            common.pt        arguments
      mp_rank_00_001/…     tp 0, pp 1            .metadata  __0_0.distcp …    as torch's own (`dcp`)

A legacy rank numbers its layers from 0 and holds its parts; torch_dist has whole tensors, those of all layers as one
[n_layers, …]. Inside a tensor nothing differs from ours: QKV is grouped by key/value head, gate stands above up. What
tp divides, it divides as `ParamSpec` says, but for the vocabulary's padding, which is Megatron's own. So this is a
table of names, and one of arguments. A layer's experts are one tensor [E, 2 f, h] in torch_dist, and one for each of
them in a legacy rank, where ours are [E, 2, f, h].
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascratch.checkpoint.dcp import METADATA, DcpFolder
from megascratch.checkpoint.format import damage, read_bounded, whole
from megascratch.checkpoint.megatron_args import read_arguments
from megascratch.checkpoint.pickles import StoredTensor, load_torch_file
from megascratch.checkpoint.source import Kind, Latest, Source, check_sizes
from megascratch.checkpoint.steps import rename
from megascratch.config import DataConfig, ModelConfig, config_from_dict
from megascratch.dist.layout import ParamSpec, extents
from megascratch.errors import CheckpointError
from megascratch.nn import parameter_specs

LATEST = "latest_checkpointed_iteration.txt"
COMMON, SHARDED = "common.pt", "metadata.json"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
_LAYER = "decoder.layers.{i}."
_KINDS = ("weight", "bias")
_EXPERTS = "mlp.experts.experts."  # all of a layer's together, as torch_dist has them

MEGATRON_STEPS = (
    rename("embed.weight", "embedding.word_embeddings.weight"),
    rename("position.weight", "embedding.position_embeddings.weight"),
    *(
        rename(f"layers.{{i}}.{ours}{kind}", f"{_LAYER}{theirs}{kind}")
        for ours, theirs in (
            ("attn_norm.", "self_attention.linear_qkv.layer_norm_"),
            ("attn.qkv.", "self_attention.linear_qkv."),
            ("attn.proj.", "self_attention.linear_proj."),
            ("attn.q_norm.", "self_attention.q_layernorm."),
            ("attn.k_norm.", "self_attention.k_layernorm."),
            ("mlp_norm.", "mlp.linear_fc1.layer_norm_"),
            ("mlp.gate_up.", "mlp.linear_fc1."),
            ("mlp.up.", "mlp.linear_fc1."),
            ("mlp.down.", "mlp.linear_fc2."),
            ("mlp.shared.gate_up.", "mlp.shared_experts.linear_fc1."),
            ("mlp.shared.up.", "mlp.shared_experts.linear_fc1."),
            ("mlp.shared.down.", "mlp.shared_experts.linear_fc2."),
        )
        for kind in _KINDS
    ),
    rename("layers.{i}.mlp.shared_gate", f"{_LAYER}mlp.shared_experts.gate_weight"),
    rename("layers.{i}.mlp.router.weight", f"{_LAYER}mlp.router.weight"),
    rename("layers.{i}.mlp.router.bias", f"{_LAYER}mlp.router.expert_bias"),
    rename("layers.{i}.mlp.experts.up", f"{_LAYER}{_EXPERTS}linear_fc1.weight"),
    rename("layers.{i}.mlp.experts.down", f"{_LAYER}{_EXPERTS}linear_fc2.weight"),
    *(rename(f"norm.{kind}", f"decoder.final_layernorm.{kind}") for kind in _KINDS),
    rename("head.weight", "output_layer.weight"),
)
EMBEDDING = "embedding.word_embeddings.weight"
_VOCABULARY = ("embed.weight", "head.weight")  # which Megatron pads
_DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Without Transformer Engine, and in front of experts, a norm is a module of its own.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def find_megatron(path: Path) -> Path | None:
    """Return the directory of Megatron's checkpoint: `path` itself or the iteration that it names last; None if none.

    Raises: CheckpointError: if it names one in a way that no Megatron does.
    """
    if (path / LATEST).is_file():
        text = read_bounded(path / LATEST, 4096).decode(errors="replace").strip()
        if text != "release" and not re.fullmatch(r"\d{1,12}", text):
            raise damage(path, f"{LATEST} = {text[:40]!r}", "must be the number of an iteration, or release")
        return path / ("release" if text == "release" else f"iter_{int(text):07d}")
    own = (path / COMMON).is_file() or any(_RANK.fullmatch(entry.name) for entry in path.glob("mp_rank_*"))
    return path if own else None


def open_megatron(path: Path) -> Source:
    """Open a checkpoint of Megatron-LM, of either format.

    Args:
        path: from `find_megatron`.

    Raises: CheckpointError: if it is incomplete or damaged, holds what no checkpoint does, or our model cannot be of
        its kind.
    """
    if not path.is_dir():
        raise damage(path, path.name, "does not exist", "give another checkpoint")
    opened = _Sharded(path) if (path / METADATA).is_file() else _Legacy(path)
    args = vars(opened.args) if isinstance(opened.args, Namespace) else getattr(opened.args, "state", None)
    if not isinstance(args, Mapping):
        raise damage(path, "args", "are not in the checkpoint, so the model's shape is not known")
    try:
        section = read_arguments(args)
        check_sizes(section)
    except CheckpointError as error:
        raise CheckpointError(error.problems, str(path)) from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise damage(path, "args", f"have a value of the wrong kind: {error}"[:200]) from None
    if isinstance(opened, _Legacy) and (args.get("expert_model_parallel_size") or 1) > 1:
        remedy = "convert it to torch_dist with Megatron's own tools"
        raise damage(path, "args.expert_model_parallel_size", "must be 1 in the legacy format", remedy)
    if section["n_layers"] != opened.n_layers:
        rule = f"is not the number of layers that there are, {opened.n_layers}"
        raise damage(path, f"args.num_layers = {section['n_layers']}", rule)
    rows, dtype, size = *opened.embedding(), args.get("vocab_size")
    section["vocab_size"] = size if isinstance(size, int) and 0 < size <= rows else rows
    if dtype not in _DTYPES:
        raise damage(path, EMBEDDING, f"is {dtype}, a quantised or integer weight")
    seq_length = min(section["max_seq_length"], DataConfig().seq_length)
    raw = {
        "model": section,
        "parallel": {"tp": opened.tp, "sequence_parallel": False},
        "data": {"seq_length": seq_length},
        "train": {"dtype": _DTYPES[dtype]},
    }
    config = config_from_dict(raw, where=str(path))
    specs = {spec.name: spec for spec in parameter_specs(config.model, tp=opened.tp)}
    names = megatron_names(config.model)
    kinds = {name: opened.kind(their, specs[name]) for name, their in names.items()}

    @Latest  # the pieces of one tensor are asked for one after the other
    def read(name: str) -> Tensor:
        return opened.read(names[name], specs[name])

    return Source(path, config, kinds, lambda name, box, dtype: read(name)[box].to(dtype))


def megatron_names(model: ModelConfig) -> dict[str, str]:
    """Return Megatron's name of each tensor of a model, in the model's order."""
    steps = (step.at(layer) for layer in range(model.n_layers) for step in MEGATRON_STEPS)
    theirs = {step.ours: step.theirs[0] for step in steps}
    for layer in filter(model.has_experts, range(model.n_layers)):
        theirs[f"layers.{layer}.mlp_norm.weight"] = f"decoder.layers.{layer}.pre_mlp_layernorm.weight"
    # Modules that look ahead serve training, and stay behind.
    specs = parameter_specs(model)
    return {spec.name: theirs[spec.name] for spec in specs if not spec.tied and not spec.name.startswith("mtp.")}


def _aliases(name: str) -> Iterator[str]:
    """Yield what a tensor may be called."""
    yield name
    for local, theirs in _LOCAL_NORMS.items():
        if f".{local}" in name:
            yield name.replace(f".{local}", f".{theirs}")


def expert_names(name: str, n_experts: int) -> tuple[list[str], list[str]]:
    """Return what each expert's part of a tensor is called in a legacy rank: as a module each, or as one of a group.

    Neither, where it is not a tensor of experts.
    """
    if _EXPERTS not in name:
        return [], []
    singly = [name.replace(_EXPERTS, f"mlp.experts.local_experts.{e}.") for e in range(n_experts)]
    return singly, [f"{name.replace(_EXPERTS, 'mlp.experts.')}{e}" for e in range(n_experts)]


def of_one_expert(spec: ParamSpec) -> ParamSpec:
    """Return the spec of one expert's part, [2, f, h] or [f, h], of a stack of all."""
    splits = tuple(replace(split, dim=split.dim - 1) for split in spec.splits if split.axis == "tp")
    return replace(spec, shape=spec.shape[1:], splits=splits)


def matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of gate and up [2, f, h] as Megatron's one matrix [2 f, h]; of any other matrix as it is."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def all_experts(spec: ParamSpec) -> tuple[int, ...]:
    """Return Megatron's shape of a stack of experts, [E, 2 f, h] or [E, f, h]."""
    return (spec.shape[0], *matrix(spec.shape[1:]))


class _Sharded:
    """A torch_dist checkpoint, whose layers are stacked, or stand by their numbers where they differ."""

    tp = 1

    def __init__(self, path: Path) -> None:
        self.path, self._folder = path, DcpFolder(path)
        common = load_torch_file(path / COMMON)
        self.args = common.get("args") if isinstance(common, Mapping) else None
        layers = ((re.match(r"decoder\.layers\.(\d{1,5})?", name), kind) for name, kind in self._folder.kinds.items())
        counts = [kind.shape[0] if match[1] is None else int(match[1]) + 1 for match, kind in layers if match]
        self.n_layers = max(counts, default=0)

    def embedding(self) -> tuple[int, torch.dtype]:
        """Return the rows of the embedding, padding included, and its dtype."""
        name, _ = self._place(EMBEDDING)
        return self._folder.kinds[name].shape[0], self._folder.kinds[name].dtype

    def kind(self, name: str, spec: ParamSpec) -> Kind:
        """Return a tensor's kind; raises a CheckpointError if it is not there, or not of the spec's shape."""
        found, layer = self._place(name)
        kind = self._folder.kinds[found]
        shape, expected = kind.shape if layer is None else kind.shape[1:], self._shape(name, spec)
        longer = spec.name in _VOCABULARY and shape[0] >= expected[0] and shape[1:] == expected[1:]
        if shape != expected and not longer:
            raise _misshaped(self.path, name, shape, expected)
        return Kind(kind.dtype, spec.shape)

    def read(self, name: str, spec: ParamSpec) -> Tensor:
        """Return a tensor of the spec's shape."""
        found, layer = self._place(name)
        box = whole(self._shape(name, spec))
        if layer is not None:
            box = (slice(layer, layer + 1), *box)
        return self._folder.read(found, box).view(spec.shape)

    def _shape(self, name: str, spec: ParamSpec) -> tuple[int, ...]:
        return all_experts(spec) if _EXPERTS in name else spec.shape

    def _place(self, name: str) -> tuple[str, int | None]:
        """Return the tensor that holds another: itself, or that of all layers and which of them."""
        kinds = self._folder.kinds
        for alias in _aliases(name):
            if alias in kinds:
                return alias, None
            if (match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", alias)) is not None:
                together, layer = f"decoder.layers.{match[2]}", int(match[1])
                if together in kinds and layer < kinds[together].shape[0]:
                    return together, layer
        raise damage(self.path, f"tensor {name}", "is not in the checkpoint")


class _Legacy:
    """A checkpoint with one file a rank; what tp and pp divided is joined, a tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        ranks = dict(self._open_rank(folder) for folder in sorted(path.glob("mp_rank_*")))
        self.pp, self.tp = (1 + max(rank[dim] for rank in ranks) for dim in (0, 1))
        if missing := [(p, t) for p in range(self.pp) for t in range(self.tp) if (p, t) not in ranks]:
            raise damage(path, f"mp_rank_{missing[0][1]:02d}_{missing[0][0]:03d}", "is missing")
        self.args = ranks[0, 0].get("args")
        self._parts: dict[str, list[StoredTensor]] = {}
        self.n_layers = 0
        # Virtual stages follow each other over all pipeline ranks: model0 of each, then model1.
        for chunk in [key for key in ("model", *(f"model{i}" for i in range(64))) if key in ranks[0, 0]]:
            for stage in range(self.pp):
                self._take([ranks[stage, rank].get(chunk) for rank in range(self.tp)])

    def _open_rank(self, folder: Path) -> tuple[tuple[int, int], Mapping[str, Any]]:
        match = _RANK.fullmatch(folder.name)
        if match is None or match[3] is not None:
            raise damage(
                self.path,
                folder.name[:60],
                "is a rank of divided experts",
                "convert it to torch_dist with Megatron's own tools",
            )
        files = [folder / name for name in ("model_optim_rng.pt", "model_rng.pt")]
        file = next((file for file in files if file.is_file()), files[0])
        state = load_torch_file(file)
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise damage(folder, file.name, "holds no checkpoint of Megatron-LM")
        found = {key: self._stored(file, value) if key.startswith("model") else value for key, value in state.items()}
        return (int(match[2] or 0), int(match[1])), found

    def _stored(self, file: Path, state: Any) -> Any:
        """Return a state dict's tensors; what else it has is state of Transformer Engine."""
        if not isinstance(state, Mapping):
            return None
        return {str(name): StoredTensor.of(file, value) for name, value in state.items() if isinstance(value, Tensor)}

    def _take(self, ranks: list[Any]) -> None:
        """Take the tensors of one stage, [tp] state dicts whose layers are numbered from 0."""
        first, count = self.n_layers, 0
        for rank, state in enumerate(ranks):
            if not isinstance(state, Mapping):
                raise damage(self.path, f"the model of tensor rank {rank}", "is not in the checkpoint")
            for name, tensor in state.items():
                for local, theirs in _LOCAL_NORMS.items():
                    name = name.replace(f".{local}", f".{theirs}")
                if (match := re.match(r"decoder\.layers\.(\d{1,5})\.", name)) is not None:
                    count = max(count, int(match[1]) + 1)
                    name = f"decoder.layers.{first + int(match[1])}.{name[match.end() :]}"
                parts = self._parts.setdefault(name, [])
                if len(parts) == rank:  # a tied head stands on the last stage, too
                    parts.append(tensor)
        self.n_layers = first + count

    def embedding(self) -> tuple[int, torch.dtype]:
        """Return the rows of the embedding, padding included, and its dtype."""
        parts = self._parts_of(EMBEDDING)
        return sum(part.shape[0] if part.shape else 0 for part in parts), parts[0].dtype

    def kind(self, name: str, spec: ParamSpec) -> Kind:
        """Return a tensor's kind; raises a CheckpointError if it is not there, or not of the spec's shape."""
        for own, part_spec in self._stored_as(name, spec):
            parts = self._parts_of(own)
            expected = matrix(self._padded(part_spec, parts).local_shape({"tp": self.tp}))
            for part in parts:
                if part.shape != expected or part.dtype != parts[0].dtype:
                    raise _misshaped(self.path, own, part.shape, expected)
        return Kind(parts[0].dtype, spec.shape)

    def read(self, name: str, spec: ParamSpec) -> Tensor:
        """Return a tensor of the spec's shape."""
        if _EXPERTS not in name:
            return self._joined(name, spec)
        return torch.stack([self._joined(own, part_spec) for own, part_spec in self._stored_as(name, spec)])

    def _stored_as(self, name: str, spec: ParamSpec) -> list[tuple[str, ParamSpec]]:
        """Return the names and specs that a tensor is stored as: itself, or one for each expert."""
        if _EXPERTS not in name:
            return [(name, spec)]
        if spec.shape[0] > len(self._parts):  # before anything is made for each
            raise damage(self.path, f"args.num_experts = {spec.shape[0]}", "is more than there are tensors")
        singly, grouped = expert_names(name, spec.shape[0])
        names = grouped if grouped[0] in self._parts else singly
        return [(own, of_one_expert(spec)) for own in names]

    def _joined(self, name: str, spec: ParamSpec) -> Tensor:
        """Return what the ranks of tp hold as one tensor."""
        parts = self._parts_of(name)
        if not spec.is_split_over("tp") or parts[0].shape == matrix(spec.shape):
            return parts[0].read().view(spec.shape)
        out = torch.empty(spec.shape, dtype=parts[0].dtype)
        padded = self._padded(spec, parts)
        for rank, part in enumerate(parts):
            values = part.read().view(padded.local_shape({"tp": self.tp}))
            for extent in extents(padded, {"tp": self.tp}, {"tp": rank}):
                out[extent.logical] = values[extent.local]
            del values  # before the next is read
        return out

    def _parts_of(self, name: str) -> list[StoredTensor]:
        parts = next((self._parts[alias] for alias in _aliases(name) if alias in self._parts), [])
        if len(parts) != self.tp:
            raise damage(self.path, f"tensor {name}", "is not in the checkpoint")
        return parts

    def _padded(self, spec: ParamSpec, parts: list[StoredTensor]) -> ParamSpec:
        """Return the spec with as much padding of the vocabulary as there is."""
        if spec.name not in _VOCABULARY or len(parts[0].shape) != 2:
            return spec
        pad = max(0, parts[0].shape[0] * self.tp - spec.shape[0])
        return replace(spec, splits=(replace(spec.splits[0], pad=pad + -(spec.shape[0] + pad) % self.tp),))


def _misshaped(path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return damage(path, f"tensor {name}", f"has shape {list(found)}, the arguments ask for {list(expected)}")
