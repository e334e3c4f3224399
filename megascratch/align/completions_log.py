"""Some completions of each rollout as text, in `completions.jsonl` of the run directory. Only rank 0 writes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megascratch.align.rollout import Rollout
from megascratch.align.scores import Scores


class CompletionsLog:
    """Writes the first completions of each rollout.

    Args:
        folder: the run directory.
        n: completions of a rollout.
    """

    def __init__(self, folder: Path, n: int) -> None:
        self.path, self.n = folder / "completions.jsonl", n

    def write(self, step: int, rollout: Rollout, texts: Sequence[str], scores: Scores, advantages: Tensor) -> None:
        """Append one object a completion; what is not a number is null.

        Args:
            step: training steps done before the rollout.
            rollout, texts, scores: of it.
            advantages: [n, s]; that of a completion's last token is written.
        """
        lines = []
        for i in range(min(self.n, len(texts))):
            last = int(rollout.lengths[i]) - 2
            values = {"reward": float(rollout.rewards[i]), "advantage": float(advantages[i, last])}
            values |= {f"rewards/{name}": float(of[i]) for name, of in scores.values.items()}
            numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
            said = {"prompt": rollout.questions[i].text, "completion": texts[i], "where": rollout.questions[i].where}
            stopped = rollout.completions[i].stopped
            lines.append(json.dumps({"step": step, **said, "stopped": stopped, **numbers}, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
