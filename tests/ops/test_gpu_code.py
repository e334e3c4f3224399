"""The machine code of the CUDA library: no local memory, and 128-bit accesses wherever a kernel has a wide path.

NVIDIA's disassembler (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or a CUDA toolkit) reads the library
that was built here, for every GPU architecture in it.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from megascratch import ops

LIBRARY = Path(ops.__file__).parent / "libmegascratch_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Kernels that read packets but write one number a row or a block.
SUMS = {"statistics_kernel", "squares_kernel"}
# Kernels whose reading is a sum over a few hundred rows of columns, or a few hundred numbers.
ADD_UP = {"add_parts_kernel", "add_partial_kernel"}


def run(*arguments: str) -> str:
    """Return what cuobjdump prints of the library."""
    here = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
    path = os.pathsep.join((str(here), os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    tool = shutil.which("cuobjdump", path=path)
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built: no nvcc")
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [tool, *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout


def plain_name(mangled: str) -> tuple[str, str]:
    """Return a kernel's name without its namespaces, and its template arguments as they are mangled."""
    name, arguments = re.search(r"\d+([a-z_]+_kernel)(?:I(.*)E)?", mangled).groups()
    return name, arguments or ""


def test_no_kernel_uses_local_memory() -> None:
    usage = re.findall(r"Function (\S+):\n\s*REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run("-res-usage"))
    kernels = {name: (int(stack), int(local)) for name, stack, local in usage if "_kernel" in name}
    assert len(kernels) >= 100
    assert {name: use for name, use in kernels.items() if use[1]} == {}
    # A stack frame without local memory is the call of a double-precision function.
    assert {name: use for name, use in kernels.items() if use[0] and "Id" not in name} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_paths_move_128_bits_at_a_time(architecture: str) -> None:
    functions = re.split(r"\n\s*Function : ", run("-sass", "-arch", architecture))[1:]
    narrow = []
    for function in functions:
        mangled, _, code = function.partition("\n")
        if "_kernel" not in mangled:
            continue
        name, arguments = plain_name(mangled)
        # Templates have a twin for what is not aligned: of packet size 1, or not wide.
        twin = ("Lb0E" if name == "cast_transpose_kernel" else "Li1E") in arguments
        if name in ADD_UP or twin:
            continue
        wide = Counter(kind for kind in re.findall(r"\b(LDG|STG)\.[A-Z0-9.]*?128", code))
        if not wide["LDG"] or not (wide["STG"] or name in SUMS):
            narrow.append(mangled)
    assert len(functions) >= 80
    assert narrow == []
