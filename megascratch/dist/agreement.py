"""What every rank must agree on before training starts: otherwise sums are silently wrong, or ranks wait for ever.

Rank 0's word is compared with everyone's, and the message names the rank and the field:

    rank 3: train.seed = 7    must be 1234, as on rank 0    start every rank with the same recipe and code
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

import megascratch
from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.errors import LayoutError, Problem

_SHOWN = 8  # a rank with another recipe differs in many fields; the first few tell which


def require_agreement(facts: Mapping[str, Any], world: Axis, device: torch.device | None = None) -> None:
    """Compare what each rank believes. Every rank of `world` calls this at the same point.

    Args:
        facts: name → value that JSON can say; nested tables are compared key by key.
        world: all ranks.
        device: where the backend wants its tensors; CPU when left out.

    Raises: LayoutError: on every rank alike, naming rank, field and both values.
    """
    own = json.dumps(dict(_flat(facts)), sort_keys=True).encode()
    everyones = comm.gather_bytes(own, world, device)
    if all(facts == everyones[0] for facts in everyones):
        return
    reference, *others = (json.loads(facts) for facts in everyones)
    problems = [
        Problem(
            f"rank {world.ranks[rank]}: {name} = {theirs.get(name)}",
            f"must be {reference.get(name)}, as on rank {world.ranks[0]}",
            "start every rank with the same recipe and code",
        )
        for rank, theirs in enumerate(others, start=1)
        for name in sorted(reference.keys() | theirs.keys())
        if reference.get(name) != theirs.get(name)
    ]
    raise LayoutError(problems[:_SHOWN], "what the ranks were started with")


def code_digest() -> str:
    """Return a digest of the package's Python files, so that a rank that runs other code is told from the others."""
    digest, root = xxhash.xxh3_64(), Path(megascratch.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def tensor_digest(x: Tensor) -> str:
    """Return a digest of a tensor's bits."""
    return xxhash.xxh3_64_hexdigest(x.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
