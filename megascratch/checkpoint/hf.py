"""Exchange with Hugging Face's format, both ways, one of our tensors in memory at a time.

    model-00001-of-00002.safetensors …    tensors by the family's names; one file is called model.safetensors
    model.safetensors.index.json          which file holds which tensor, where there are several
    config.json  generation_config.json   shape, and what `generate` starts from
    tokenizer.json  tokenizer_config.json

The families are tables in `families.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascratch.checkpoint.families import family_for
from megascratch.checkpoint.format import CHUNK_BYTES, DTYPES, Manifest, damage, whole
from megascratch.checkpoint.hf_config import read_config, write_config
from megascratch.checkpoint.load import Reader, find, tensor_shard
from megascratch.checkpoint.save import NewPiece, new_directory, write_contents, write_pieces
from megascratch.checkpoint.steps import Step
from megascratch.config import DataConfig, ModelConfig, config_from_dict
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import parameter_specs
from megascratch.tokenizer import Tokenizer

LARGEST_FILE_BYTES = 5_000_000_000  # what the Hub splits at
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LARGEST_JSON_BYTES = 64 << 20
_TRAIN_DTYPE_OF = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def to_hf(src: Path, dst: Path, tokenizer_path: Path | None = None, *, console: Console) -> Path:
    """Write the weights of a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` opens.

    Args:
        src: a checkpoint, or a directory with `latest`.
        dst: folder to make; must not exist.
        tokenizer_path: the model's `tokenizer.json`, or its directory; copied, and its end-of-document id set as the
            end of generation.
        console: for progress.

    Returns: `dst`.

    Raises: CheckpointError: if the source is damaged, `dst` exists, or no family has models of this shape.
    """
    reader = Reader(find(src))
    model = reader.config().model
    family = family_for(model)
    steps = steps_of(family.steps, model)
    missing = [step.ours for step in steps if step.ours not in reader.manifest.tensors]
    if missing:
        raise damage(reader.directory, f"tensor {missing[0]}", "is not in the checkpoint")
    tokenizer = Tokenizer.from_file(tokenizer_path) if tokenizer_path is not None else None
    if tokenizer is not None and model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        rule = f"has {tokenizer.vocab_size} ids, the model has {model.vocab_size}"
        raise CheckpointError(Problem(str(tokenizer_path), rule, "give the tokenizer that it was trained with"))
    files = _files(list(_exported(reader, steps, model)))
    total = sum(math.prod(piece.shape) for pieces in files for piece in pieces)
    with new_directory(dst) as folder, progress(console, f"exporting {src}", total, "elements") as advance:
        weight_map: dict[str, str] = {}
        for index, pieces in enumerate(files, start=1):
            name = SINGLE if len(files) == 1 else f"model-{index:05d}-of-{len(files):05d}.safetensors"
            write_pieces(folder / name, pieces, advance)
            weight_map |= {piece.name: name for piece in pieces}
        if len(files) > 1:
            size = sum(_bytes(piece) for pieces in files for piece in pieces)
            _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        eos_id = tokenizer.eod_id if tokenizer else None
        dtype = str(files[0][0].dtype).removeprefix("torch.")
        _write_json(folder / "config.json", write_config(model, family, dtype, eos_id))
        _write_json(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": eos_id})
        if tokenizer is not None:
            tokenizer.save(folder)
    return dst


def from_hf(src: Path, dst: Path, *, console: Console) -> Path:
    """Write a checkpoint (step 0, weights alone) from a folder in Hugging Face's format.

    Args:
        src: folder with `config.json` and safetensors; a `tokenizer.json` in it becomes `data.tokenizer`.
        dst: directory of the checkpoint; must not exist.
        console: for progress.

    Returns: `dst`. Dtypes are kept.

    Raises: CheckpointError: if the folder is incomplete or damaged, holds pickles, or our model cannot be of that kind.
    """
    source = Folder.open(src)
    try:
        family, section = read_config(source.config)
    except CheckpointError as error:
        raise CheckpointError(error.problems, str(src / "config.json")) from None
    if section["n_layers"] > len(source.files):  # before anything loops over them
        rule = f"is more than a folder of {len(source.files)} tensors can have"
        raise damage(src / "config.json", f"num_hidden_layers = {section['n_layers']}", rule, "download it again")
    n_experts = (section.get("moe") or {}).get("num_experts", 0)
    if n_experts > len(source.files):
        rule = f"is more than a folder of {len(source.files)} tensors can have"
        raise damage(src / "config.json", f"num_experts = {n_experts}", rule, "download it again")
    dtypes = {source.dtype(name) for name in source.files}
    raw = {
        "model": section,
        "data": {"seq_length": min(section["max_seq_length"], DataConfig().seq_length)},
        "train": {"dtype": _TRAIN_DTYPE_OF[max(dtypes, key=lambda d: d.itemsize)]},
    }
    if (src / "tokenizer.json").is_file():
        raw["data"]["tokenizer"] = str(src / "tokenizer.json")
    config = config_from_dict(raw, where=str(src / "config.json"))
    pieces = list(_imported(source, steps_of(family.steps, config.model), config.model))
    total = sum(math.prod(piece.shape) for piece in pieces)
    with new_directory(dst) as folder, progress(console, f"importing {src}", total, "elements") as advance:
        table = write_pieces(folder / "weights.safetensors", pieces, advance)
        state = {"step": 0, "consumed_samples": 0, "config": config.model_dump(mode="json")}
        state_bytes = json.dumps(state, indent=1).encode()
        manifest = Manifest.build(0, [table], CHUNK_BYTES, state_bytes, dst)
        write_contents(folder, manifest, state_bytes)
    return dst


def steps_of(table: Sequence[Step], model: ModelConfig) -> list[Step]:
    """Return a family's steps for the tensors that a model has, in the model's order."""
    n_experts = model.moe.num_experts if model.moe is not None else 0
    layers = (step.at(layer, n_experts) for layer in range(model.n_layers) for step in table)
    by_name = {step.ours: step for step in layers}
    # Modules that look ahead serve training, and have no place in transformers' models.
    names = [spec.name for spec in parameter_specs(model) if not spec.tied and not spec.name.startswith("mtp.")]
    unnamed = [name for name in names if name not in by_name]
    assert not unnamed, f"the family has no name for {unnamed[0]}"
    return [by_name[name] for name in names]


def _exported(reader: Reader, steps: Sequence[Step], model: ModelConfig) -> Iterator[NewPiece]:
    """Yield their tensors in order; parts of one fused tensor share a single read."""

    @lru_cache(maxsize=1)
    def parts(step: Step) -> Sequence[Tensor]:
        record = reader.manifest.tensors[step.ours]
        shard = tensor_shard(step.ours, record, whole(record.shape), DTYPES[record.dtype])
        reader.fill([shard])
        return step.split(shard.tensor, model)

    def part(step: Step, index: int) -> Tensor:
        return parts(step)[index]

    for step in steps:
        record = reader.manifest.tensors[step.ours]
        dtype = DTYPES[record.dtype]
        for index, shape in enumerate(_shapes(step.split(torch.empty(record.shape, device="meta"), model))):
            yield NewPiece(step.theirs[index], shape, dtype, whole(shape), partial(part, step, index))


def _imported(source: "Folder", steps: Sequence[Step], model: ModelConfig) -> Iterator[NewPiece]:
    """Yield our tensors, after checking that the folder holds exactly their parts in fitting shapes.

    Raises: CheckpointError: with every tensor that is missing, left over, or of another shape.
    """
    used = {their for step in steps for their in step.theirs}
    problems = [Problem(f"tensor {name}", "is not in the folder") for name in sorted(used - source.files.keys())]
    # Old folders hold rotary tables, and some a copy of a tied head; neither says anything new.
    ignored = {n for n in source.files if n.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    extra = sorted(source.files.keys() - used - ignored)
    problems += [
        Problem(f"tensor {name}", "has no place in this kind of model", "convert another model") for name in extra
    ]
    if problems:
        raise CheckpointError(problems[:10], str(source.path))

    def joined(step: Step) -> Tensor:
        return step.join([source.read(name) for name in step.theirs], model)

    expected = {spec.name: spec.shape for spec in parameter_specs(model)}
    for step in steps:
        shape, dtype = expected[step.ours], source.dtype(step.theirs[0])
        theirs = _shapes(step.split(torch.empty(shape, device="meta"), model))
        for name, their_shape in zip(step.theirs, theirs):
            if source.shape(name) != their_shape or source.dtype(name) != dtype:
                found = f"{source.dtype(name)} {list(source.shape(name))}"
                rule = f"is {found}, config.json asks for {dtype} {list(their_shape)}"
                raise CheckpointError(Problem(f"tensor {name}", rule, "check config.json"), str(source.path))
        yield NewPiece(step.ours, shape, dtype, whole(shape), partial(joined, step))


@dataclass(frozen=True)
class Folder:
    """A folder in Hugging Face's format.

    Attributes:
        path: of the folder.
        config: its `config.json`.
        files: the file that holds each tensor.
        kinds: dtype and shape of each tensor.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Find the tensors and read every file's header.

        Raises: CheckpointError: if a file is missing or damaged, or the weights are pickles.
        """
        config = _read_json(path, "config.json")
        names = cls._weight_files(path)
        files: dict[str, str] = {}
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in names:
            try:
                with safe_open(path / name, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118
                        part = tensors.get_slice(key)
                        dtype = DTYPES.get(part.get_dtype())
                        if dtype not in _TRAIN_DTYPE_OF:
                            rule = f"is {part.get_dtype()}, a quantised or integer weight"
                            raise damage(path, f"{name}, tensor {key}", rule, "convert the unquantised model")
                        files[key], kinds[key] = name, (dtype, tuple(part.get_shape()))
            except FileNotFoundError:
                raise damage(path, name, "is missing", "download the folder again") from None
            except (SafetensorError, OSError) as error:
                raise damage(path, name, f"is damaged: {error}", "download the folder again") from None
        return cls(path, config, files, kinds)

    @staticmethod
    def _weight_files(path: Path) -> list[str]:
        if (path / INDEX).is_file():
            weight_map = _read_json(path, INDEX).get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            plain = {n for n in names if isinstance(n, str) and n.endswith(".safetensors") and Path(n).name == n}
            if not names or names != plain:
                raise damage(path, INDEX, "must name *.safetensors files in the folder itself", "download it again")
            return sorted(plain)
        if (path / SINGLE).is_file():
            return [SINGLE]
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            remedy = "save it with transformers: model.save_pretrained(folder, safe_serialization=True)"
            raise damage(path, "*.bin", "are pickles, which can run code when they are opened", remedy)
        raise damage(path, path.name, f"holds neither {SINGLE} nor {INDEX}", "give a folder in Hugging Face's format")

    def dtype(self, name: str) -> torch.dtype:
        return self.kinds[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.kinds[name][1]

    def read(self, name: str) -> Tensor:
        with safe_open(self.path / self.files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor


def _files(pieces: Sequence[NewPiece]) -> list[list[NewPiece]]:
    """Group tensors into files of at most `LARGEST_FILE_BYTES`, or of one larger tensor."""
    files: list[list[NewPiece]] = [[]]
    size = 0
    for piece in pieces:
        if files[-1] and size + _bytes(piece) > LARGEST_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += _bytes(piece)
    return files


def _bytes(piece: NewPiece) -> int:
    return math.prod(piece.shape) * piece.dtype.itemsize


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    remedy = "give a folder in Hugging Face's format"
    try:
        if file.stat().st_size > _LARGEST_JSON_BYTES:
            raise damage(path, name, f"has more than the {_LARGEST_JSON_BYTES} bytes it may have", remedy)
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise damage(path, name, f"cannot be read: {error.strerror}", remedy) from None
    except (ValueError, RecursionError):
        raise damage(path, name, "is not JSON", remedy) from None
    if not isinstance(value, dict):
        raise damage(path, name, "must hold a table", remedy)
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
