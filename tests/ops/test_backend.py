"""Which libraries are loaded and why not; and that everything runs with none."""

import shutil
import subprocess
import sys
from pathlib import Path

import megascratch
from megascratch import ops

PACKAGE = Path(megascratch.__file__).parent

PROGRAM = """
import torch
from megascratch import ops
for backend in ops.backends():
    print(backend.name, backend.loaded, backend.detail)
print(ops.available())
x = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
print(torch.autograd.gradcheck(lambda x: ops.scaled_softmax(x, 0.5), (x,)))
"""


def test_every_library_tells_its_state():
    cpu, cuda = ops.backends()
    assert (cpu.name, cuda.name) == ("cpu", "cuda")
    for backend in (cpu, cuda):
        built = (PACKAGE / f"ops/libmegascratch_{backend.name}.so").exists()
        assert backend.loaded == built, backend.detail  # the CUDA library loads beside a CPU torch as well
    assert ops.available() == tuple(b.name for b in (cpu, cuda) if b.loaded)


def test_references_run_where_no_library_loads(tmp_path):
    copy = tmp_path / "megascratch"
    shutil.copytree(PACKAGE / "ops", copy / "ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("__init__.py", "errors.py"):
        shutil.copy(PACKAGE / name, copy / name)
    (copy / "ops/libmegascratch_cpu.so").write_text("not a library")
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    cpu, cuda, available, right = run.stdout.splitlines()
    assert cpu.startswith("cpu False libmegascratch_cpu.so does not load: ")
    assert cuda == "cuda False libmegascratch_cuda.so was not built: no nvcc at build time"
    assert (available, right) == ("()", "True")
