#!/usr/bin/env python3
"""One rank of one contestant of `layouts.py`: build the model on a layout, take training steps, print what they took.

    python tools/bench/layouts_rank.py picotron 16m tp=2 --rank 0 --meet FILE --steps 5 --checkout PICOTRON

The last rank prints one JSON object: `seconds` of each step after the first, from barrier to barrier, and the
last `loss`.
All is in float32, on one thread a rank. Ours is `Engine.train_step`, which clips. picotron is set up and driven as its
`train.py` does it, but for the data, which come from memory, AdamW, which is torch's fused one, and the start from
random weights instead of a download. What it needs to run on a CPU at all:

- stand-ins for the modules of flash-attn, which its model imports at the top;
- `torch.cuda.synchronize` that does nothing: its pipeline calls it after every transfer.

This file runs in the peer's environment: it imports nothing of megascratch but for `ours`.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from train_step import (
    BETAS,
    CLIP,
    DECAY,
    EPS,
    LR,
    SHAPES,
    Shape,
    Step,
    picotron_config,
    stand_in_for_flash_attention,
    tokens_of,
)

# Layouts, and the samples of a micro-batch: a pipeline needs several, the others take the rank's batch at once.
LAYOUTS = {
    "tp=2": ({"tp": 2}, 8),
    "pp=2": ({"pp": 2}, 2),
    "dp=2": ({"dp": 2}, 4),
    "tp=2,pp=2": ({"tp": 2, "pp": 2}, 2),
}


def microbatches(shape: Shape, micro: int, dp_rank: int, dp: int) -> list[tuple[Any, Any]]:
    """Return this rank's inputs and labels, [micro, s] each, in order."""
    tokens, labels = (whole.chunk(dp)[dp_rank].split(micro) for whole in tokens_of(shape))
    return list(zip(tokens, labels, strict=True))


def make_ours(shape: Shape, sizes: dict[str, int], micro: int, overrides: list[str]) -> Step:
    import torch

    from megascratch.config import load_config
    from megascratch.data.microbatch import Microbatch
    from megascratch.dist.launch import keep_freed_memory
    from megascratch.dist.mesh import Mesh
    from megascratch.engine import Engine, next_token

    model = {"n_layers": shape.n_layers, "hidden": shape.hidden, "n_heads": shape.n_heads, "ffn_hidden": shape.ffn}
    model |= {"n_kv_heads": shape.n_kv_heads, "vocab_size": shape.vocab, "max_seq_length": shape.s}
    train = {"global_batch": shape.batch, "micro_batch": micro, "dtype": "fp32"}
    optim = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": DECAY, "clip": CLIP}
    sections = {"model": model, "train": train, "optim": optim, "data": {"seq_length": shape.s}, "parallel": sizes}
    said = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    keep_freed_memory()  # as training does
    config = load_config(None, [*said, *overrides])
    mesh = Mesh.of(config, torch.device("cpu"))
    engine = Engine(config, mesh)
    positions = torch.arange(shape.s).expand(micro, -1)
    batches = [
        Microbatch(tokens, labels, torch.ones(tokens.shape), positions, torch.ones_like(tokens), torch.arange(micro))
        for tokens, labels in microbatches(shape, micro, mesh.dp.rank, mesh.dp.size)
    ]
    return lambda: engine.train_step(batches, next_token).loss


class MemoryLoader:
    """What picotron's loops ask of its data loader."""

    def __init__(self, batches: list[tuple[Any, Any]], s: int) -> None:
        import torch

        positions = torch.arange(s).expand(len(batches[0][0]), -1)
        self.grad_acc_steps = len(batches)
        self._batches = itertools.cycle(
            {"input_ids": tokens, "target_ids": labels, "position_ids": positions, "hidden_states": None}
            for tokens, labels in batches
        )

    def __next__(self) -> dict[str, Any]:
        return dict(next(self._batches))


def make_picotron(shape: Shape, sizes: dict[str, int], micro: int, overrides: list[str]) -> Step:
    import torch

    os.environ |= {"FLASH_ATTEN": "0", "DEVICE": "cpu", "CONTEXT_PARALLEL": "0", "DTYPE": "float32"}
    stand_in_for_flash_attention()
    torch.cuda.synchronize = lambda device=None: None
    import picotron.process_group_manager as groups
    from picotron.data_parallel.data_parallel import DataParallelBucket
    from picotron.model import Llama
    from picotron.pipeline_parallel.pipeline_parallel import PipelineParallel, train_step_pipeline_1f1b
    from picotron.tensor_parallel.tensor_parallel import apply_tensor_parallel

    tp, pp, dp = (sizes.get(axis, 1) for axis in ("tp", "pp", "dp"))
    groups.setup_process_group_manager(tp_size=tp, cp_size=1, pp_size=pp, dp_size=dp)
    config, device = picotron_config(shape), torch.device("cpu")
    model: Any = Llama(config)
    if tp > 1:
        model = apply_tensor_parallel(model)
    if pp > 1:
        model = PipelineParallel(model, config)
    if dp > 1:
        model = DataParallelBucket(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    loader = MemoryLoader(microbatches(shape, micro, groups.process_group_manager.dp_rank, dp), shape.s)

    def accumulate() -> float:
        total = 0.0
        for done in range(loader.grad_acc_steps):
            batch = next(loader)
            if dp > 1:
                model.require_backward_grad_sync = done == loader.grad_acc_steps - 1
            logits, labels = model(input_ids=batch["input_ids"]), batch["target_ids"]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) / loader.grad_acc_steps
            loss.backward()
            total += loss.item()
        return total

    def step() -> float:
        optimizer.zero_grad()
        if pp > 1:
            loss = train_step_pipeline_1f1b(model, loader, (micro, shape.s, shape.hidden), device, torch.float32)
        else:
            loss = accumulate()
        optimizer.step()
        if hasattr(model, "reset"):
            model.reset()
        return loss

    return step


CONTESTANTS = {"ours": make_ours, "picotron": make_picotron}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("overrides", nargs="*", help="of ours: parallel.sequence_parallel=false")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--meet", type=Path, required=True, help="file through which the ranks meet")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkout", type=Path, help="folder to import the contestant from")
    args = parser.parse_args()
    if args.checkout is not None:
        sys.path.insert(0, str(args.checkout))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, micro = LAYOUTS[args.layout]
    world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1)
    os.environ["LOCAL_RANK"] = str(args.rank)
    dist.init_process_group("gloo", init_method=f"file://{args.meet}", rank=args.rank, world_size=world)
    step = CONTESTANTS[args.contestant](SHAPES[args.shape], sizes, micro, args.overrides)
    ends = []
    for _ in range(args.steps + 1):
        loss = step()
        dist.barrier()
        ends.append(time.perf_counter())
    if args.rank == world - 1:  # of the last stage, which knows the loss
        print(json.dumps({"seconds": [end - begin for begin, end in itertools.pairwise(ends)], "loss": loss}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
