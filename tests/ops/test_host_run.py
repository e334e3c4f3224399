"""The host run of CUDA kernels finds missing barriers: each barrier of csrc/cuda/reduce.h is removed in turn."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SEEDS = range(12)
BARRIER = "__syncthreads();"


def compile_without(barrier: int | None, folder: Path) -> ctypes.CDLL:
    """Compile the test kernels against reduce.h with its n-th barrier removed, or whole."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++")
    pieces = (ROOT / "csrc/cuda/reduce.h").read_text().split(BARRIER)
    assert len(pieces) == 3, "reduce.h has two barriers; has a new one a test here?"
    joints = [BARRIER, BARRIER]
    if barrier is not None:
        joints[barrier] = ""
    (folder / "reduce.h").write_text(pieces[0] + joints[0] + pieces[1] + joints[1] + pieces[2])
    library = folder / "reduce_rows.so"
    includes = [f"-I{folder}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc/include'}"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-x", "c++", "-Wno-unknown-pragmas"]
    subprocess.run(
        [gxx, *flags, *includes, str(Path(__file__).parent / "reduce_rows.cu"), "-o", str(library)], check=True
    )
    return ctypes.CDLL(str(library))


def right_schedules(library: ctypes.CDLL, threads: int) -> int:
    """Under how many of the schedules every thread gets its row's sum."""
    x = torch.randn(6, threads, dtype=torch.float64)
    expected = x.sum(dim=1, keepdim=True).expand_as(x)
    right = 0
    for seed in SEEDS:
        out = torch.empty_like(x)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
        library.run_sum_rows(*pointers, ctypes.c_int64(len(x)), ctypes.c_uint(threads), ctypes.c_uint64(seed))
        right += torch.allclose(out, expected)
    return right


def test_whole_and_without_each_barrier(tmp_path):
    found = {}
    for barrier in (None, 0, 1):
        folder = tmp_path / str(barrier)
        folder.mkdir()
        found[barrier] = right_schedules(compile_without(barrier, folder), threads=256)
    assert found[None] == len(SEEDS)
    # The first barrier stands before the reading, the second before the next row's writing.
    assert found[0] <= len(SEEDS) // 4
    assert found[1] <= len(SEEDS) // 4


def test_threads_that_part_end_the_run(tmp_path):
    library = compile_without(None, tmp_path)
    library.run_divergent.restype = ctypes.c_char_p
    assert b"others wait at a barrier" in library.run_divergent(False)
    assert b"only some lanes of a warp reach" in library.run_divergent(True)


def test_sizes_of_a_team(tmp_path):
    library = compile_without(None, tmp_path)
    for threads in (32, 64, 512, 1024):
        assert right_schedules(library, threads) == len(SEEDS)
