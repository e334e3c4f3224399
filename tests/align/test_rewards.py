"""Rewards: numbers and patterns by hand; functions that raise, return nonsense, hang, print, or end the process."""

import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megascratch.align.rewards import (
    Answered,
    FunctionReward,
    RewardError,
    last_number,
    number_verifier,
    regex_verifier,
)
from megascratch.align.rollout import Question
from megascratch.align.scores import Scorer, Scores
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import RankPool
from megascratch.errors import ConfigError

MODULE = """
import math, os, sys, time

class Inside:
    @staticmethod
    def length(prompt, completion, record):
        return len(completion)

def every(prompt, completion, record):
    print("a print is no answer")
    match completion:
        case "raise": return 1 / 0
        case "nan": return math.nan
        case "none": return None
        case "hang": time.sleep(60)
        case "exit": os._exit(3)
        case "true": return True
    return record["answer"] + len(prompt)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my_rewards.py").write_text(MODULE)
    (folder / "broken.py").write_text("import nowhere")
    return folder


@pytest.fixture(scope="module")
def every(folder: Path) -> Iterator[FunctionReward]:
    reward = FunctionReward("my_rewards:every", 0.5, folder)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("raise", r"ZeroDivisionError: division by zero \(.*my_rewards.py, line 12\)"),
        ("nan", "returned nan"),
        ("none", "TypeError: float"),
        ("hang", "took longer than 0.5 s"),
        ("exit", "ended the process"),
    ],
)
def test_a_function_that_fails_costs_one_score(every: FunctionReward, completion: str, reason: str) -> None:
    start = time.monotonic()
    bad, good = every([Answered("ab", completion, {"answer": 1}), Answered("ab", "fine", {"answer": 1.5})])
    assert math.isnan(bad.value)
    assert re.search(reason, bad.reason), bad.reason
    assert (good.value, good.reason) == (3.5, "")
    assert time.monotonic() - start < 30


def test_a_function_that_hangs_on_and_on_is_not_asked_again(folder: Path) -> None:
    reward = FunctionReward("my_rewards:every", 0.05, folder)
    scores = reward([Answered("", "hang", {}) for _ in range(6)])
    assert [score.reason.startswith("took longer") for score in scores] == [True] * 3 + [False] * 3
    assert scores[-1].reason == "not asked: the function took too long 3 times"
    assert reward([Answered("", "nan", {})])[0].reason == "returned nan", "the next rollout asks again"
    reward.close()


def test_functions_are_found_by_name(folder: Path) -> None:
    reward = FunctionReward("my_rewards:Inside.length", 1.0, folder)
    assert [score.value for score in reward([Answered("", "four", {}), Answered("", "", {})])] == [4.0, 0.0]
    reward.close()
    for target, message in (
        ("my_rewards", "must have the form module:function"),
        ("my_rewards:other", "cannot be used: AttributeError"),
        ("broken:f", "cannot be used: ModuleNotFoundError: No module named 'nowhere'"),
    ):
        with pytest.raises(ConfigError, match=message):
            FunctionReward(target, 1.0, folder)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200.50 in all.", "1200.50"),
        ("first 3, then -4.", "-4"),
        ("1e3", "1000"),
        ("x = .5", "0.5"),
        ("12,34", "34"),
        ("none", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_numbers_are_compared_as_numbers() -> None:
    verifier = number_verifier()
    cases = [
        ("= 1,200", "1200.0"),
        ("= 1201", 1200),
        ("7", "She has 3 + 4 = <<3+4=7>>7. #### 7"),
        ("none", "x"),
        ("1", None),
    ]
    scores = verifier([Answered("", completion, {"answer": answer}) for completion, answer in cases])
    assert [score.value for score in scores[:4]] == [1, 0, 1, 0]
    assert math.isnan(scores[4].value) and scores[4].reason == "the record has no answer"


def test_patterns() -> None:
    verifier = regex_verifier(r"answer is (?P<answer>\w+)", 1.0)
    cases = [("the answer is yes", "yes"), ("the answer is no", "yes"), ("yes", "yes")]
    assert [s.value for s in verifier([Answered("", c, {"answer": a}) for c, a in cases])] == [1, 0, 0]
    assert [s.value for s in regex_verifier("^a+$", 1.0)([Answered("", c, {}) for c in ("aa", "ab")])] == [1, 0]
    hanging = regex_verifier(r"^(a|aa)+$", 0.2)([Answered("", "a" * 60 + "b", {})])[0]
    assert hanging.value == 0 or hanging.reason == "the pattern took too long"
    with pytest.raises(ConfigError, match="is no regular expression"):
        regex_verifier("(", 1.0)


def _scored(mesh: Mesh, fails: bool = False) -> Scores:
    """Score five completions by two rewards, the second of which has no answer to compare with at two of them."""
    rewards = [(regex_verifier("a", 1.0), 0.5), (number_verifier(), 2.0)]
    asked = [Answered("", f"a {i}", {"answer": None if i in (1, 3) else i % 4}) for i in range(5)]
    return Scorer(rewards, mesh, fails)(asked, None)  # type: ignore[arg-type]  # no model judges


def test_scores_are_summed_and_what_is_missing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    scores = _scored(Mesh.serial())
    expected = [2.5, math.nan, 2.5, math.nan, 0.5]
    assert scores.total.tolist() == pytest.approx(expected, nan_ok=True)
    metrics = scores.metrics()
    assert metrics["rewards/missing"] == 0.4
    assert metrics["reward"] == pytest.approx(5.5 / 3)
    assert (metrics["rewards/regex/mean"], metrics["rewards/number/mean"]) == (1.0, pytest.approx(2 / 3))
    questions = [Question(f"p.jsonl, line {i}", torch.ones(1), "", {}) for i in range(5)]
    scores.report(questions, 100, Console(file=sys.stdout, width=200))
    told = capsys.readouterr().out
    assert "no reward for 2 of 5 completions" in told
    assert "sample 103 (p.jsonl, line 3), number: the record has no answer" in told
    with pytest.raises(RewardError, match="completion 1 has no reward number: the record has no answer"):
        _scored(Mesh.serial(), fails=True)


def _on_ranks() -> list[float]:
    return _scored(Mesh.create(MeshSpec(dp=3), torch.device("cpu"))).total.tolist()


def test_ranks_share_the_work(pool: RankPool) -> None:
    for total in pool.run(3, _on_ranks):
        assert total == pytest.approx(_scored(Mesh.serial()).total.tolist(), nan_ok=True)
