#!/usr/bin/env python3
"""One contestant of `train.py`, in a process of its own: build the model, take training steps, print what they took.

    python tools/bench/train_step.py ours 16m fp32 --steps 3

prints one JSON object: `build_s`, which making the model and its optimizer took once everything was imported, `seconds`
of each step after that, the first with them, `peak_mib` of the whole process, and the last `loss`. Each peer is set up
as its own training code sets it up: its model class, its loss, clipping by torch, torch's fused AdamW; in bf16 with
weights, gradients and optimizer state in bf16, the fastest that it offers. Ours is `Engine.train_step`. What its
optimizer keeps of a bf16 weight, beside the weight's own 2 bytes:

    ours            16 bytes: a float32 weight, and in float32 the gradient's sum and two averages; what a recipe gets
    ours-remainder   8 bytes: the same float32 weight, as 16 bits more, and in bf16 the sum and the averages
    ours-pure        6 bytes: the sum and the averages in bf16, and no float32 weight, as the peers have it

This file runs in the peers' environment: it imports nothing of megascratch but for `ours`.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], float]
"""Take a training step and return its loss."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-like model and its batch: `batch` samples of `s` tokens a step."""

    vocab: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn: int
    s: int
    batch: int


SHAPES = {
    "16m": Shape(8192, 384, 6, 6, 2, 1024, 256, 8),
    "125m": Shape(32000, 768, 12, 12, 4, 2048, 512, 4),
}
LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


