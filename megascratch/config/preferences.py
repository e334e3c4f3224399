"""Sections of learning from conversations and preferences: how they become samples, adapters, rewards, losses."""

from typing import Annotated, Literal

from pydantic import Field

from megascratch.config.section import Count, Positive, Section


class ChatConfig(Section):
    """How conversations become samples; `data.paths` then name JSON Lines or Parquet files."""

    template: str | None = None  # chatml, llama3, plain, a file of Jinja, or a folder; the tokenizer's when left out
    packing: bool = True  # several conversations a sample, blind to each other
    truncation: Literal["keep_start", "keep_end", "drop", "error"] = "keep_start"
    strict: bool = False  # end before training if any record is unusable; else they are reported and left out


class LoraConfig(Section):
    """Low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Count = 16
    alpha: Positive = 32.0  # the adapters' output is scaled by alpha / rank
    base: Literal["full", "nf4"] = "full"  # nf4: weights of linear layers in 4 bits (QLoRA, arXiv:2305.14314)
    targets: list[str] = ["attn.qkv", "attn.proj", "mlp.gate_up", "mlp.up", "mlp.down"]  # module names within a layer


class RewardConfig(Section):
    """Reward model: a score for each answer, higher for the chosen one (Bradley–Terry)."""

    center_coeff: Annotated[float, Field(ge=0)] = 0.0  # of (chosen + rejected)², which keeps scores around 0


class DpoConfig(Section):
    """Direct preference optimisation and its family; `align.preference_losses` has the formulas."""

    loss: Literal[
        "sigmoid",
        "cdpo",
        "robust",
        "ipo",
        "hinge",
        "exo",
        "nca",
        "bco",
        "sppo",
        "apo_zero",
        "apo_down",
        "discopop",
        "simpo",
        "orpo",
        "kto",
        "apo_zero_unpaired",
    ] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # share of labels taken to be wrong
    # Log-probabilities a token instead of sums, as TRL's ipo has it and OpenRLHF's has not; simpo and orpo need it.
    length_average: bool = False
    simpo_margin: Annotated[float, Field(ge=0)] = 0.5
    sft_coeff: Annotated[float, Field(ge=0)] = 0.0  # of the chosen answers' cross-entropy, added (RPO)
    # Whose mean that and ORPO's is: of answers, of all tokens of answers, or of prompts too (TRL's ORPO).
    cross_entropy: Literal["answer", "token", "text"] = "answer"
    desirable_weight: Positive = 1.0  # kto
    undesirable_weight: Positive = 1.0  # kto
    # precomputed: once, into the run directory; live: by a second model; base: this model without its adapters.
    reference: Literal["precomputed", "live", "base"] = "precomputed"
