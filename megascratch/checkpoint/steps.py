"""Reversible steps between one of our tensors and the tensors of Hugging Face's format that hold the same numbers.

By hand, for 4 query heads on 2 key/value heads:

    ours     layers.0.attn.qkv.weight     rows of kv group 0: q0 q1 k0 v0, of kv group 1: q2 q3 k1 v1
    theirs   …self_attn.q_proj.weight     q0 q1 q2 q3
             …self_attn.k_proj.weight     k0 k1
             …self_attn.v_proj.weight     v0 v1

Both rotate halves, so no head is permuted. Vocabulary padding is physical and never reaches a checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascratch.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """One tensor of ours and the tensors of theirs that hold the same numbers; `{i}` in a name stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    same: bool = False  # whether it is one tensor under another name

    def at(self, layer: int, n_experts: int = 0) -> "Step":
        """Return the step for one layer; names with `{e}` become one an expert, expert after expert."""
        theirs = tuple(their.replace("{i}", f"{layer}") for their in self.theirs)
        if "{e}" in theirs[0]:
            theirs = tuple(their.replace("{e}", f"{expert}") for expert in range(n_experts) for their in theirs)
        return Step(self.ours.replace("{i}", f"{layer}"), theirs, self.split, self.join, self.same)


def rename(ours: str, theirs: str) -> Step:
    """The same tensor by another name."""
    return Step(ours, (theirs,), lambda tensor, _: (tensor,), lambda tensors, _: tensors[0], same=True)


def halves(ours: str, first: str, second: str) -> Step:
    """Two tensors of equal shape, one above the other: [gate; up]."""
    return Step(ours, (first, second), lambda tensor, _: tensor.chunk(2), lambda tensors, _: torch.cat(list(tensors)))


def each_expert(ours: str, *theirs: str) -> Step:
    """A stack of experts [E, …, rows, columns], of one or two matrices each, and a tensor for each matrix of each."""

    def split(tensor: Tensor, _: ModelConfig) -> Sequence[Tensor]:
        return tensor.flatten(0, -3).unbind(0)

    def join(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        assert model.moe is not None
        stack = torch.stack(list(tensors))
        return stack if len(theirs) == 1 else stack.unflatten(0, (model.moe.num_experts, len(theirs)))

    return Step(ours, theirs, split, join)


def rotary_rows(ours: str, theirs: str, layout: Callable[[ModelConfig], tuple[int, int]]) -> Step:
    """Rows whose last few, in every group, are rotated: as halves here, as neighbouring pairs in DeepSeek's weights.

    Args:
        layout: gives the number of groups (heads, or one), and how many rows of each are rotated.
    """

    def split(tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
        return (_regrouped(tensor, model, lambda rows: rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),)

    def join(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        return _regrouped(tensors[0], model, lambda rows: rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))

    def _regrouped(tensor: Tensor, model: ModelConfig, change: Callable[[Tensor], Tensor]) -> Tensor:
        groups, rotated = layout(model)
        grouped = tensor.unflatten(0, (groups, -1))
        plain, rows = grouped.split([grouped.shape[1] - rotated, rotated], dim=1)
        return torch.cat((plain, change(rows)), dim=1).flatten(0, 1)

    return Step(ours, (theirs,), split, join)


def grouped_qkv(ours: str, q: str, k: str, v: str) -> Step:
    """Rows [q … q, k, v] of each key/value group, or three tensors with the heads of one kind each."""

    def split(tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
        groups, queries, d = _heads(model)
        grouped = tensor.reshape(groups, queries + 2, d, *tensor.shape[1:])
        parts = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]

    def join(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        groups, _, d = _heads(model)
        rest = tensors[0].shape[1:]
        return torch.cat([tensor.reshape(groups, -1, d, *rest) for tensor in tensors], dim=1).reshape(-1, *rest)

    return Step(ours, (q, k, v), split, join)


def fused(step: Step, theirs: str) -> Step:
    """The tensors of a step as one, whose rows follow each other."""

    def split(tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
        return (torch.cat(list(step.split(tensor, model))),)

    def join(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        parts = step.split(torch.empty_like(tensors[0], device="meta"), model)
        return step.join(tensors[0].split([len(part) for part in parts]), model)

    return Step(step.ours, (theirs,), split, join)


def transposed(step: Step) -> Step:
    """The tensors of a step as matrices [in, out], where ours are [out, in]."""

    def split(tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
        return [part.t() for part in step.split(tensor, model)]

    def join(tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        return step.join([tensor.t() for tensor in tensors], model)

    return Step(step.ours, step.theirs, split, join)


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """Return (key/value heads, query heads for each of them, head dimension)."""
    assert model.n_kv_heads is not None
    assert model.head_dim is not None
    return model.n_kv_heads, model.n_heads // model.n_kv_heads, model.head_dim
