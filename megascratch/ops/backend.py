"""The compiled libraries: which were found, which were loaded, and why not.

Loading a library registers its kernels with the dispatcher. None is needed: without them the references run.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Backend:
    """One compiled library: "cpu" or "cuda", whether its kernels are registered, and what to tell the user."""

    name: str
    loaded: bool
    detail: str


def load(name: str) -> Backend:
    """Load `libmegascratch_<name>.so` beside this file, if it is there and this torch can.

    The CUDA library loads on a CPU torch as well: its kernels are then registered for a device that is never used.
    """
    path = Path(__file__).parent / f"libmegascratch_{name}.so"
    if not path.exists():
        return Backend(
            name, False, f"{path.name} was not built" + (": no nvcc at build time" if name == "cuda" else "")
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:  # built for another machine, or torch is older than the stable ABI that it was built for
        return Backend(name, False, f"{path.name} does not load: {error}")
    return Backend(name, True, describe(path))


def describe(path: Path) -> str:
    """What a loaded library says of itself: the instruction-set level or the GPU architectures."""
    describe_library = ctypes.CDLL(str(path)).megascratch_describe
    describe_library.restype = ctypes.c_char_p
    text: bytes = describe_library()
    return text.decode()
