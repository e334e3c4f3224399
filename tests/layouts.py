"""The one list of layouts, shared by the tests of parity, resume and conversion, and what it takes to run on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megascratch.config import Config, config_from_dict
from megascratch.data.microbatch import Microbatch
from megascratch.data.sampler import Batches
from megascratch.data.samples import Sample
from megascratch.dist.layout import extents, spec_of
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.engine import Engine, StepReport, next_token

VOCAB_SIZE, SEQ_LENGTH, GLOBAL_BATCH = 61, 16, 8

BASE = {
    "n_layers": 4,
    "hidden": 32,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": 8,
    "ffn_hidden": 48,
    "vocab_size": VOCAB_SIZE,
    "max_seq_length": 32,
    "init_std": 0.1,  # large enough that every part of the model matters to the loss
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "tied": {**BASE, "tie_embeddings": True},
    "qwen": {**BASE, "qk_norm": True, "qkv_bias": True},
    "gpt2": {
        **BASE,
        "n_kv_heads": 8,
        "norm": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "tie_embeddings": True,
    },
    "olmo": {**BASE, "norm_position": "post", "activation": "geglu"},
    # First layer dense; groups, sigmoid scores, biases, a shared expert with a gate.
    "moe": {
        **BASE,
        "moe": {
            "num_experts": 8,
            "router_topk": 2,
            "ffn_hidden": 16,
            "first_k_dense": 1,
            "router_score_function": "sigmoid",
            "router_num_groups": 4,
            "router_group_topk": 2,
            "router_topk_scaling_factor": 1.5,
            "router_load_balancing_type": "seq_aux_loss",
            "aux_loss_coeff": 0.1,
            "z_loss_coeff": 0.01,
            "router_enable_expert_bias": True,
            "router_bias_update_rate": 0.01,
            "shared_expert_ffn_hidden": 24,
            "shared_expert_gate": True,
        },
    },
    # Every second layer; a limit that drops tokens.
    "moe-capacity": {
        **BASE,
        "moe": {
            "num_experts": 4,
            "ffn_hidden": 24,
            "layer_freq": 2,
            "expert_capacity_factor": 1.0,
            "router_load_balancing_type": "seq_aux_loss",
            "aux_loss_coeff": 0.1,
        },
    },
    "dropout": {**BASE, "dropout": 0.1, "activation": "relu2"},
}


@dataclass(frozen=True)
class Layout:
    """A layout of up to 8 ranks and the model that it is tried with.

    Attributes:
        name: what distinguishes it.
        parallel: `[parallel]` keys.
        model: key of `MODELS`.
        micro_batch: samples in a micro-batch.
        packed: whether samples hold several documents, each blind to the others.
        optim: name of the optimizer.
    """

    name: str
    parallel: dict[str, Any]
    model: str = "llama"
    micro_batch: int = 1
    packed: bool = False
    optim: str = "adamw"

    @property
    def world(self) -> int:
        return int(np.prod([self.parallel.get(axis, 1) for axis in ("tp", "pp", "cp", "dp")]))


def _layout(
    name: str,
    model: str = "llama",
    micro_batch: int = 1,
    packed: bool = False,
    optim: str = "adamw",
    **parallel: Any,
) -> Layout:
    return Layout(name, parallel, model, micro_batch, packed, optim)


LAYOUTS = [
    _layout("tp2", tp=2),
    _layout("tp2-no-sp", "gpt2", tp=2, sequence_parallel=False),
    _layout("tp4-qwen", "qwen", tp=4),
    _layout("tp2-no-sp-qwen", "qwen", tp=2, sequence_parallel=False),
    _layout("pp2-gpipe", "tied", pp=2, schedule="gpipe"),
    _layout("pp2-1f1b", "gpt2", micro_batch=2, pp=2),
    _layout("pp4-1f1b-recompute", "olmo", pp=4, recompute="full"),
    _layout("pp2-vp2-interleaved", "tied", pp=2, vp=2),
    _layout("dp2", "olmo", dp=2),
    _layout("dp4-zero1", "tied", dp=4, zero=1),
    _layout("dp2-zero1-mb2", dp=2, zero=1, micro_batch=2),
    _layout("tp2-dp2-zero1", "gpt2", tp=2, dp=2, zero=1),
    _layout("tp2-pp2", "tied", tp=2, pp=2),
    _layout("tp2-pp2-dropout-recompute", "dropout", tp=2, pp=2, recompute="full"),
    _layout("tp2-pp2-vp2-no-sp", "qwen", tp=2, pp=2, vp=2, sequence_parallel=False),
    _layout("pp2-dp2-zero1-gpipe", "qwen", pp=2, dp=2, zero=1, schedule="gpipe"),
    _layout("tp2-pp2-dp2-zero1", "tied", tp=2, pp=2, dp=2, zero=1),
    _layout("tp2-pp2-dp2-vp2-dropout", "dropout", tp=2, pp=2, dp=2, vp=2),
    _layout("tp4-dp2-recompute", "olmo", tp=4, dp=2, recompute="full"),
    _layout("tp2-packed", packed=True, tp=2),
    _layout("cp2-ring", "qwen", cp=2),
    _layout("cp4-ring-packed", packed=True, cp=4),
    _layout("cp2-ulysses-packed", packed=True, cp=2, cp_algorithm="ulysses"),
    _layout("cp2-all-gather-learned", "gpt2", cp=2, cp_algorithm="all_gather"),
    _layout("cp2-tp2-dp2-zero1", "tied", cp=2, tp=2, dp=2, zero=1),
    _layout("cp2-tp2-pp2-packed", packed=True, cp=2, tp=2, pp=2),
    _layout("cp2-pp2-vp2-dp2-ulysses", "olmo", cp=2, pp=2, vp=2, dp=2, cp_algorithm="ulysses"),
    _layout("pp4-zb-h1", "tied", pp=4, schedule="zb-h1"),
    _layout("tp2-pp2-zb-h1-recompute", "qwen", tp=2, pp=2, schedule="zb-h1", recompute="full"),
    _layout("pp2-dp2-zero1-zb-h2", "olmo", pp=2, dp=2, zero=1, schedule="zb-h2"),
    _layout("pp2-zb-v-tied", "tied", pp=2, vp=2, schedule="zb-v"),
    _layout("tp2-pp2-zb-v-no-sp", "gpt2", tp=2, pp=2, vp=2, schedule="zb-v", sequence_parallel=False),
    _layout("pp2-v-half-dropout", "dropout", pp=2, vp=2, schedule="v-half"),
    _layout("pp2-v-min", pp=2, vp=2, schedule="v-min", micro_batch=2),
    _layout("pp2-dp2-dualpipe-v", "tied", pp=2, dp=2, vp=2, schedule="dualpipe-v"),
    _layout("pp2-dualpipe-tied", "tied", pp=2, schedule="dualpipe"),
    _layout("tp2-pp4-dualpipe", "qwen", tp=2, pp=4, schedule="dualpipe"),
    _layout("pp2-dp2-zero1-dualpipe", "gpt2", pp=2, dp=2, zero=1, schedule="dualpipe"),
    _layout("pp2-uneven", "qwen", pp=2, layers_per_stage=[3, 1]),
    _layout("tp2-pp2-zb-h1-selective", "dropout", tp=2, pp=2, schedule="zb-h1", recompute="selective"),
    _layout("pp2-vp2-zb-v-block", "tied", pp=2, vp=2, schedule="zb-v", recompute="block", recompute_layers=1),
    _layout("cp2-dp2-selective-named", packed=True, cp=2, dp=2, recompute="selective", recompute_modules=["core_attn"]),
    _layout("tp2-auto-offload", "qwen", tp=2, recompute="auto", memory_budget_gib=1e-3, offload_activations=True),
    _layout("dp4-ep2", "moe", dp=4, ep=2),
    _layout("dp2-ep2-zero1", "moe", dp=2, ep=2, zero=1),
    _layout("tp2-ep2", "moe", tp=2, dp=2, ep=2),
    _layout("tp2-no-sp-moe", "moe", tp=2, sequence_parallel=False),
    _layout("cp2-ep2-capacity", "moe-capacity", cp=2, dp=2, ep=2),
    _layout("tp2-cp2-dp2-ep2-zero1-capacity", "moe-capacity", tp=2, cp=2, dp=2, ep=2, zero=1),
    _layout("tp2-pp2-ep2-zb-h1-recompute", "moe", tp=2, pp=2, dp=2, ep=2, schedule="zb-h1", recompute="full"),
    _layout("pp2-vp2-dp4-ep4-zero1-selective", "moe", pp=2, vp=2, dp=4, ep=4, zero=1, recompute="selective"),
    _layout("pp2-dp2-ep2-dualpipe", "moe", pp=2, dp=2, ep=2, schedule="dualpipe"),
    _layout("pp4-balanced", "tied", pp=4, layers_per_stage="balanced"),
    # 8 microbatches over 3 ranks: rounds of unequal length; and no layer on the first and the last stage.
    _layout("pp3-vp2-ragged-bare-ends", "olmo", pp=3, vp=2, layers_per_stage=[0, 1, 1, 1, 1, 0]),
    _layout("tp4-muon", "qwen", optim="muon", tp=4),
    _layout("tp2-pp2-muon-no-sp", "gpt2", optim="muon", tp=2, pp=2, sequence_parallel=False),
    _layout("tp2-dp2-muon", optim="muon", tp=2, dp=2),
    _layout("dp2-ep2-muon-moe", "moe", optim="muon", dp=2, ep=2),
    _layout("tp2-dp2-ep2-zero1-muon-moe", "moe", optim="muon", tp=2, dp=2, ep=2, zero=1),
    _layout("dp4-zero1-muon", "tied", optim="muon", dp=4, zero=1),
    _layout("tp2-cp2-dp2-zero1-muon", optim="muon", tp=2, cp=2, dp=2, zero=1),
    _layout("pp2-dp2-zero1-dualpipe-muon", "gpt2", optim="muon", pp=2, dp=2, zero=1, schedule="dualpipe"),
]
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def make_config(
    model: str = "llama",
    parallel: dict[str, Any] | None = None,
    micro_batch: int = 1,
    packed: bool = False,
    optim: str = "adamw",
    **train: Any,
) -> Config:
    """Return a resolved configuration for a few float64 steps."""
    return config_from_dict(
        {
            "model": MODELS[model],
            "parallel": parallel or {},
            "data": {"seq_length": SEQ_LENGTH, "reset_position_ids": packed, "reset_attention_mask": packed},
            "train": {"dtype": "fp64", "steps": 6, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch, **train},
            # Buckets of a few parameters each, so that bucket borders are part of what is tested.
            "optim": {"name": optim, "lr": 0.01, "warmup_steps": 2, "clip": 0.5, "bucket_numel": 4000, "eps": 1e-4},
        }
    )


class RandomSamples:
    """A dataset whose sample i is a function of i: random tokens, a part of them masked, in one document or three."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, sample: int) -> Sample:
        random = np.random.default_rng(sample)
        tokens = random.integers(0, VOCAB_SIZE, SEQ_LENGTH + 1)
        mask = (random.random(SEQ_LENGTH) < 0.7).astype(np.float32)
        positions = np.arange(SEQ_LENGTH)
        if self.packed:
            first, second = sorted(random.choice(np.arange(1, SEQ_LENGTH), 2, replace=False))
            positions -= np.select([positions >= second, positions >= first], [second, first], 0)
        return Sample(tokens, mask, positions)


