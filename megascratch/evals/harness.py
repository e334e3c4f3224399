"""A checkpoint as a model of EleutherAI's lm-evaluation-harness: `pip install megascratch[harness]`.

    from lm_eval import simple_evaluate
    simple_evaluate(model=HarnessModel(Examinee.open(checkpoint, mesh)), tasks=["hellaswag"])

or `lm_eval --model megascratch --model_args checkpoint=runs/demo/checkpoints` once this module is imported. What is
encoded, cut and scored is what the harness's own wrapper of Hugging Face models does, so the numbers are equal.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megascratch.dist.launch import Environment
from megascratch.dist.mesh import Mesh
from megascratch.errors import MissingDependency, Problem
from megascratch.evals.continuations import Examinee
from megascratch.infer import Sampling

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MissingDependency(
        Problem("lm-eval", "is not installed", "pip install megascratch[harness]"), "lm-evaluation-harness"
    ) from None

_MAX_TOKENS = 256  # where a task does not say how much is to be generated


@register_model("megascratch")
class HarnessModel(TemplateLM):
    """What the harness asks of a model.

    Args:
        examinee: the model; or else
        checkpoint: is opened in this process,
        tokenizer: with this tokenizer, or its own,
        batch_size: so many sequences at once.
    """

    def __init__(
        self,
        examinee: Examinee | None = None,
        *,
        checkpoint: str = "",
        tokenizer: str | None = None,
        batch_size: int | str = 16,
        **_: Any,  # the harness passes its device and others
    ) -> None:
        super().__init__()
        if examinee is None:
            device = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1).device
            given = None if tokenizer is None else Path(tokenizer)
            batch = int(batch_size) if str(batch_size).isdigit() else 16
            examinee = Examinee.open(Path(checkpoint), Mesh.serial(device), given, batch)
        self.examinee = examinee

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        eod = self.examinee.tokenizer.eod_id
        return self.examinee.prefix_id if eod is None else eod

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored behind."""
        return self.examinee.prefix_id

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.examinee.max_length

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return "megascratch"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; special tokens in it are special."""
        tokenizer = self.examinee.tokenizer
        own = True if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(tokenizer.decode([self.prefix_token_id])):
            own = False
        return tokenizer.encode(string, allowed_special="all", add_special_tokens=own)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self.examinee.score([(context, continuation) for _, context, continuation in requests])
        for request, score in zip(requests, scores):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], tuple(score))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each window with one token of context at least."""
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            own = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [utils.make_disjoint_window(pair) for pair in own]
            windows += parts
            counts.append(len(parts))
        scores = iter(self.examinee.score(windows))
        totals = [sum(next(scores).logprob for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts; requests that ask for the same are generated together."""
        answers: dict[int, str] = {}
        for kind in _distinct(request.args[1] for request in requests):
            numbers = [i for i, request in enumerate(requests) if request.args[1] == kind]
            until = kind.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            limits = [kind[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if kind.get(key)]
            temperature = float(kind.get("temperature") or 0.0) if kind.get("do_sample") is not False else 0.0
            sampling = Sampling(temperature, int(kind.get("top_k") or 0), float(kind.get("top_p") or 1.0))
            contexts = [self.tok_encode(requests[i].args[0]) for i in numbers]
            max_tokens = int(limits[0]) if limits else _MAX_TOKENS
            answers |= zip(numbers, self.examinee.generate(contexts, sampling, max_tokens, stops))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[i])
        return [answers[i] for i in range(len(requests))]


def _distinct(kinds: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind in kinds:
        if kind not in found:
            found.append(kind)
    return found
