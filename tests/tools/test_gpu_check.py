"""tools/gpu_check.sh as far as a machine without a GPU can tell: refusal, limits, partial results, arithmetic."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megascratch.engine.flops import token_flops

ROOT = Path(__file__).parents[2]


def _load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"tools/bench/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _load("gpu_check", monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    command = [str(ROOT / "tools/gpu_check.sh"), "--out", str(tmp_path / "out.json")]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "nothing was measured" in run.stderr and "no GPU" in run.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_part_that_hangs_or_fails_costs_that_part_alone(check: ModuleType, tmp_path: Path) -> None:
    def script(name: str, body: str, limit_s: float = 20, measures: bool = False) -> Any:
        return check.Part(name, name, (sys.executable, "-c", body), limit_s, measures)

    write = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('[{\"row\": 1}]')"
    hang = "; import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    chosen = [
        script("good", "print('built')"),
        script("bad", "print('a reason'); raise SystemExit(3)"),
        script("hangs", write + hang, limit_s=2, measures=True),
        script("measures", write, measures=True),
        script("late", "import time; time.sleep(60)", limit_s=60),
        script("never", "print('x')"),
    ]
    out = tmp_path / "out.json"
    start = time.monotonic()
    assert not check.run_parts(chosen, 12.0, out, {"device": "none"})
    assert time.monotonic() - start < 30
    results = json.loads(out.read_text())
    found = results["parts"]
    assert results["device"] == "none" and results["seconds"] > 0
    assert [found[part.name]["status"] for part in chosen] == [
        "ok",
        "failed",
        "timed out",
        "ok",
        "timed out",
        "no time left",
    ]
    assert found["bad"]["exit_code"] == 3 and "a reason" in found["bad"]["output_tail"]
    assert found["hangs"]["result"] == found["measures"]["result"] == [{"row": 1}]


def test_the_whole_stays_under_nine_minutes(check: ModuleType) -> None:
    assert sum(part.limit_s for part in check.parts()) <= 9 * 60 + 60, "if every part ran to its limit"
    names = [part.name for part in check.parts()]
    assert names[:3] == ["build", "tests", "ops"]
    assert {"train llama-1b bf16", "train llama-1b fp8", "train llama3-8b bf16", "train llama3-8b fp8"} <= set(names)
    with pytest.raises(SystemExit):
        check.main(["--parts", "nonsense"])


def test_a_step_is_measured_and_its_utilisation_is_the_formula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = _load("gpu_step", monkeypatch)
    tiny = ["model.preset=tiny", "model.vocab_size=512", "data.seq_length=64", "model.n_layers=1"]
    tiny.append("log.peak_tflops=0.5")
    for dtype in ("bf16", "fp8"):
        out = tmp_path / f"{dtype}.json"
        options = ["--device", "cpu", "--warmup", "1", "--steps", "2", "--out", str(out)]
        step.main([*tiny, f"train.dtype={dtype}", *options])
        row = json.loads(out.read_text())
        flops = token_flops(step.recipe(tiny).model, 64)
        assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["step_s"])
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops.causal / 0.5e12)
        assert row["mfu_palm"] == pytest.approx(row["tokens_per_s"] * flops.palm / 0.5e12)
        assert row["forward_s"] + row["backward_s"] + row["optimizer_s"] <= row["step_s"]
        assert row["last_loss"] < row["first_loss"]


def test_presets_have_the_sizes_that_are_promised(monkeypatch: pytest.MonkeyPatch, check: ModuleType) -> None:
    step = _load("gpu_step", monkeypatch)
    for part in check.parts():
        if part.group == "train":
            config = step.recipe([argument for argument in part.command if "=" in argument])
            assert config.data.seq_length == 4096
            assert config.train.global_batch == 4 * config.train.micro_batch


def test_operators_are_measured_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = _load("gpu_ops", monkeypatch)
    out = tmp_path / "ops.json"
    try:
        table.main(["--device", "cpu", "--repeats", "1", "--shape", "256", "64", "--out", str(out)])
    finally:
        torch.set_default_device(None)
    found = json.loads(out.read_text())
    assert {row["operator"] for row in found} >= {"rms_norm", "rope", "swiglu", "adamw", "cross_entropy"}
    assert all(row["ours_ms"] > 0 and row["copy"] > 0 for row in found)
