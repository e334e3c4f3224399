"""`Ground`: what a fault is provoked on: a corpus, a run that was trained once, and a folder to spoil."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_run import losses, run_config, write_corpus

from megascratch.config import Config
from megascratch.engine import pretrain
from megascratch.errors import MegascratchError


@dataclass(frozen=True)
class Trained:
    """A run of six steps with checkpoints of steps 2, 4 and 6, and the corpus that it read."""

    corpus: Path
    run: Path
    losses: dict[int, float]

    @classmethod
    def in_folder(cls, folder: Path) -> "Trained":
        corpus = write_corpus(folder)
        config = run_config(corpus, folder, checkpoint={"every": 2}, eval={"batches": 1})
        assert pretrain(config, None) == 0
        return cls(corpus, folder / "run", losses(config))


@dataclass
class Ground:
    """One fault's own place."""

    trained: Trained
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    captured: Callable[[], str]

    def config(self, **sections: dict[str, Any]) -> Config:
        """Return the recipe of the trained run, in this folder; with sections' keys in place of its own."""
        sections = {"checkpoint": {"every": 2} | sections.pop("checkpoint", {}), "eval": {"batches": 1}} | sections
        return run_config(self.trained.corpus, self.folder, **sections)

    def stopped(self, step: int = 4) -> Path:
        """Lay out the run as it was after a step, and return its newest checkpoint."""
        run = self.folder / "run"
        shutil.copytree(self.trained.run, run)
        for later in range(step + 1, 7):
            shutil.rmtree(run / f"checkpoints/step_{later:08d}", ignore_errors=True)
        (run / "checkpoints/latest").write_text(f"step_{step:08d}\n")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:step]))
        return run / f"checkpoints/step_{step:08d}"

    def said_by(self, work: Callable[[], Any]) -> str:
        """Run what must fail with an error of ours, and return it."""
        with pytest.raises(MegascratchError) as caught:
            work()
        return str(caught.value)

    def resumes(self, config: Config | None = None) -> str:
        """Train on to the end; the losses of all steps are those of the undisturbed run."""
        config = config or self.config()
        assert pretrain(config, None) == 0
        assert losses(config) == self.trained.losses
        return "exact continuation"

    def patch(self) -> AbstractContextManager[pytest.MonkeyPatch]:
        return self.monkeypatch.context()
