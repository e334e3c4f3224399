"""Evaluation: how well a checkpoint predicts a dataset."""

from megascratch.evals.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
