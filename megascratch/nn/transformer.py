"""The decoder: blocks, and the stage of consecutive blocks that one pipeline rank runs.

Legend: `s` sequence, `b` micro-batch, `h` hidden, `v` vocabulary; activations between blocks are [s, b, h], divided
along s under sequence parallelism.

A whole model is the stage that is both first and last. Module paths are global names: a stage that holds layers 8 to 15
calls them `layers.8` … `layers.15`, so a parameter has the same name on every layout.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from megascratch import ops
from megascratch.config import ModelConfig
from megascratch.dist.layout import Init, ParamSpec, name_parameters, spec_of
from megascratch.dist.mesh import Axis
from megascratch.nn.activations import NOTHING, Recompute
from megascratch.nn.attention import Attention, LayerCache
from megascratch.nn.embedding import (
    LearnedPositions,
    VocabParallelEmbedding,
    embed,
    local_positions,
    vocabulary_split,
)
from megascratch.nn.latent_attention import LatentAttention
from megascratch.nn.linear import column_linear
from megascratch.nn.loss import capped
from megascratch.nn.mlp import make_mlp
from megascratch.nn.moe import MoE
from megascratch.nn.multi_token import Ahead
from megascratch.nn.norm import LayerNorm, RMSNorm, make_norm
from megascratch.nn.placement import Placement
from megascratch.nn.rotary import rotary_tables
from megascratch.nn.sequence import ResidualDropout, SequenceInfo


def layer_range(n_layers: int, stage: int, n_stages: int, layers_per_stage: Sequence[int] = ()) -> range:
    """Return the layers of a stage: consecutive, as many as are given for it, or as even as the counts allow."""
    if not layers_per_stage:
        return range(stage * n_layers // n_stages, (stage + 1) * n_layers // n_stages)
    assert len(layers_per_stage) == n_stages and sum(layers_per_stage) == n_layers
    first = sum(layers_per_stage[:stage])
    return range(first, first + layers_per_stage[stage])


class Block(nn.Module):
    """Attention and feed-forward, each on a residual branch.

    Norms stand before each branch (`pre`), on its output (`post`, OLMo 2, arXiv:2501.00656, section 3.3), or on both
    sides (`both`, Gemma 2, arXiv:2408.00118).
    """

    def __init__(self, model: ModelConfig, placement: Placement, index: int, *, core: str) -> None:
        super().__init__()
        site = f"layers.{index}"
        # Outputs onto the residual stream shrink with its length (Radford et al. 2019, section 2.3).
        out_std = model.init_std / math.sqrt(2 * model.n_layers)
        self.placement = placement
        self.post = model.norm_position == "post"
        self.window = model.window_of(index)
        self.attn_norm = make_norm(model, placement)
        attention = Attention if model.mla is None else LatentAttention
        self.attn = attention(model, placement, f"{site}.attn", core=core, out_std=out_std, window=self.window)
        self.mlp_norm = make_norm(model, placement)
        self.attn_out_norm: RMSNorm | LayerNorm | None = None
        self.mlp_out_norm: RMSNorm | LayerNorm | None = None
        if model.norm_position == "both":
            self.attn_out_norm, self.mlp_out_norm = (make_norm(model, placement) for _ in range(2))
        self.mlp: nn.Module
        if model.has_experts(index):
            self.mlp = MoE(model, placement, f"{site}.mlp", out_std=out_std)
        else:
            self.mlp = make_mlp(model, placement, out_std=out_std)
        self.attn_dropout = ResidualDropout(f"{site}.attn", model.dropout, placement)
        self.mlp_dropout = ResidualDropout(f"{site}.mlp", model.dropout, placement)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        info: SequenceInfo,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map x [s/tp or s, b, h] to the same shape; arguments as in `Attention.forward`."""
        if self.post:
            x = x + self.attn_dropout(self.attn_norm(self.attn(x, rotary, info, cache)), info)
            return x + self.mlp_dropout(self.mlp_norm(self._feed_forward(x, info)), info)
        activations = self.placement.activations
        normalised = activations.part("layernorm", self.attn_norm, x)
        branch = self._normalised(self.attn_out_norm, self.attn(normalised, rotary, info, cache))
        normalised, x = self.mlp_norm.after_add(self.attn_dropout(branch, info), x)
        activations.note("layernorm", normalised, self.mlp_norm, x)  # the sum is kept anyway
        branch = self._normalised(self.mlp_out_norm, self._feed_forward(normalised, info))
        return x + self.mlp_dropout(branch, info)

    def _normalised(self, norm: nn.Module | None, branch: Tensor) -> Tensor:
        return branch if norm is None else self.placement.activations.part("layernorm", norm, branch)

    def _feed_forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        return self.mlp(x, info) if isinstance(self.mlp, MoE) else self.mlp(x)


