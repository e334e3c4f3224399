"""The same tiny model twice: a stage of ours and a Llama of `transformers`, equal in weights and in gradients."""

from typing import Any

import torch
from logical import fill
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from megascratch.align.examples import Example, TokenSequence
from megascratch.checkpoint.families import FAMILIES
from megascratch.checkpoint.steps import rename
from megascratch.config import Config, ModelConfig, resolve
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine import Outputs
from megascratch.nn import Placement, SequenceInfo, Stage

VOCAB_SIZE, N_LAYERS = 61, 2


def make_stage(head: str = "vocabulary") -> Stage:
    """Return a whole model in float32, with random weights."""
    shape: dict[str, Any] = {"n_layers": N_LAYERS, "hidden": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden": 48}
    model = resolve(Config(model=ModelConfig(**shape, vocab_size=VOCAB_SIZE, max_seq_length=64, head=head))).model
    mesh = Mesh.serial()
    stage = Stage(model, Placement(mesh.tp, False, torch.float32, mesh.device))
    fill(stage, mesh)
    return stage


def outputs_of(stage: Stage, batch: Microbatch) -> Outputs:
    """Run a whole model on rows of several documents."""
    info = SequenceInfo(batch.tokens.shape[1], positions=batch.position_ids, documents=batch.documents)
    hidden = stage.hidden(None, batch.tokens, info)
    at = stage.placement
    return Outputs(hidden, stage.head_weight, VOCAB_SIZE, at.tp, at.cp, False)


def _as_theirs(stage: Stage, gradients: bool) -> dict[str, torch.Tensor]:
    ours = {name: param.grad if gradients else param.detach() for name, param in stage.named_parameters()}
    theirs = {}
    for step in (*FAMILIES["llama"].steps, rename("score.weight", "score.weight")):
        for layer in range(N_LAYERS if "{i}" in step.ours else 1):
            at = step.at(layer)
            if (tensor := ours.get(at.ours)) is not None:
                tensor = tensor[:VOCAB_SIZE] if at.ours in ("embed.weight", "head.weight") else tensor
                theirs |= dict(zip(at.theirs, at.split(tensor, stage.model)))
    return theirs


def twin_of(stage: Stage) -> PreTrainedModel:
    """Return their model with the stage's weights."""
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=0,
        num_labels=1,
    )
    make = LlamaForCausalLM if stage.model.head == "vocabulary" else LlamaForSequenceClassification
    theirs = make(config)
    theirs.load_state_dict({name: tensor.clone() for name, tensor in _as_theirs(stage, gradients=False).items()})
    return theirs.train()


def assert_same_gradients(stage: Stage, theirs: PreTrainedModel) -> None:
    """Compare every weight's gradient, to 1e-5 of the largest."""
    expected = {name: param.grad for name, param in theirs.named_parameters()}
    actual = _as_theirs(stage, gradients=True)
    assert actual.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    assert largest > 1e-6
    for name, grad in expected.items():
        torch.testing.assert_close(
            actual[name], grad, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def random_examples(n: int, n_sequences: int, values: dict[str, list[float]] | None = None) -> list[Example]:
    """Return examples whose sequences share a prompt, of unequal lengths."""
    random = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (), generator=random))
        return torch.randint(1, VOCAB_SIZE, (length,), generator=random, dtype=torch.int32)

    examples = []
    for i in range(n):
        prompt = ids(2, 6)
        sequences = []
        for _ in range(n_sequences):
            answer = ids(2, 8)
            learned = torch.cat((torch.zeros(len(prompt)), torch.ones(len(answer)))) > 0
            sequences.append(TokenSequence(torch.cat((prompt, answer)).numpy(), learned.numpy()))
        own = {name: value[i] for name, value in (values or {}).items()}
        examples.append(Example(f"example {i}", tuple(sequences), own))
    return examples


def padded(sequences: list[TokenSequence]) -> dict[str, torch.Tensor]:
    """Return sequences as TRL's collators give them, padded on the right."""

    def pad(rows: list[Any]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row).long() for row in rows], batch_first=True)

    return {
        "input_ids": pad([sequence.ids for sequence in sequences]),
        "attention_mask": pad([torch.ones(len(sequence.ids)) for sequence in sequences]),
        "completion_mask": pad([sequence.learned for sequence in sequences]),
    }
