"""The reference: one number for each answer however it comes by, without dropout, kept with what it depends on."""

from pathlib import Path

import pytest
import torch
from alignment import save_tokenizer, way_config, write_way

from megascratch.align.conversations import preference
from megascratch.align.examples import read_examples
from megascratch.align.pairs import answer_logprobs
from megascratch.align.reference import reference_of
from megascratch.align.sources import batches_of, open_sets
from megascratch.config import Config
from megascratch.dist.mesh import Mesh
from megascratch.engine import Engine, Loss, Ratio, Totals
from megascratch.engine.totals import add_up, totals_of
from megascratch.log import make_console


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("reference")
    made = way_config("lora", save_tokenizer(folder), write_way("lora", folder), folder, True, model={"dropout": 0.2})
    Path(made.log.dir).mkdir(parents=True)
    return made


def test_every_kind_gives_the_same_numbers_without_dropout(config: Config) -> None:
    mesh = Mesh.serial()
    engine = Engine(config, mesh)
    sets = open_sets(config, read_examples(config, preference, make_console(1)))
    batch = batches_of(config, mesh, sets.train).at(0)
    with torch.no_grad():
        for param in engine.parameters():  # adapters that change something
            if param.requires_grad:
                param.add_(0.1)
    own = engine.compute(batch, answer_logprobs)
    found = {}
    for how in ("precomputed", "live", "base"):
        complete = reference_of(config, mesh, engine, sets.rows, how)
        found[how] = [one.of_samples["reference"] for one in complete(batch)]
    for microbatch, one, two, three, adapted in zip(batch, *found.values(), own, strict=True):
        present = microbatch.of_samples["present"] > 0
        torch.testing.assert_close(one[present], two[present], rtol=1e-12, atol=1e-12)
        assert torch.equal(two, three)
        assert not torch.allclose(three[present], adapted[present])
    again = engine.compute(batch, answer_logprobs)
    assert all(torch.equal(a, b) for a, b in zip(own, again)), "dropout is off"


def test_numbers_are_kept_and_not_taken_for_those_of_other_answers(config: Config) -> None:
    mesh = Mesh.serial()
    engine = Engine(config, mesh)
    examples = read_examples(config, preference, make_console(1))
    sets, fewer = open_sets(config, examples), open_sets(config, examples[:10])
    file = Path(config.log.dir) / "reference_logprobs.safetensors"
    reference_of(config, mesh, engine, sets.rows, "precomputed")
    written = file.stat().st_mtime_ns
    reference_of(config, mesh, engine, sets.rows, "precomputed")
    assert file.stat().st_mtime_ns == written
    reference_of(config, mesh, engine, fewer.rows, "precomputed")
    assert file.stat().st_mtime_ns != written


def test_sums_of_log_probabilities_are_never_in_half_precision(config: Config) -> None:
    half = config.model_copy(update={"train": config.train.model_copy(update={"dtype": "bf16"}), "lora": None})
    mesh = Mesh.serial()
    batch = batches_of(half, mesh, open_sets(half, read_examples(half, preference, make_console(1))).train).at(0)
    assert all(one.dtype == torch.float32 for one in Engine(half, mesh).compute(batch, answer_logprobs))


def test_a_mean_over_batches_is_no_mean_of_means() -> None:
    """One long sequence and three short ones in two batches: tokens count, not batches."""
    batches = []
    for total, weight, hits in ((30.0, 10.0, 9.0), (6.0, 2.0, 0.0)):
        sums: dict[str, list[torch.Tensor]] = {}
        loss = Loss(torch.tensor(total), torch.tensor(weight), {"hit": Ratio(torch.tensor(hits), torch.tensor(weight))})
        add_up(sums, loss)
        totals = totals_of(sums, Mesh.serial())
        batches.append(totals.means(totals.values.tolist()))
    assert Totals.over(batches).metrics["hit"] == pytest.approx(9 / 12)
    assert Totals.over(batches).loss == pytest.approx(36 / 12)
