"""Text in, text out: what the command line calls."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megascratch.dist.launch import Environment
from megascratch.dist.mesh import Mesh
from megascratch.errors import Problem, TokenizerError
from megascratch.infer.decoding import check_prompts, generate
from megascratch.infer.load import load_model, open_tokenizer, read_config
from megascratch.infer.sampling import Sampling
from megascratch.nn import Stage
from megascratch.tokenizer import StreamDecoder, Tokenizer


def generate_text(
    checkpoint: Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    mesh: Mesh | None = None,
    tokenizer: Path | None = None,
) -> Iterator[str]:
    """Complete a prompt with the model of a checkpoint.

    Args:
        checkpoint: a checkpoint, or a directory with `latest`.
        prompt: text to complete; of an empty one, the model begins a document.
        max_tokens: to generate at most.
        temperature, top_k, top_p, seed: see `Sampling`.
        mesh: of tp ranks, all of which make this call; this process alone when left out.
        tokenizer: the checkpoint's own when left out.

    Returns: the pieces of the completion as they come, the same on every rank; joined they are the text, without the
        prompt. It ends with the document, after `max_tokens`, or at the end of the model's context.

    Raises: UserError: before anything is generated, if the request, the checkpoint or the tokenizer is wrong.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    mesh = mesh or Mesh.serial(Environment(rank=0, world_size=1, local_rank=0, local_world_size=1).device)
    config = read_config(checkpoint, mesh.spec.tp)
    opened = open_tokenizer(checkpoint, config, tokenizer)
    check_prompts(list(_prompt_ids(opened, prompt)), config.model, max_tokens)  # before the weights are read
    stage, _ = load_model(checkpoint, mesh)
    return stream_text(stage, opened, prompt, sampling, max_tokens)


def stream_text(stage: Stage, tokenizer: Tokenizer, prompt: str, sampling: Sampling, max_tokens: int) -> Iterator[str]:
    """Complete a prompt with a loaded model; arguments and pieces as for `generate_text`."""
    tokens = generate(
        stage,
        _prompt_ids(tokenizer, prompt),
        sampling,
        max_tokens=max_tokens,
        stop_id=tokenizer.eod_id,
        n_ids=tokenizer.vocab_size,  # the model may have more rows than the tokenizer can spell
    )
    return _pieces(tokenizer, (int(token) for token in tokens))


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """Encode a prompt as one row, [1, s] int64."""
    ids = tokenizer.encode(prompt)
    if not ids:
        if tokenizer.eod_id is None:
            rule = "needs a tokenizer with an end-of-document token to begin from"
            raise TokenizerError(Problem("an empty prompt", rule, "give a prompt"))
        ids = [tokenizer.eod_id]  # documents follow each other in training, so this is what begins one
    return torch.tensor([ids])


def _pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    for id in ids:
        if id == tokenizer.eod_id:
            break
        if piece := decoder.feed(id):
            yield piece
    if rest := decoder.finish():
        yield rest
