"""A recipe in numbers: published counts, and the memory of a mixture of experts by hand."""

import pytest
from command_line import exit_code

from megascratch.config import config_from_dict
from megascratch.plan.model import plan_model


def test_deepseek_v3_on_2048_ranks() -> None:
    """pp 16, ep 64 and ZeRO-1, as its owners trained it: experts are held 128 / 64 = 2 times over a pipeline rank."""
    config = config_from_dict(
        {
            "model": {"preset": "deepseek-v3", "mtp_num_layers": 1},
            "parallel": {"pp": 16, "dp": 128, "ep": 64, "zero": 1, "layers_per_stage": "balanced", "recompute": "full"},
            "data": {"seq_length": 4096},
            "train": {"global_batch": 15360, "micro_batch": 1},
        }
    )
    plan = plan_model(config)
    main = 671_026_419_200
    h, n_heads = 7168, 128
    attention = h * 1536 + 1536 + 1536 * n_heads * 192 + h * 576 + 512 + 512 * n_heads * 256 + n_heads * 128 * h
    module = attention + 3 * h * 2048 * 257 + 256 * h + 256 + 2 * h + (2 * h * h + 3 * h)
    assert plan.parameters == main + module
    assert plan.active == pytest.approx(37e9, rel=0.02)
    # A rank of the middle: 4 layers, whose experts lie over 64 ranks and whose optimizer over 2 or 128.
    experts = 4 * 3 * h * 2048 * 256 // 64
    rest = 4 * (attention + 3 * h * 2048 + 256 * h + 2 * h)
    memory = plan.memory[8]
    assert memory.weights == pytest.approx(2 * (experts + rest), rel=1e-3)
    assert memory.gradients == pytest.approx(4 * (experts + rest), rel=1e-3)
    assert memory.optimizer == pytest.approx(12 * (experts / 2 + rest / 128), rel=1e-3)
    assert memory.activations == 4 * 8 * 4096 * h * 2  # full recomputation: inputs of 4 layers, 8 micro-batches


def test_an_even_dense_model() -> None:
    config = config_from_dict(
        {
            "model": {"preset": "llama3-8b"},
            "parallel": {"pp": 2},
            "data": {"seq_length": 1024},
            "train": {"global_batch": 8},
        }
    )
    plan = plan_model(config)
    norms = 65 * 4096
    assert plan.parameters == plan.active + norms == 8_030_261_248
    embedding, layers = 128256 * 4096, 8_030_261_248 - 2 * 128256 * 4096 - 4096
    assert [memory.weights // 2 for memory in plan.memory] == [layers // 2 + embedding, layers // 2 + embedding + 4096]


def test_the_verb_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("plan", "model.preset=mixtral-8x7b", "parallel.pp=2", "data.seq_length=1024") == 0
    printed = capsys.readouterr().out
    assert "46,702,792,704 parameters, 12.88 billion of them for each token" in printed
    assert printed.count("\n  rank ") == 2
    assert "1,000 steps read 8,000 samples, 8,192,000 tokens: batches of 8\n" in printed
    assert exit_code("plan", "model.preset=tiny") == 2
    assert "model.vocab_size  must be given" in capsys.readouterr().err
