"""Every family against transformers: bit for bit there and back, the same logits, the same tokens generated."""

from pathlib import Path

import pytest
import torch
import transformers
from hf_models import MODELS, SHAPE, our_logits, our_model, saved, tensors_of
from rich.console import Console

from megascratch.checkpoint import convert
from megascratch.infer import Sampling
from megascratch.infer.decoding import generate

N_GENERATED = 12
# What another family would write as well: without a window, Mistral's and Phi-3's models are Llama's.
SHARED = {"mistral, no window": "mistral", "phi3": "phi3", "phi3, long": "phi3", "phi3, short": "phi3"}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, console: Console, name: str) -> None:
    theirs = saved(tmp_path / "theirs", *MODELS[name])
    ours = convert(tmp_path / "theirs", tmp_path / "ours", tp=2, pp=3, console=console)
    back = convert(ours, tmp_path / "back", to="hf", family=SHARED.get(name), console=console)

    before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        reread = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
        assert type(reread) is type(theirs)
        assert torch.equal(reread(tokens).logits, expected)
        torch.testing.assert_close(our_logits(ours, tokens), expected, rtol=0, atol=1e-5 * expected.std().item())

        prompts = tokens[:, :9]
        options = {"do_sample": False, "max_new_tokens": N_GENERATED, "eos_token_id": None}
        continued = reread.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    got = list(generate(our_model(ours), prompts, Sampling(temperature=0.0), max_tokens=N_GENERATED))
    assert torch.equal(torch.stack(got, dim=1), continued[:, prompts.shape[1] :])
