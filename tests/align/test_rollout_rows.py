"""Rows of completions: every token once, whatever shares a row, and as many rows as a layout shares out evenly."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import make_config
from reinforcement import reinforced

from megascratch.align.rollout import Question, Rollout
from megascratch.align.rollout_rows import microbatches_of
from megascratch.infer import Completion

LAYOUTS = [{}, {"pp": 2, "vp": 2, "dp": 2}, {"pp": 2, "dp": 2, "schedule": "dualpipe"}, {"cp": 2}]


def _rollout(lengths: list[tuple[int, int]], s: int) -> Rollout:
    """Prompts and completions of these lengths; the i-th has tokens 100·i + place + 1, which are of no language."""
    questions, completions = [], []
    for i, (prompt, said) in enumerate(lengths):
        ids = 100 * i + torch.arange(prompt + said) + 1
        questions.append(Question(f"line {i}", ids[:prompt], "", {}))
        completions.append(Completion(ids[prompt:], torch.linspace(-3, -0.1, said), True))
    return Rollout.of(0, questions, completions, s)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=8, max_size=8), st.sampled_from(LAYOUTS))
def test_every_token_lies_in_one_place_with_what_concerns_it(lengths: list[Any], parallel: dict[str, Any]) -> None:
    config = reinforced(make_config("llama", parallel, packed=True, n_layers=4), {})
    rollout = _rollout(lengths, config.data.seq_length)
    seen: dict[int, tuple[int, float]] = {}
    n_dp = parallel.get("dp", 1)
    for rank in range(n_dp):
        mesh = SimpleNamespace(dp=SimpleNamespace(rank=rank, size=n_dp), pp=SimpleNamespace(size=config.parallel.pp))
        engine: Any = SimpleNamespace(config=config, mesh=mesh)
        microbatches = microbatches_of(engine, rollout, torch.arange(8), 40, {"sampled": rollout.sampled})
        assert len(microbatches) % (config.parallel.pp * (2 if parallel.get("schedule") == "dualpipe" else 1)) == 0
        for m in microbatches:
            assert len(m.tokens) == config.train.micro_batch
            for row, place in m.tokens.nonzero().tolist():
                token, label = int(m.tokens[row, place]), int(m.labels[row, place])
                completion, position = divmod(token - 1, 100)
                assert token not in seen
                assert label == (token + 1 if position + 1 < sum(lengths[completion]) else 0)
                assert int(m.position_ids[row, place]) == position
                assert int(m.of_samples["answer"][row, m.documents[row, place]]) == completion
                assert m.of_tokens["sampled"][row, place] == rollout.sampled[completion, position]
                seen[token] = int(m.loss_mask[row, place]), place
            assert not m.loss_mask[m.tokens == 0].any()
    assert len(seen) == sum(map(sum, lengths))
    assert sum(counted for counted, _ in seen.values()) == sum(said for _, said in lengths)


def test_rows_are_as_short_as_their_number_lets_them_be() -> None:
    """Sixteen completions of 40 tokens: four rows of 160 places on one rank, and on eight ranks two each in 96."""
    config = reinforced(make_config("llama", packed=True), {})
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 160})})
    rollout = _rollout([(10, 30)] * 16, 160)
    shapes = []
    for size in (1, 8):
        mesh = SimpleNamespace(dp=SimpleNamespace(rank=0, size=size), pp=SimpleNamespace(size=1))
        engine: Any = SimpleNamespace(config=config, mesh=mesh)
        microbatches = microbatches_of(engine, rollout, torch.arange(16), 0, {})
        shapes.append((len(microbatches), *microbatches[0].tokens.shape))
    assert shapes == [(4, 1, 160), (1, 1, 96)]
