"""Families of models in Hugging Face's format. A new one is a table of steps and a `Family`, in a file of its kind."""

from megascratch.checkpoint.families.deepseek import DEEPSEEK_FAMILIES
from megascratch.checkpoint.families.experts import EXPERT_FAMILIES
from megascratch.checkpoint.families.family import Family
from megascratch.checkpoint.families.gemma import GEMMA_FAMILIES
from megascratch.checkpoint.families.gpt2 import GPT2_FAMILIES
from megascratch.checkpoint.families.llama import LLAMA_FAMILIES
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

__all__ = ["FAMILIES", "Family", "family_for"]

# By the names that `config.json` has for them. Of several that express a model, the first is written.
FAMILIES = {
    family.model_type: family
    for family in (*LLAMA_FAMILIES, *GEMMA_FAMILIES, *GPT2_FAMILIES, *EXPERT_FAMILIES, *DEEPSEEK_FAMILIES)
}


def family_for(model: ModelConfig, name: str | None = None) -> Family:
    """Return the family whose models are of this shape.

    Args:
        model: resolved shape.
        name: the family that the user wants, where several would do.

    Raises: CheckpointError: with everything about the model that the wanted family, or the nearest one, does not
        express.
    """
    if name is not None and name not in FAMILIES:
        raise CheckpointError(Problem(f"family = {name}", f"must be one of {', '.join(FAMILIES)}"))
    problems = {key: FAMILIES[key].problems(model) for key in ([name] if name else FAMILIES)}
    nearest = min(problems, key=lambda key: len(problems[key]))
    if problems[nearest]:
        raise CheckpointError(problems[nearest], f"the export to Hugging Face's format as {nearest}")
    return FAMILIES[nearest]
