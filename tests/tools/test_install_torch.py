"""Which torch set-up installs: the one that is there, the plain build beside a GPU, else the nearest CPU build."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/install_torch.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.11.0", True),
        ("2.13.1+cpu", True),
        ("2.12.0a0+git1", True),
        ("2.10.1", False),
        ("2.14.0", False),
        ("x", False),
    ],
)
def test_versions_that_fit(script: ModuleType, version: str, fits: bool) -> None:
    assert script.fits(version) is fits


def attempts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, present: str | None, gpu: bool, works: int
) -> list[str]:
    """Run the script with a pip whose attempt number `works` succeeds; return what was asked of it."""
    asked: list[str] = []

    def install(requirement: list[str]) -> str | None:
        asked.append(" ".join(requirement))
        return None if len(asked) == works else "ERROR: not found"

    monkeypatch.setattr(script, "install", install)
    monkeypatch.setattr(script, "installed_version", lambda: present)
    monkeypatch.setattr(script, "has_nvidia_gpu", lambda: gpu)
    expected = 0 if works or present else 1
    assert script.main() == expected
    return asked


def test_a_torch_that_fits_stays(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts(script, monkeypatch, "2.12.0+cu130", gpu=True, works=0) == []


def test_a_torch_that_does_not_fit_is_replaced(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts(script, monkeypatch, "2.9.0", gpu=False, works=1) == ["torch==2.13.0+cpu"]


def test_beside_a_gpu_the_plain_build(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts(script, monkeypatch, None, gpu=True, works=1) == ["torch==2.13.0"]


def test_without_a_gpu_the_nearest_cpu_build(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts(script, monkeypatch, None, gpu=False, works=3) == [
        "torch==2.13.0+cpu",
        "torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu",
        "torch==2.13.0",
    ]


def test_nothing_to_be_had_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(attempts(script, monkeypatch, None, gpu=False, works=0)) == 3
    assert capsys.readouterr().err == "torch 2.13.0 could not be installed; is this machine online?\n"


def test_requirement_is_that_of_the_package(script: ModuleType) -> None:
    metadata = (SCRIPT.parents[1] / "pyproject.toml").read_text()
    assert '"torch>={}.{},<{}.{}"'.format(*script.OLDEST, *script.TOO_NEW) in metadata