class Head(nn.Module):
    """The output projection onto the vocabulary, divided over tp as the embedding is."""

    def __init__(self, model: ModelConfig, placement: Placement, grad_axes: tuple[str, ...]) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.weight = placement.parameter(
            model.vocab_size,
            model.hidden,
            splits=(vocabulary_split(model.vocab_size, placement.tp.size),),
            grad_axes=grad_axes,
            init=Init(model.init_std),
        )


class Score(nn.Module):
    """One number a token instead of logits, [1, h]: a reward model's or a critic's head, whole on every rank of tp."""

    def __init__(self, model: ModelConfig, placement: Placement) -> None:
        super().__init__()
        axes = placement.token_axes
        self.weight = placement.parameter(1, model.hidden, grad_axes=axes, init=Init(model.init_std))


class Stage(nn.Module):
    """Consecutive layers, with the embedding on the first stage and the final norm and head on the last.

    Args:
        model: resolved shape, vocabulary size included.
        placement: where the parameters lie; they are allocated, and filled by `initialize`.
        stage, n_stages: which of how many; one of one is the whole model.
        core: attention core, a key of `nn.attention.CORES`.
        recompute: what each layer, by its number, does not keep for backward; layers left out keep everything.
        layers_per_stage: how many layers each stage holds; even when empty.
        tied_axes: axes over which the two copies of a tied embedding lie apart.
        embedding: the first stage's, for a last stage on the same rank that needs it, too.
    """

    def __init__(
        self,
        model: ModelConfig,
        placement: Placement,
        stage: int = 0,
        n_stages: int = 1,
        *,
        core: str = "softmax",
        recompute: Mapping[int, Recompute] | None = None,
        layers_per_stage: Sequence[int] = (),
        tied_axes: tuple[str, ...] = ("ends",),
        embedding: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.model, self.placement = model, placement
        self.embedding_scale = torch.tensor(math.sqrt(model.hidden), dtype=placement.dtype, device="cpu").item()
        self.is_first, self.is_last = stage == 0, stage == n_stages - 1
        self.recompute = recompute or {}
        indices = layer_range(model.n_layers, stage, n_stages, layers_per_stage)
        # An embedding that lies on two ranks gets its gradient from both.
        tied_axes = tied_axes if model.embeds_at_end and n_stages > 1 else ()
        if self.is_first:
            self.embed = VocabParallelEmbedding(
                model.vocab_size, model.hidden, placement, std=model.init_std, grad_axes=tied_axes
            )
            if model.position == "learned":
                self.position = LearnedPositions(model.max_seq_length, model.hidden, placement, std=model.init_std)
            self.embed_dropout = ResidualDropout("embed", model.dropout, placement)
        self.layers = nn.ModuleDict({str(i): Block(model, placement, i, core=core) for i in indices})
        if self.is_last:
            self._make_end(embedding, tied_axes, core)
        # The rotary tables of layers that see everything, and of those with a window.
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.local_rotary: tuple[Tensor, Tensor] | None = None
        if model.position == "rope":
            table_dtype = ops.acc_dtype(torch.empty(0, dtype=placement.dtype))
            self.rotary = self.local_rotary = rotary_tables(model, table_dtype, placement.device)
            if model.rope_local_theta is not None:
                self.local_rotary = rotary_tables(model, table_dtype, placement.device, local=True)
        copies = {"head.weight": "embed.weight"} if model.tie_embeddings else {}
        if self.is_last and not self.is_first and embedding is None:
            copies["embed.weight"] = "embed.weight"
        name_parameters(self, tied=copies)

    def _make_end(self, embedding: VocabParallelEmbedding | None, tied_axes: tuple[str, ...], core: str) -> None:
        """Make what only the last stage has: norm, head, modules that look further ahead."""
        model, at = self.model, self.placement
        assert model.vocab_size is not None
        self.norm = make_norm(model, at)
        if model.head == "scalar":
            self.score = Score(model, at)
            return
        if embedding is not None:
            self.embed = embedding
        if not (model.tie_embeddings and hasattr(self, "embed")):
            self.head = Head(model, at, tied_axes if model.tie_embeddings else ())
        if model.mtp_num_layers == 0:
            return
        if not model.tie_embeddings and not hasattr(self, "embed"):
            v, h = model.vocab_size, model.hidden
            self.embed = VocabParallelEmbedding(v, h, at, std=model.init_std, grad_axes=tied_axes)
        layers = range(model.n_layers, model.n_layers + model.mtp_num_layers)
        self.mtp = nn.ModuleList(Ahead(model, at, Block(model, at, i, core=core)) for i in layers)

    def forward(
        self,
        x: Tensor | None,
        tokens: Tensor | None,
        info: SequenceInfo,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Run the stage on one micro-batch: `hidden`, and on the last stage this rank's logits [s, b, v/tp] of it.

        Of a model with a scalar head, the last stage gives its numbers, [s/tp or s, b, 1].
        """
        x = self.hidden(x, tokens, info, caches)
        if not self.is_last:
            return x
        return scores(x, self.score.weight) if self.model.head == "scalar" else self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits [s, b, v/tp] of what `hidden` gave on the last stage."""
        logits = column_linear(x, self.head_weight, self.placement.tp, self.placement.sequence_parallel)
        return capped(logits, self.model.logit_softcap)

    @property
    def head_weight(self) -> Tensor:
        """The last stage's projection onto the vocabulary, [v/tp, h]; the embedding's, where the two are tied.

        Of a model with a scalar head, its row, [1, h].
        """
        if self.model.head == "scalar":
            return self.score.weight
        return self.head.weight if hasattr(self, "head") else self.embed.weight

    def look_ahead(self, x: Tensor, tokens: Sequence[Tensor], info: SequenceInfo) -> list[Tensor]:
        """Run the modules that predict further tokens, on the last stage.

        Args:
            x: from `trunk`.
            tokens: for each module, [b, s] int64: the tokens one, two, … places later.
            info: positions and samples.

        Returns: for each, activations [s/tp or s, b, h], normalised for the head.
        """
        weight = self.embed.weight if hasattr(self, "embed") else self.head.weight
        hidden = []

        def run(layer: nn.Module, x: Tensor, plan: Recompute) -> Tensor:
            return self.placement.activations.run(plan, layer, x, self._rotary_of(layer), info)

        for i, (module, later) in enumerate(zip(self.mtp, tokens)):
            plan = self.recompute.get(self.model.n_layers + i, NOTHING)
            embedded = self._scaled(embed(later, weight, self.placement))
            x, normalised = module(x, embedded, partial(run, plan=plan))
            hidden.append(normalised)
        return hidden

    def hidden(
        self,
        x: Tensor | None,
        tokens: Tensor | None,
        info: SequenceInfo,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Run all of the stage but the head: `trunk`, normalised for the head on the last stage."""
        x = self.trunk(x, tokens, info, caches)
        return self.norm(x) if self.is_last else x

    def trunk(
        self,
        x: Tensor | None,
        tokens: Tensor | None,
        info: SequenceInfo,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Run the stage's layers, after the embedding on the first stage.

        Args:
            x: the previous stage's output, [s/tp or s, b, h]; None on the first stage.
            tokens: [b, s] int64; read on the first stage only.
            info: positions and samples.
            caches: one a layer, in order, for generation; None in training.

        Returns: activations [s/tp or s, b, h].
        """
        if self.is_first:
            assert tokens is not None
            x = self._embed(tokens, info)
        assert x is not None
        for i, (layer, block) in enumerate(self.layers.items()):
            if caches is not None:
                x = block(x, self._rotary_of(block), info, caches[i])
            else:
                plan = self.recompute.get(int(layer), NOTHING)
                x = self.placement.activations.run(plan, block, x, self._rotary_of(block), info)
        return x

    def _rotary_of(self, block: nn.Module) -> tuple[Tensor, Tensor] | None:
        assert isinstance(block, Block)
        return self.rotary if block.window is None else self.local_rotary

    def _scaled(self, embedded: Tensor) -> Tensor:
        """Multiply by √h, rounded to the embedding's type as Gemma was trained with, where the model does so."""
        return embedded * self.embedding_scale if self.model.scale_embeddings else embedded

    def _embed(self, tokens: Tensor, info: SequenceInfo) -> Tensor:
        x = self._scaled(self.embed(tokens))
        if self.model.position == "learned":
            own = local_positions(info.length, info.offset, self.placement)
            positions = own.unsqueeze(1) if info.positions is None else info.positions.t()[own - info.offset]
            x = x + self.position(positions)
        return self.embed_dropout(x, info)


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply activations [..., h] by a scalar head's row [1, h] in `acc_dtype`: [..., 1]."""
    dtype = ops.acc_dtype(x)
    return x.to(dtype) @ weight.to(dtype).t()


@cache  # what balances and counts a model asks for it again and again
def parameter_specs(model: ModelConfig, tp: int = 1, sequence_parallel: bool = False) -> tuple[ParamSpec, ...]:
    """Return the spec of every logical parameter of a model, in the order of its layers, without allocating any.

    Args:
        model: resolved shape, vocabulary size included.
        tp: size of the tensor-parallel axis; only vocabulary padding depends on it.
        sequence_parallel: decides `grad_axes` alone.
    """
    placement = Placement(Axis("tp", tp), sequence_parallel, torch.float32, torch.device("meta"))
    return tuple(spec_of(param) for param in Stage(model, placement).parameters())