def tokens_of(shape: Shape) -> tuple[Any, Any]:
    """Return inputs and labels, [batch, s] each, the same for every contestant."""
    import torch

    ids = torch.randint(0, shape.vocab, (shape.batch, shape.s + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def llama_sizes(shape: Shape) -> dict[str, int]:
    """Return a shape in the words of Hugging Face's Llama, which picotron shares."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "max_position_embeddings": shape.s,
    }


def make_ours(shape: Shape, dtype: str, **precision: Any) -> Step:
    import torch

    from megascratch.config import config_from_dict
    from megascratch.data.microbatch import Microbatch
    from megascratch.dist.launch import keep_freed_memory
    from megascratch.dist.mesh import Mesh
    from megascratch.engine import Engine, next_token

    model = {"n_layers": shape.n_layers, "hidden": shape.hidden, "n_heads": shape.n_heads, "ffn_hidden": shape.ffn}
    model |= {"n_kv_heads": shape.n_kv_heads, "vocab_size": shape.vocab, "max_seq_length": shape.s}
    train = {"global_batch": shape.batch, "micro_batch": shape.batch, "dtype": dtype}
    optim = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": DECAY, "clip": CLIP}
    sections = {"model": model, "train": train, "data": {"seq_length": shape.s}, "parallel": {"dp": 1}}
    sections |= {"optim": {**optim, **precision}}
    keep_freed_memory()  # as training does
    engine = Engine(config_from_dict(sections), Mesh.serial())
    tokens, labels = tokens_of(shape)
    positions = torch.arange(shape.s).expand(shape.batch, -1)
    batch = Microbatch(
        tokens, labels, torch.ones(tokens.shape), positions, torch.ones_like(tokens), torch.arange(shape.batch)
    )
    return lambda: engine.train_step([batch], next_token).loss


def make_transformers(shape: Shape, dtype: str) -> Step:
    import transformers

    config = transformers.LlamaConfig(**llama_sizes(shape), use_cache=False)
    model = transformers.LlamaForCausalLM(config).train()

    def loss_of(output: Any, labels: Any) -> Any:  # the model's own, for labels that are shifted already
        return model.loss_function(output.logits, None, shape.vocab, shift_labels=labels)

    return peer_step(model, shape, dtype, loss_of)


def make_litgpt(shape: Shape, dtype: str) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=shape.s,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_query_groups=shape.n_kv_heads,
        n_embd=shape.hidden,
        intermediate_size=shape.ffn,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    return peer_step(GPT(config), shape, dtype, chunked_cross_entropy)


def make_torchtitan(shape: Shape, dtype: str) -> Step:
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import Llama3Model, _build_llama3_layers

    init: dict[str, Any] = {"weight": lambda weight: weight.data.normal_(std=0.02)}
    layers = _build_llama3_layers(
        n_layers=shape.n_layers,
        dim=shape.hidden,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        hidden_dim=shape.ffn,
        rope=ComplexRoPE.Config(dim=shape.hidden // shape.n_heads, max_seq_len=shape.s),
        attn_backend="flex",
    )
    for layer in layers:  # flex attention is not for a CPU without a compiler
        layer.attention = dataclasses.replace(layer.attention, inner_attention=ScaledDotProductAttention.Config())
    model = Llama3Model.Config(
        dim=shape.hidden,
        vocab_size=shape.vocab,
        tok_embeddings=Embedding.Config(num_embeddings=shape.vocab, embedding_dim=shape.hidden, param_init=init),
        norm=RMSNorm.Config(normalized_shape=shape.hidden, param_init={"weight": lambda w: w.data.fill_(1.0)}),
        lm_head=Linear.Config(in_features=shape.hidden, out_features=shape.vocab, param_init=init),
        layers=layers,
    ).build()
    model.init_states()
    return peer_step(model, shape, dtype, float_cross_entropy)


def stand_in_for_flash_attention() -> None:
    """Let picotron's model import the CUDA kernels that it does not call with FLASH_ATTEN=0."""
    for name, members in {
        "flash_attn.flash_attn_interface": ["flash_attn_func"],
        "flash_attn.layers.rotary": ["apply_rotary_emb"],
        "flash_attn.ops.triton.layer_norm": ["layer_norm_fn"],
    }.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        for member in members:
            setattr(sys.modules[name], member, None)


def picotron_config(shape: Shape) -> Any:
    """Return what picotron's model reads of a Hugging Face configuration."""
    return types.SimpleNamespace(**llama_sizes(shape), rms_norm_eps=1e-5, rope_theta=10000.0)


def make_picotron(shape: Shape, dtype: str) -> Step:
    os.environ |= {"FLASH_ATTEN": "0", "DEVICE": "cpu", "LOCAL_RANK": "0", "CONTEXT_PARALLEL": "0"}
    os.environ["DTYPE"] = "bfloat16" if dtype == "bf16" else "float32"
    stand_in_for_flash_attention()
    import picotron.process_group_manager as groups
    from picotron.model import Llama

    groups.process_group_manager = types.SimpleNamespace(
        tp_world_size=1, tp_rank=0, cp_world_size=1, cp_rank=0, pp_world_size=1, pp_rank=0
    )
    return peer_step(Llama(picotron_config(shape)), shape, dtype, plain_cross_entropy)


def float_cross_entropy(logits: Any, labels: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def plain_cross_entropy(logits: Any, labels: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def peer_step(model: Any, shape: Shape, dtype: str, loss_of: Callable[[Any, Any], Any]) -> Step:
    """Return the step of a peer's model: forward, backward, clip, AdamW."""
    import torch

    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    # Tables of cosines too, as bf16 is fastest, but not torchtitan's, which are complex.
    model._apply(lambda tensor: tensor.to(wanted) if tensor.is_floating_point() else tensor)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    tokens, labels = tokens_of(shape)

    def step() -> float:
        loss = loss_of(model(tokens), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


NARROW = {"main_grads_dtype": "bf16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
CONTESTANTS = {
    "ours": make_ours,
    "ours-remainder": functools.partial(make_ours, master_remainders=True, **NARROW),
    "ours-pure": functools.partial(make_ours, master_weights=False),
    "transformers": make_transformers,
    "litgpt": make_litgpt,
    "torchtitan": make_torchtitan,
    "picotron": make_picotron,
}
MODULES = {
    "ours": "megascratch.engine",
    "ours-remainder": "megascratch.engine",
    "ours-pure": "megascratch.engine",
    "picotron": "picotron",
    "litgpt": "litgpt.model",
    "torchtitan": "torchtitan.models.llama3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("dtype", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkout", type=Path, help="folder to import the contestant from")
    args = parser.parse_args()
    if args.checkout is not None:
        sys.path.insert(0, str(args.checkout))
    import importlib

    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        importlib.import_module(MODULES.get(args.contestant, args.contestant))
    except ImportError as error:
        print(json.dumps({"absent": str(error)}))
        return
    start = time.perf_counter()
    step = CONTESTANTS[args.contestant](SHAPES[args.shape], args.dtype)
    ends = [time.perf_counter()]
    for _ in range(args.steps + 1):
        loss = step()
        ends.append(time.perf_counter())
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    print(json.dumps({"build_s": ends[0] - start, "seconds": seconds, "peak_mib": peak_mib, "loss": loss}))


if __name__ == "__main__":
    main()
