"""Evaluation: how well a checkpoint predicts a dataset, and answers questions."""

from megascratch.evals.continuations import Examinee, Score
from megascratch.evals.perplexity import Evaluation, evaluate
from megascratch.evals.questions import examine, read_questions

__all__ = ["Evaluation", "Examinee", "Score", "evaluate", "examine", "read_questions"]
