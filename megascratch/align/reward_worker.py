"""Runs a user's reward function in a process of its own: a script that imports nothing of megascratch.

Each line that comes in is a JSON object, and each line that goes out answers one:

    {"path": [...], "module": "rewards", "function": "exact"}            → {"ready": true}, or {"error": "..."}
    {"prompt": "2 + 2 =", "completion": " 4", "record": {...}}           → {"reward": 1.0}, or {"error": "..."}

What the function prints goes to stderr. The process that started this one ends it when an answer takes too long.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    function: Any = None
    answer: dict[str, Any]
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if function is None:
                sys.path[:0] = request["path"]
                function = importlib.import_module(request["module"])
                for name in request["function"].split("."):
                    function = getattr(function, name)
                answer = {"ready": True}
            else:
                value = function(request["prompt"], request["completion"], request["record"])
                answer = {"reward": float(value)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