def make_batches(config: Config, mesh: Mesh) -> Batches:
    """Return this rank's batches of `RandomSamples`."""
    train = config.train
    samples = RandomSamples(config.data.reset_position_ids)
    return Batches(samples, train.global_batch, train.micro_batch, mesh.dp.rank, mesh.dp.size)


@dataclass
class Trained:
    """What a few steps on one rank gave.

    Attributes:
        reports: one a step.
        sample_ids: of this rank, one list a step.
        weights: (name, logical box, values) of this rank's parts.
    """

    reports: list[StepReport]
    sample_ids: list[list[int]]
    weights: list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]


def make_engine(config: Config) -> Engine:
    """Build the engine on this rank's mesh."""
    return Engine(config, Mesh.create(MeshSpec.of(config.parallel), torch.device("cpu")))


def train_steps(engine: Engine, n_steps: int, consumed_samples: int = 0) -> Trained:
    """Train some steps and return what they gave on this rank."""
    batches = make_batches(engine.config, engine.mesh)
    reports, sample_ids = [], []
    for _ in range(n_steps):
        microbatches: list[Microbatch] = batches.at(consumed_samples)
        reports.append(engine.train_step(microbatches, next_token))
        sample_ids.append([int(i) for m in microbatches for i in m.sample_ids])
        consumed_samples += engine.config.train.global_batch
    return Trained(reports, sample_ids, local_weights(engine))


def local_weights(engine: Engine) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Return this rank's parts of every weight, with the box of the logical tensor that each is."""
    return [
        (spec.name, spec.shape, extent.logical, param.detach()[extent.local].clone())
        for param in engine.parameters()
        for spec in [spec_of(param)]
        for extent in extents(spec, engine.mesh.spec.sizes, engine.mesh.coords)
    ]


def whole_weights(ranks: list[Trained]) -> dict[str, torch.Tensor]:
    """Put the parts of all ranks together; replicas must agree to the last bit or nearly so."""
    wholes: dict[str, torch.Tensor] = {}
    for trained in ranks:
        for name, shape, box, values in trained.weights:
            whole = wholes.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
            seen = whole[box]
            known = ~seen.isnan()
            torch.testing.assert_close(values[known], seen[known], rtol=1e-12, atol=1e-14)
            whole[box] = values
    assert not any(whole.isnan().any() for whole in wholes.values())
    return wholes


def run_layout(config: Config, n_steps: int) -> Trained:
    """Build an engine on this rank and train it from its initial weights."""
    return train_steps(make_engine(config), n_steps)
