"""Questions: scores against the uncached model and the harness's own wrapper of the export; files; layouts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saved_models import TEXTS, save_model, tokenizer

from megascratch.checkpoint import convert
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import run_ranks
from megascratch.errors import DataError
from megascratch.evals.continuations import Examinee
from megascratch.evals.questions import Choice, Open, encode_pair, examine, read_questions
from megascratch.infer import Sampling
from megascratch.log import make_console

GREEDY = Sampling(temperature=0)
PAIRS = [
    ("def read", "_lines(path):"),
    ("def read ", "lines"),
    ("", "with open"),
    ("x" * 90, " return [line"),  # a context that loses its beginning
    ("Zwölf große", " Boxkämpfer jagen"),
]
CONTEXTS = ["def ", "with open(path) as", "日本語の", "return " * 40]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def examinee(checkpoint: Path) -> Examinee:
    return Examinee.open(checkpoint, Mesh.serial(), batch=3)


def _request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_the_harness_finds_what_it_finds_in_the_export(examinee: Examinee, checkpoint: Path, tmp_path: Path) -> None:
    """Log-likelihoods, rolling ones and greedy texts equal those of the harness's wrapper of Hugging Face models."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from megascratch.evals.harness import HarnessModel

    folder = convert(checkpoint, tmp_path / "hf", to="hf", console=make_console(1))
    tokenizer().save(folder)
    theirs = HFLM(str(folder), dtype=torch.float64, device="cpu", batch_size=2, max_length=64)
    theirs.tokenizer.pad_token_id = theirs.tokenizer.eos_token_id
    ours = HarnessModel(examinee)
    assert (ours.max_length, ours.eot_token_id) == (theirs.max_length, theirs.eot_token_id)

    pairs = [_request(*pair) for pair in PAIRS]
    for got, want in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert got[0] == pytest.approx(want[0], rel=1e-6)
        assert got[1] == want[1]
    texts = [_request(text) for text in (*TEXTS, TEXTS[0] * 3, "a")]
    rolling = ours.loglikelihood_rolling(texts)
    assert rolling == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-6)
    for kind in ({"until": ["\n"], "max_gen_toks": 20}, {"until": [")", "e"], "max_gen_toks": 12, "do_sample": False}):
        asked = [_request(context, dict(kind)) for context in CONTEXTS]
        assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_greedy_continuation_is_known_as_such(examinee: Examinee) -> None:
    ids = tokenizer().encode("def ")
    text = examinee.generate([ids], GREEDY, 6, ())[0]
    said, other = examinee.score([(ids, tokenizer().encode(text)), (ids, [5, 6])])
    assert said.is_greedy and not other.is_greedy


def _on(checkpoint: Path, spec: MeshSpec) -> tuple[Any, Any]:
    examinee = Examinee.open(checkpoint, Mesh.create(spec, torch.device("cpu")), batch=2)
    pairs = [encode_pair(examinee, *pair) for pair in PAIRS]
    contexts = [tokenizer().encode(context) for context in CONTEXTS]
    return examinee.score(pairs), examinee.generate(contexts, Sampling(seed=3), 8, ["e"])


def test_every_layout_finds_the_same(examinee: Examinee, checkpoint: Path) -> None:
    scores, texts = _on(checkpoint, MeshSpec())
    for got, said in run_ranks(4, _on, checkpoint, MeshSpec(tp=2, dp=2)):
        assert said == texts
        for mine, wanted in zip(got, scores, strict=True):
            assert mine.logprob == pytest.approx(wanted.logprob, rel=1e-9)
            assert mine.is_greedy == wanted.is_greedy


def test_files_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"

    def write(*records: Any) -> Path:
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    choices = {"context": "x", "choices": [" a", " b"]}
    read = read_questions(write({**choices, "answer": 1}, {**choices, "answer": "A"}, {**choices, "answer": " b"}))
    assert [question.right for question in read if isinstance(question, Choice)] == [1, 0, 1]
    assert read_questions(write({"prompt": "1 + 1 =", "answer": 2})) == [Open("1 + 1 =", "2")]
    for records, message in (
        ([{**choices, "answer": 2}], r"line 1: answer = 2 +must be 0 to 1, a letter, or one of the choices"),
        ([{**choices, "answer": 0}, {"prompt": "x"}], "line 2: a question +needs choices, or a prompt and an answer"),
        ([{**choices, "answer": 0}, {"prompt": "x", "answer": 1}], "has questions with choices and without"),
        (["{"], "line 1 +is not JSON"),
        ([""], "has no question"),
    ):
        with pytest.raises(DataError, match=message):
            read_questions(write(*records))
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_shares_by_hand(examinee: Examinee) -> None:
    """The likeliest choice is right once in two questions that have each choice right."""
    choices = (" open(path)", " Boxkämpfer", "x")
    results = [examine(examinee, [Choice("with", choices, right)]).shares for right in range(3)]
    for name in ("accuracy", "accuracy_norm"):
        assert sorted(result[name] for result in results) == [0, 0, 1]
    text = examinee.generate([tokenizer().encode("def ")], GREEDY, 64, ["\n"])[0]
    result = examine(examinee, [Open("def ", text), Open("def ", text + "!")])
    assert (result.n, result.shares) == (2, {"exact_match": 0.5})
