"""What a layout under test is, and what it takes to run on one. `matrix.py` chooses the layouts."""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from pydantic import BaseModel

from megascratch.config import Config, ParallelConfig, config_from_dict
from megascratch.data.microbatch import Microbatch
from megascratch.data.sampler import Batches
from megascratch.data.samples import Sample
from megascratch.dist.layout import extents, spec_of
from megascratch.dist.mesh import Mesh
from megascratch.engine import Engine, StepReport, next_token

VOCAB_SIZE, SEQ_LENGTH, GLOBAL_BATCH = 61, 16, 8

BASE = {
    "hidden": 32,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": 8,
    "ffn_hidden": 48,
    "vocab_size": VOCAB_SIZE,
    "max_seq_length": 32,
    "init_std": 0.1,  # large enough that every part of the model matters to the loss
}
# What sets Gemma's models apart, all at once.
GEMMA: dict[str, Any] = {
    "norm_position": "both",
    "norm_zero_centered": True,
    "activation": "geglu_tanh",
    "tie_embeddings": True,
    "scale_embeddings": True,
    "qk_norm": True,
    "query_pre_attn_scalar": 5.0,
    "attn_softcap": 2.0,
    "logit_softcap": 3.0,
    "sliding_window": 5,
    "window_attn_skip_freq": 2,
    "rope_local_theta": 100.0,
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
    "olmo": {**BASE, "norm_position": "post", "activation": "geglu", "qk_norm": True, "qk_norm_across_heads": True},
    "gemma": {**BASE, **GEMMA},
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
    "mla": {
        **BASE,
        "n_kv_heads": None,
        "head_dim": None,
        "mla": {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_seq_length": 8},
    },
    "mtp": {**BASE, "mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5},
    "mtp-tied-moe": {
        **BASE,
        "tie_embeddings": True,
        "mtp_num_layers": 1,
        "moe": {
            "num_experts": 4,
            "ffn_hidden": 16,
            "router_load_balancing_type": "seq_aux_loss",
            "aux_loss_coeff": 0.1,
        },
    },
    "dropout": {**BASE, "dropout": 0.1, "activation": "relu2"},
}


# Keys of [parallel] that mean nothing where another has a certain value.
MEANINGLESS = {
    "sequence_parallel": ("tp", 1),
    "cp_algorithm": ("cp", 1),
    "layers_per_stage": ("pp", 1),
    "schedule": ("pp", 1),
    "zero_ranks": ("zero", 0),
}


# What a way of recomputation needs beside it; keys that are given win.
BESIDE = {"block": {"recompute_layers": 1}, "auto": {"memory_budget_gib": 2e-3}}


def choices(key: str, section: type[BaseModel] = ParallelConfig) -> tuple[Any, ...]:
    """Return what the schema lets a key be."""
    return get_args(section.model_fields[key].annotation)


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

    @property
    def n_layers(self) -> int:
        """Few: a collective of ranks that share two cores takes a millisecond, and each layer has a dozen of them."""
        stages = self.parallel.get("pp", 1) * self.parallel.get("vp", 1)
        alone = self.parallel.get("tp", 1) * self.parallel.get("cp", 1) == 1
        return max(stages, 4 if alone or "moe" in self.model else 2)

    def config(self, **train: Any) -> Config:
        """Return the configuration of a run; see `make_config`."""
        return make_config(self.model, self.parallel, self.micro_batch, self.packed, self.n_layers, self.optim, **train)


def make_config(
    model: str = "llama",
    parallel: dict[str, Any] | None = None,
    micro_batch: int = 1,
    packed: bool = False,
    n_layers: int = 4,
    optim: str = "adamw",
    **train: Any,
) -> Config:
    """Return a resolved configuration for a few float64 steps."""
    parallel = parallel or {}
    return config_from_dict(
        {
            "model": {**MODELS[model], "n_layers": n_layers},
            "parallel": {**BESIDE.get(parallel.get("recompute", "none"), {}), **parallel},
            "data": {"seq_length": SEQ_LENGTH, "reset_position_ids": packed, "reset_attention_mask": packed},
            "train": {"dtype": "fp64", "steps": 6, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch, **train},
            # Buckets of a few parameters each, so that bucket borders are part of what is tested.
            "optim": {"name": optim, "lr": 0.01, "warmup_steps": 2, "clip": 0.5, "bucket_numel": 4000, "eps": 1e-4},
        }
    )


# What the matrix does not draw: layers given one by one. Unequal stages; and 8 micro-batches over 3 ranks, in rounds of
# unequal length, with no layer on the first and the last stage.
OVERLAPPED = {"tp": 2, "cp": 2, "dp": 2, "zero": 2, "recompute": "full", "tp_comm_overlap": True}
GIVEN = (
    Layout("pp2-uneven", {"pp": 2, "layers_per_stage": [3, 1]}, "qwen"),
    Layout("pp3-vp2-ragged-bare-ends", {"pp": 3, "vp": 2, "layers_per_stage": [0, 1, 2, 1, 2, 0]}, "olmo"),
    Layout("tp2-pp2-overlap", {"tp": 2, "pp": 2, "tp_comm_overlap": True}, "llama"),
    Layout("tp4-pp2-zb-h1-overlap", {"tp": 4, "pp": 2, "schedule": "zb-h1", "tp_comm_overlap": True}, "qwen"),
    Layout("tp2-cp2-dp2-zero2-full-overlap", OVERLAPPED, "mtp"),
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
    return Batches.of(config, RandomSamples(config.data.reset_position_ids), mesh.dp)


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
    return Engine(config, Mesh.of(config, torch.device("cpu")))


def train_steps(engine: Engine, n_steps: int, consumed_samples: int = 0) -> Trained:
    """Train some steps and return what they gave on this rank."""
    batches = make_batches(engine.config, engine.mesh)
    reports, sample_ids = [], []
    for _ in range(n_steps):
        microbatches: list[Microbatch] = batches.at(consumed_samples)
        reports.append(engine.train_step(microbatches, next_token))
        sample_ids.append([int(i) for m in microbatches for i in m.sample_ids])
        consumed_samples += engine.config.train.batch_at(consumed_samples)
    return Trained(reports, sample_ids, local_weights(engine))


def local_weights(engine: Engine) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Return this rank's parts of every weight, with the box of the logical tensor that each is."""
    with engine.gathered():
        return [
            (spec.name, spec.shape, extent.logical, param.detach()[extent.local].clone())
            for param in engine.parameters()
            for spec in [spec_of(param)]
            for extent in extents(spec, engine.mesh.spec.sizes, engine.mesh.coords)
        ]


def whole_weights(ranks: list[Trained]) -> dict[str, torch.Tensor]:
    """Put the parts of all ranks together, in float64; replicas must agree to the last bit or nearly so."""
    wholes: dict[str, torch.Tensor] = {}
    for trained in ranks:
        for name, shape, box, values in trained.weights:
            values = values.double()
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
