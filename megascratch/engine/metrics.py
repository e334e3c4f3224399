"""The run directory: resolved configuration, one JSON object a step, TensorBoard events. Only rank 0 writes."""

import fcntl
import json
import math
import os
import shutil
import socket
import uuid
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.filesize import decimal
from torch.utils.tensorboard import SummaryWriter

from megascratch.config import Config, to_toml
from megascratch.engine.meter import PHASES
from megascratch.errors import ConfigError, Problem


class RunDirectory:
    """`<log.dir>/` of one run.

    Args:
        config: resolved.
        writes: whether this rank is the one that writes.

    Raises: ConfigError: if another job writes into it.
    """

    def __init__(self, config: Config, writes: bool) -> None:
        self.path = Path(config.log.dir)
        self.writes = writes
        self.id = ""  # of the run, through all its restarts; rank 0's counts
        self._tensorboard: SummaryWriter | None = None
        if not writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self.id = self._take_id()
        (self.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
        self.stop_file.unlink(missing_ok=True)  # it stopped an earlier run
        tokenizer = config.data.tokenizer
        if tokenizer is not None:
            self._keep_tokenizer(Path(tokenizer))
        if config.log.tensorboard:
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def _take_lock(self) -> TextIO:
        """Hold `lock` for as long as this process lives, so that no second job writes into the same directory.

        Raises: ConfigError: if another job holds it, naming that job.
        """
        file = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read(200).strip() or "another job"
            problem = Problem(
                f"log.dir = {self.path}", f"is in use by {holder}", "stop that job, or set another log.dir"
            )
            raise ConfigError(problem) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def _take_id(self) -> str:
        file = self.path / "run_id"
        if not file.is_file():
            file.write_text(f"{uuid.uuid4().hex}\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    @property
    def stop_file(self) -> Path:
        """Whoever makes this file asks the run to save and end after the step that it is in."""
        return self.path / "stop"

    def log(self, values: dict[str, Any]) -> None:
        """Append one step's values to `metrics.jsonl`, full precision, and to TensorBoard.

        JSON has no NaN: a value that is not finite is written as null.
        """
        if not self.writes:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        if self._tensorboard is not None:
            for name, value in clean.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._tensorboard.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Flush what is buffered, and let another job have the directory."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self.writes:
            self._lock.close()

    def _keep_tokenizer(self, source: Path) -> None:
        source = source / "tokenizer.json" if source.is_dir() else source
        target = self.path / "tokenizer.json"
        if source.is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source, target)


def describe_step(values: dict[str, Any], console: Console) -> None:
    """Print one step on one line."""
    parts = [
        f"step {values['step']:>6}",
        f"loss {values['loss']:.4f}",
        f"grad norm {values['grad_norm']:.3f}",
        f"lr {values['lr']:.3g}",
        f"{values['tokens_per_s']:,.0f} tokens/s",
    ]
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%} causal, {values['mfu_palm']:.1%} PaLM")
    parts.append("ms " + ", ".join(f"{phase} {values[f'{phase}_s'] * 1e3:.0f}" for phase in PHASES))
    parts.append(f"peak {decimal(values['peak_memory_bytes'])}")
    if "valid_loss" in values:
        parts.append(f"valid {values['valid_loss']:.4f}")
    if values.get("skipped"):
        parts.append("skipped: loss or gradient were not finite, or spiked")
    console.print(" · ".join(parts))
