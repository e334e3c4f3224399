"""How likely a model finds given continuations, and what it says by itself: what tasks with questions are made of.

By hand, context `a b` and continuation `c d`: one pass over `a b c` gives log p(c | a b) and log p(d | a b c). Their
sum is the continuation's, and it is greedy if c and d are the likeliest tokens at their places. A context that is too
long for the model loses its beginning.

Ranks of tp hold one model together, and the replicas along dp take turns with the items.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.infer import Sampling, complete, load_model, open_tokenizer, read_config
from megascratch.nn import SequenceInfo, Stage, token_logprobs
from megascratch.nn.linear import column_linear
from megascratch.tokenizer import Tokenizer

_HEAD_TOKENS = 1024  # whose whole logits exist at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


class Score(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether the model would have said it itself."""

    logprob: float
    is_greedy: bool


class Examinee:
    """A model that answers. Every rank of the mesh makes it, and makes the same calls.

    Args:
        stage: the whole model, in evaluation mode, on this rank of tp.
        tokenizer: the model's.
        mesh: of tp and dp alone.
        batch: sequences that a replica runs at once.
    """

    def __init__(self, stage: Stage, tokenizer: Tokenizer, mesh: Mesh, batch: int = 16) -> None:
        self.stage, self.tokenizer, self.mesh, self.batch = stage, tokenizer, mesh, batch

    @classmethod
    def open(cls, checkpoint: Path, mesh: Mesh, tokenizer: Path | None = None, batch: int = 16) -> "Examinee":
        """Read a checkpoint.

        Raises: UserError: if checkpoint or tokenizer are unusable.
        """
        opened = open_tokenizer(checkpoint, read_config(checkpoint, mesh.spec.tp), tokenizer)
        stage, _ = load_model(checkpoint, mesh)
        return cls(stage, opened, mesh, batch)

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.stage.model.max_seq_length

    @property
    def prefix_id(self) -> int:
        """The token that a text begins behind: the vocabulary's own beginning, or else the end of the one before."""
        opening = self.tokenizer.encode("", add_special_tokens=True)
        first = opening[0] if opening else self.tokenizer.eod_id
        assert first is not None, "the vocabulary has neither a beginning nor an end of text"
        return first

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Score continuations.

        Args:
            pairs: context and continuation, ids of at least one token each.

        Returns: one a pair, the same on every rank.
        """
        return self._shared(pairs, self._score, lambda score: list(score), lambda told: Score(*told))

    def generate(
        self, contexts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int, stops: Sequence[str]
    ) -> list[str]:
        """Continue contexts until a stop, which is left out, or the end of the document.

        Args:
            contexts: ids; a context loses its beginning if it leaves too little room.
            sampling: how tokens are chosen.
            max_tokens: to generate at most.
            stops: texts that end a continuation.

        Returns: one a context, the same on every rank.
        """
        numbered = list(enumerate(contexts))

        def texts(items: Sequence[tuple[int, Sequence[int]]]) -> list[str]:
            return self._generate(items, sampling, max_tokens, stops)

        return self._shared(numbered, texts, lambda text: text, lambda told: told)

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        rows = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in pairs]
        counts = [min(len(continuation), len(row) - 1) for row, (_, continuation) in zip(rows, pairs)]
        s = max(map(len, rows)) - 1
        inputs, places, labels = torch.zeros(len(rows), s, dtype=torch.int64), [], []
        for i, (row, count) in enumerate(zip(rows, counts)):
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            places += [(t, i) for t in range(len(row) - 1 - count, len(row) - 1)]
            labels += row[len(row) - count :]
        at = self.stage.placement
        hidden = self.stage.hidden(None, inputs.to(at.device), SequenceInfo(s))
        where = torch.tensor(places, device=at.device)
        logprobs, hits = self._of_labels(hidden[where[:, 0], where[:, 1]], torch.tensor(labels, device=at.device))
        return [
            Score(float(some.sum()), bool(hit.all()))
            for some, hit in zip(logprobs.double().cpu().split(counts), hits.cpu().split(counts))
        ]

    def _of_labels(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(label) behind hidden [n, h], and whether the label is the likeliest, [n] each."""
        tp, vocab_size = self.stage.placement.tp, self.stage.model.vocab_size
        assert vocab_size is not None
        logprobs, hits = [], []
        for x, wanted in zip(hidden.split(_HEAD_TOKENS), labels.split(_HEAD_TOKENS)):
            own = column_linear(x.unsqueeze(0), self.stage.head_weight, tp, False)[0]
            logprobs.append(token_logprobs(own, wanted, vocab_size, tp))
            hits.append(comm.gather(own, tp, dim=-1)[:, :vocab_size].argmax(-1) == wanted)
        return torch.cat(logprobs), torch.cat(hits)

    def _generate(
        self, items: Sequence[tuple[int, Sequence[int]]], sampling: Sampling, max_tokens: int, stops: Sequence[str]
    ) -> list[str]:
        room = max(1, self.max_length - max_tokens)

        def ends(row: int, ids: list[int]) -> bool:
            # A stop may have begun up to so many tokens ago as it has characters, which have a byte at least.
            longest = max((len(stop.encode()) for stop in stops), default=0)
            tail = self.tokenizer.decode(ids[-longest - 4 :]) if longest else ""
            return any(stop in tail for stop in stops)

        eod = self.tokenizer.eod_id
        completions = complete(
            self.stage,
            [list(context)[-room:] for _, context in items],
            sampling,
            max_tokens=max_tokens,
            stop_ids=() if eod is None else (eod,),
            n_ids=self.tokenizer.vocab_size,
            sequences=[number for number, _ in items],
            ends=ends if stops else None,
        )
        texts = []
        for completion in completions:
            text = self.tokenizer.decode([id for id in completion.tokens.tolist() if id != eod])
            for stop in stops:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def _shared(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], list[Result]],
        tell: Callable[[Result], Any],
        hear: Callable[[Any], Result],
    ) -> list[Result]:
        """Do the work in batches of similar length, every replica its own, and give everyone all results in order."""
        replicas = self.mesh.dp
        order = sorted(range(len(items)), key=lambda i: -_length(items[i]))
        own = order[replicas.rank :: replicas.size]
        done: dict[int, Any] = {}
        for start in range(0, len(own), self.batch):
            numbers = own[start : start + self.batch]
            done |= {i: tell(result) for i, result in zip(numbers, work([items[i] for i in numbers]))}
        said = json.dumps(sorted(done.items())).encode()
        told = {
            i: value for data in comm.gather_bytes(said, replicas, self.mesh.device) for i, value in json.loads(data)
        }
        return [hear(told[i]) for i in range(len(items))]


def _length(item: Any) -> int:
    """Return how many tokens an item has: a context and its continuation, or a number and a context."""
    return sum(len(part) for part in item if not isinstance(part, int))
