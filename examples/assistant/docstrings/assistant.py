"""The demo's model becomes an assistant: SFT → DPO, SFT → reward → PPO, and SFT → GRPO, with a table of what changed.

    make demo                                                        the base model: demo/one_rank
    python examples/assistant/docstrings/assistant.py
    python examples/assistant/docstrings/assistant.py --gsm8k gsm8k-train.jsonl     school mathematics too

Questions are made from Python's standard library: "What does shutil.copytree(src, dst) do?" has the beginning of the
docstring as its answer. Of a pair, the chosen answer is that docstring and the rejected one has its words in another
order, which a verifier can tell. Sums of two digits up to 4 are the task of GRPO; SFT shows them with answers drawn at
random, so that their form is learned and nothing else. Functions are held out by their docstring, so that no answer is
in both parts.

Every step is a `megascratch` command, printed before it runs; two CPU cores need some minutes.
"""

import argparse
import ast
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megascratch.align.rewards import Answered, number_verifier
from megascratch.dist.mesh import Mesh
from megascratch.evals import Examinee
from megascratch.infer import Sampling
from megascratch.infer.decoding import read_prompts
from megascratch.nn import scores

HERE = Path(__file__).parent.resolve()
sys.path.insert(0, str(HERE.parents[1] / "demo"))
from corpus import documents  # noqa: E402  # the demo's own, so that both read the same library

BASE, FOLDER = Path("demo/one_rank"), Path("assistant/docstrings")  # relative to the root of the repository
MEGASCRATCH = Path(sys.executable).with_name("megascratch")
N_HELD_OUT, N_PAIRS, LARGEST, LONGEST_ANSWER, LONGEST_QUESTION = 200, 1500, 4, 120, 80
GSM8K_HELD_OUT, GSM8K_TOKENS = 50, 96


class Answer(NamedTuple):
    """A question, and what the library says."""

    question: str
    answer: str


class Found(NamedTuple):
    """What a model makes of held-out questions.

    Attributes:
        perplexity: of the right answers.
        preferred: share of right answers that are likelier, a token, than the same words in disorder.
        reward: of the model's own answers, by the reward model.
        sums: share of right ones, by the likeliest tokens.
    """

    perplexity: float
    preferred: float
    reward: float
    sums: float


def main() -> None:
    """Run the steps, measure every model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="JSON Lines with question and answer, as GSM8K is published")
    gsm8k = parser.parse_args().gsm8k
    gsm8k = gsm8k and gsm8k.resolve()
    os.chdir(HERE.parents[2])
    if not BASE.exists():
        sys.exit(f"{BASE} is not there: run make demo first")
    shutil.rmtree(FOLDER, ignore_errors=True)  # the example's own: runs in it would be resumed
    held_out = write_data()
    for method in ("sft", "reward", "dpo", "ppo", "grpo"):
        train(method)
    judge = Examinee.open(FOLDER / "reward/checkpoints", Mesh.serial())
    models = {"base": BASE, **{name: FOLDER / name / "checkpoints" for name in ("sft", "dpo", "ppo", "grpo")}}
    print(f"\n{'held out':12}{'perplexity':>12}{'prefers right':>15}{'reward':>9}{'sums right':>12}")
    for name, checkpoint in models.items():
        found = measure(checkpoint, judge, held_out)
        print(
            f"{name:12}{found.perplexity:12.1f}{found.preferred:15.1%}{found.reward:9.2f}{found.sums:12.1%}", flush=True
        )
    print(f"{'reward model':12}{'':12}{judged_rightly(judge, held_out):15.1%}")
    if gsm8k is not None:
        learn_mathematics(gsm8k)


def library() -> list[Answer]:
    """Return the public functions and classes of the standard library that are described in one short sentence."""
    found: dict[str, Answer] = {}
    for name, text in documents():
        if not name.endswith(".py") or "test" in name:
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for answer in described(module, text):
            found.setdefault(answer.answer, answer)
    answers = sorted(found.values(), key=lambda answer: answer.answer)
    random.Random(0).shuffle(answers)
    return answers


def described(module: str, text: str) -> Iterator[Answer]:
    """Yield what a module's source says of its public functions and classes."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # some of the library's files are wrong on purpose
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        arguments = ""
        if isinstance(node, ast.FunctionDef):
            arguments = f"({', '.join(argument.arg for argument in node.args.args if argument.arg != 'self')})"
        question = f"Question: What does {module}.{node.name}{arguments} do?\nAnswer:"
        if 20 <= len(answer) <= LONGEST_ANSWER and len(question) <= LONGEST_QUESTION:
            yield Answer(question, f" {answer}")


