"""Each fault of the table ends as the table says, and the docs are the table."""

from pathlib import Path

import pytest
from fault_table import PAGE, Fault, all_faults, page
from ground import Ground, Trained

PROVOKED = [fault for fault in all_faults() if fault.provoke is not None]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained.in_folder(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def ground(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Ground:
    return Ground(trained, tmp_path, monkeypatch, lambda: capfd.readouterr().err)


@pytest.mark.parametrize("fault", PROVOKED, ids=[fault.name for fault in PROVOKED])
def test_a_fault_ends_as_the_table_says(fault: Fault, ground: Ground) -> None:
    assert fault.provoke is not None
    fault.matches(fault.provoke(ground))


def test_the_table_is_long_and_names_each_fault_once() -> None:
    names = [fault.name for fault in all_faults()]
    assert len(names) >= 55
    assert len(names) == len(set(names))


def test_the_docs_are_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/faults/fault_table.py"
