"""What a layer costs: bytes kept for its backward, counted; operations of its parts, by formula.

The bytes are counted, not estimated: one forward on the meta device, where tensors are shapes alone, shows every tensor
that autograd would keep, under any plan and on any layout. By hand, with RMSNorm, SwiGLU, blocked attention
and no recomputation: the inputs of 2 norms and of the 2 products behind them; q and k, rotated; v; the heads' output;
gate and up, and their product: s·b·(4h + 2nd + 2kd + 3f) numbers, and a few a token.

Legend: `s` tokens of this rank, `S` of the sequence, `b` micro-batch, `h` hidden, `n` query heads, `k` key/value heads,
`d` head dimension, `f` feed-forward size.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.nn.activations import NOTHING, WHOLE, Activations, Recompute
from megascratch.nn.active import active_numel
from megascratch.nn.placement import Placement
from megascratch.nn.rotary import rotary_tables
from megascratch.nn.sequence import SequenceInfo
from megascratch.nn.transformer import Block

META = torch.device("meta")


@dataclass(frozen=True)
class LayerShape:
    """A layer as one rank runs it: all that its costs depend on.

    Attributes:
        model: resolved shape.
        placement: of the rank; its process groups are not used.
        micro_batch: b.
        seq_length: S.
        core: key of `nn.attention.CORES`.
        experts: whether its feed-forward half is a mixture of experts.
        packed: whether sequences hold several documents.
    """

    model: ModelConfig
    placement: Placement
    micro_batch: int
    seq_length: int
    core: str
    experts: bool = False
    packed: bool = False

    def kept_bytes(self, plan: Recompute) -> int:
        """Count the bytes that a layer keeps on the device between its forward and its backward."""
        if plan.offload:
            return 0  # on the device; smaller tensors that stay are not worth a line
        kept: list[Tensor] = []
        placement = replace(self.placement, device=META, activations=Activations(kept.append))
        # Both keep q, k, v, the output and one number a query, but torch's own has no such version on meta.
        core = "blocked" if self.core == "sdpa" else self.core
        block = Block(self.model, placement, self._index, core=core).train()
        length, b = self.seq_length // placement.cp.size, self.micro_batch
        own = length // (placement.tp.size if placement.sequence_parallel else 1)
        x = torch.empty(own, b, self.model.hidden, dtype=placement.dtype, device=META, requires_grad=True)
        tables = rotary_tables(self.model, ops.acc_dtype(x), META) if self.model.position == "rope" else None
        places = torch.empty(b, length, dtype=torch.int64, device=META)
        info = SequenceInfo(
            length,
            positions=places if placement.cp.size > 1 or self.packed else None,
            documents=places if self.packed else None,
            sample_ids=torch.empty(b, dtype=torch.int64, device=META),
        )
        placement.activations.run(plan, block, x, tables, info)
        lasting = {p.untyped_storage()._cdata for p in block.parameters()}
        lasting |= {table.untyped_storage()._cdata for table in tables or ()}
        sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
        return sum(size for storage, size in sizes.items() if storage not in lasting)

    @property
    def _index(self) -> int:
        """The number of a layer of this kind."""
        return next(i for i in range(self.model.n_layers) if self.model.has_experts(i) == self.experts)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts that are worth computing again by themselves, those that save most bytes an operation first.

        Worth it is a part that saves more bytes an operation than computing the whole layer again would.
        """
        everything = self.kept_bytes(NOTHING)
        tokens = self.micro_batch * self.seq_length
        whole = (everything - self.kept_bytes(WHOLE)) / (tokens * self._operations())
        gains = {
            part: (everything - self.kept_bytes(Recompute(frozenset([part])))) / (tokens * operations)
            for part, operations in self._part_operations().items()
        }
        return tuple(sorted((part for part in gains if gains[part] > whole), key=lambda part: -gains[part]))

    def _part_operations(self) -> dict[str, float]:
        """Return the operations a token of every part's forward, at tp = 1: more ranks divide all parts alike."""
        model = self.model
        features = model.ffn_hidden
        if self.experts and model.moe is not None:
            features = model.moe.router_topk * model.moe.ffn_hidden + (model.moe.shared_expert_ffn_hidden or 0)
        parts = {
            "layernorm": (4 if model.norm_position == "both" else 2) * 4.0 * model.hidden,
            "mlp_act": 8.0 * features,
            "core_attn": 2.0 * model.seen_keys(self.seq_length) * model.n_heads * model.attended_dims,
        }
        if (mla := model.mla) is not None:
            parts["mla_up_proj"] = 2.0 * mla.kv_lora_rank * model.n_heads * (mla.qk_head_dim + mla.v_head_dim)
        return parts

    def _operations(self) -> float:
        """Return the operations a token of a whole layer's forward, at tp = 1."""
        own = f"layers.{self._index}."
        weights = sum(numel for name, numel in active_numel(self.model).items() if name.startswith(own))
        return 2.0 * weights + self._part_operations()["core_attn"]