def write_data() -> list[tuple[Answer, str]]:
    """Write what each method learns from; return held-out questions with their answer, in and out of order."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, answers = random.Random(1), library()
    held_out, learned = answers[:N_HELD_OUT], answers[N_HELD_OUT:]
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    guessed = [(a, b, source.randint(0, 2 * LARGEST)) for _ in range(20) for a, b in sums]
    shown = [{"prompt": one.question, "completion": one.answer} for one in learned]
    shown += [{"prompt": asked(a, b), "completion": f" {c}"} for a, b, c in guessed]
    source.shuffle(shown)
    write("shown", shown)
    compared = in_two_orders(learned, source)[:N_PAIRS]
    write("pairs", [{"prompt": one.question, "chosen": one.answer, "rejected": other} for one, other in compared])
    write("questions", [{"prompt": one.question} for one in learned])
    write("sums", [{"prompt": asked(a, b), "answer": str(a + b)} for a, b in sums])
    print(f"{len(learned):,} questions to learn from, {len(held_out)} held out, {len(sums)} sums")
    return in_two_orders(held_out, source)


def in_two_orders(answers: list[Answer], source: random.Random) -> list[tuple[Answer, str]]:
    """Return each answer of a few words, with its words in another order."""
    found = []
    for one in answers:
        words = one.answer.split()
        others = list(words)
        if len(set(words)) >= 4:
            while others == words:
                source.shuffle(others)
            found.append((one, " " + " ".join(others)))
    return found


def asked(a: int, b: int) -> str:
    """Return the question for a sum."""
    return f"Question: What is {a} plus {b}?\nAnswer:"


def write(name: str, records: list[dict[str, str]]) -> None:
    """Write a file of JSON Lines."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def train(method: str, *overrides: str) -> None:
    """Train by a recipe beside this file."""
    command = [str(MEGASCRATCH), method, str(HERE.relative_to(Path.cwd()) / f"{method}.toml"), *overrides]
    print("$", shlex.join(["megascratch", *command[1:]]), flush=True)
    subprocess.run(command, check=True)


def measure(checkpoint: Path, judge: Examinee, held_out: list[tuple[Answer, str]]) -> Found:
    """Have a model answer the held-out questions, and find the right answers likely or not."""
    examinee = Examinee.open(checkpoint, Mesh.serial(), batch=100)
    encode, end = examinee.tokenizer.encode, [examinee.tokenizer.eod_id or 0]

    def likelihoods(answers: list[str]) -> tuple[list[float], list[int]]:
        ids = [encode(answer) + end for answer in answers]
        scored = examinee.score([(encode(one.question), own) for (one, _), own in zip(held_out, ids)])
        return [score.logprob for score in scored], [len(own) for own in ids]

    right, n_right = likelihoods([one.answer for one, _ in held_out])
    wrong, n_wrong = likelihoods([other for _, other in held_out])
    preferred = sum(a / m > b / n for a, m, b, n in zip(right, n_right, wrong, n_wrong)) / len(held_out)
    said = examinee.generate([encode(one.question) for one, _ in held_out], Sampling(seed=1), 32, ())
    rewards = judged(judge, [(one.question, text) for (one, _), text in zip(held_out, said)])
    sums = [json.loads(line) for line in (FOLDER / "sums.jsonl").read_text().splitlines()]
    perplexity = math.exp(-sum(right) / sum(n_right))
    return Found(perplexity, preferred, float(rewards.mean()), share_right(examinee, sums, 4))


@torch.no_grad()
def judged(judge: Examinee, texts: list[tuple[str, str]]) -> torch.Tensor:
    """Return the reward model's score of each answer to a question, [n]."""
    tokenizer = judge.tokenizer
    ids = [tokenizer.encode(question) + tokenizer.encode(text) + [tokenizer.eod_id] for question, text in texts]
    behind, _ = read_prompts(judge.stage, [torch.tensor(one) for one in ids])
    return scores(behind, judge.stage.head_weight).squeeze(-1)


def judged_rightly(judge: Examinee, held_out: list[tuple[Answer, str]]) -> float:
    """Return how often the reward model scores the right answer higher than the other one."""
    right = judged(judge, [(one.question, one.answer) for one, _ in held_out])
    return float((right > judged(judge, [(one.question, other) for one, other in held_out])).double().mean())


def share_right(examinee: Examinee, questions: list[dict[str, str]], max_tokens: int) -> float:
    """Return how often the last number of the likeliest answer is the right one."""
    contexts = [examinee.tokenizer.encode(question["prompt"]) for question in questions]
    said = examinee.generate(contexts, Sampling(temperature=0), max_tokens, ())
    found = number_verifier()([Answered(q["prompt"], text, q) for q, text in zip(questions, said)])
    return sum(score.value for score in found) / len(questions)


def learn_mathematics(path: Path) -> None:
    """Train SFT and GRPO on GSM8K's problems as far as they are short, and print the share of right answers."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    problems = [
        {"prompt": f"Question: {one['question']}\nAnswer:", "completion": f" {one['answer']}", "answer": one["answer"]}
        for one in records
        if len(one["question"]) <= 250 and len(one["answer"]) <= 200
    ]
    held_out, learned = problems[:GSM8K_HELD_OUT], problems[GSM8K_HELD_OUT:]
    write("gsm8k", learned)
    runs = {name: FOLDER / f"gsm8k_{name}" for name in ("sft", "grpo")}
    data = f"data.paths=['{FOLDER / 'gsm8k.jsonl'}']"
    train("sft", data, f"log.dir={runs['sft']}")
    longer = "data.seq_length=256", f"rollout.max_tokens={GSM8K_TOKENS}", "train.micro_batch=25"
    shorter = "train.steps=20", "optim.decay_steps=10"
    start = f"checkpoint.init={runs['sft'] / 'checkpoints'}"
    train("grpo", data, start, *longer, *shorter, f"log.dir={runs['grpo']}")
    print(f"\n{'GSM8K, held out':18}{'right':>8}")
    for name, checkpoint in {"base": BASE, **{name: run / "checkpoints" for name, run in runs.items()}}.items():
        examinee = Examinee.open(checkpoint, Mesh.serial(), batch=GSM8K_HELD_OUT)
        print(f"{name:18}{share_right(examinee, held_out, GSM8K_TOKENS):8.1%}", flush=True)


if __name__ == "__main__":
    main()
