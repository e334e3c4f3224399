"""What becomes of adapters after training: merged into the weights, or written for Hugging Face's PEFT.

    merged        W + (α/r) · B A      a source like any other, without adapters: every format can be written from it
    write_peft    adapter_model.safetensors, adapter_config.json      what `PeftModel.from_pretrained` opens

A layer whose weight is several matrices fused has one A for all of them: PEFT, which has an adapter for each, gets
copies of it, and of B the rows that are each matrix's own. Their product is the same.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from megascratch.checkpoint.families import family_for
from megascratch.checkpoint.format import whole
from megascratch.checkpoint.hf import steps_of
from megascratch.checkpoint.pieces import NewPiece, new_directory, write_pieces
from megascratch.checkpoint.source import Source
from megascratch.config import LoraConfig
from megascratch.dist.layout import Box
from megascratch.errors import CheckpointError, Problem
from megascratch.log import progress
from megascratch.nn import is_target
from megascratch.nn.adapters import MARK

_PREFIX = "base_model.model."


def merged(source: Source) -> Source:
    """Return a source whose weights have the adapters in them; the optimizer stays behind.

    Raises: CheckpointError: if it has no adapters.
    """
    lora = _lora_of(source)

    def read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
        if not is_target(name, lora):
            return source.read(name, box, dtype)
        weight = source.read(name, box)
        layer = name.removesuffix(".weight")
        down, up = (_whole(source, f"{layer}{MARK}{part}.weight").double() for part in ("down", "up"))
        *rows, columns = box
        each = rows[:1] if down.dim() == 3 else ()  # experts
        product = torch.einsum(
            "...or,...ri->...oi", up[tuple(rows)].flatten(len(each), -2), down[(*each, slice(None), columns)]
        )
        added = lora.alpha / lora.rank * product.view(weight.shape)
        return (weight.double() + added).to(weight.dtype).to(dtype)

    kinds = {name: kind for name, kind in source.weights.items() if MARK not in name}
    config = source.config.model_copy(update={"lora": None})
    return replace(source, config=config, kinds=kinds, read_box=read, state={})


def write_peft(source: Source, dst: Path, *, console: Console) -> Path:
    """Write the adapters as a folder that PEFT puts beside the exported base model.

    Args:
        source: with adapters.
        dst: folder to make; must not exist.
        console: for progress.

    Returns: `dst`.

    Raises: CheckpointError: if the source is damaged, has no adapters or such of experts, `dst` exists, or no family
        has such models.
    """
    lora, model = _lora_of(source), source.config.model
    if of_experts := [name for name, kind in source.weights.items() if MARK in name and len(kind.shape) > 2]:
        rule = "is of all experts, for which PEFT has no form that every model of Hugging Face's shares"
        raise CheckpointError(Problem(of_experts[0], rule, "convert with --merge"), str(source.path))
    pieces: list[NewPiece] = []
    modules: set[str] = set()
    for step in steps_of(family_for(model).steps, model):
        if not is_target(step.ours, lora):
            continue
        layer = step.ours.removesuffix(".weight")
        down, up = (_whole(source, f"{layer}{MARK}{part}.weight") for part in ("down", "up"))
        for their, rows in zip(step.theirs, step.split(up, model)):
            module = their.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            for part, tensor in (("lora_A", down), ("lora_B", rows.contiguous())):
                shape = tuple(tensor.shape)
                name = f"{_PREFIX}{module}.{part}.weight"
                pieces.append(NewPiece(name, shape, tensor.dtype, whole(shape), partial(_itself, tensor)))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    total = sum(piece.bytes for piece in pieces)
    with new_directory(dst) as folder, progress(console, f"exporting {source.path}", total, "B") as advance:
        write_pieces(folder / "adapter_model.safetensors", pieces, advance)
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    return dst


def _itself(value: Tensor) -> Tensor:
    return value


def _lora_of(source: Source) -> LoraConfig:
    if source.config.lora is None:
        rule = "has no adapters: it was trained without [lora]"
        raise CheckpointError(Problem(str(source.path), rule, "convert it as it is"))
    return source.config.lora


def _whole(source: Source, name: str) -> Tensor:
    source.require([name])
    return source.read(name)
