"""The backends that the operators are tested on: each compiled kernel stands in a namespace of its own.

A test that takes `backend` runs once for every backend; one that is absent here is a skip with its reason.
"""

import ctypes
import itertools
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascratch import ops
from megascratch.ops import OPERATORS
from megascratch.ops.registry import define

LIBRARIES = Path(ops.__file__).parent

LEVELS = ("v2", "v3", "v4") if platform.machine() in ("x86_64", "AMD64") else ("baseline",)

# name → (namespace, device, library that brings the kernels)
BACKENDS = {
    "reference": ("megascratch_reference", "cpu", None),
    **{f"cpu-{level}": (f"megascratch_{level}", "cpu", "cpu") for level in LEVELS},
    "cuda-on-host": ("megascratch_cuda_host", "cpu", "cuda_host"),
    "cuda": ("megascratch", "cuda", "cuda"),
}


@dataclass(frozen=True)
class Kernels:
    """One backend's operators, as they stand in the dispatcher."""

    name: str
    namespace: str
    device: str
    seeds: Iterator[int] = field(default_factory=itertools.count)

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def schedules(self, count: int) -> Iterator[int]:
        """Once; for the host run of the CUDA kernels, once for each of `count` random schedules, new at every call."""
        if self.name != "cuda-on-host":
            yield 0
            return
        seed_schedules = ctypes.CDLL(str(LIBRARIES / "libmegascratch_cuda_host.so")).megascratch_seed_schedules
        for seed in itertools.islice(self.seeds, count):
            seed_schedules(ctypes.c_uint64(seed))
            yield seed


@pytest.fixture(scope="session")
def namespaces() -> list[torch.library.Library]:
    """Define the operators in the backends' own namespaces; the compiled libraries add the kernels."""
    names = {namespace for namespace, _, _ in BACKENDS.values()} - {"megascratch"}
    libraries = [torch.library.Library(name, "DEF") for name in sorted(names)]
    for library in libraries:
        for operator in OPERATORS:
            define(operator, library)
    host = LIBRARIES / "libmegascratch_cuda_host.so"
    if host.exists():
        torch.ops.load_library(host)
    return libraries


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, namespaces: list[torch.library.Library]) -> Kernels:
    namespace, device, library = BACKENDS[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that this torch can use")
    if library is not None and not (LIBRARIES / f"libmegascratch_{library}.so").exists():
        pytest.skip(f"libmegascratch_{library}.so was not built")
    key = "CUDA" if device == "cuda" else "CPU"
    if library is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::rope", key):
        pytest.skip(f"this processor does not have the instructions of {request.param}")
    return Kernels(request.param, namespace, device)


# Relative to the float64 oracle: a few roundings of the type that the result is stored in.
RELATIVE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
# Near zero: what cancellation or the smallest float16 numbers leave.
ABSOLUTE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Compare a result of a dtype with its float64 oracle; `scale` is the size of what was summed, if large."""

    def compare(actual: Tensor, oracle: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.cpu().double(), oracle, rtol=RELATIVE[dtype], atol=scale * ABSOLUTE[dtype])

    return compare


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
