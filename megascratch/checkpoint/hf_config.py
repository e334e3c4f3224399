"""`config.json` of Hugging Face's format: written from our `[model]` section, and read into one."""

from collections.abc import Mapping
from typing import Any

from megascratch.checkpoint.families import FAMILIES, Family
from megascratch.checkpoint.families.rope import write_rope
from megascratch.checkpoint.source import check_sizes
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem


def write_config(model: ModelConfig, family: Family, dtype: str, eos_id: Any) -> dict[str, Any]:
    """Return `config.json`. Rotary settings are written as transformers 5 reads them and as earlier ones did."""
    rope = write_rope(model)
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": family.activations[model.activation],
        "max_position_embeddings": model.max_seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
    }
    positions = {
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
    }
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{family.names.get(key, key): value for key, value in common.items()},
        **(positions if model.position == "rope" else {}),
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **family.write(model),
    }


def read_config(config: Mapping[str, Any], n_tensors: int) -> tuple[Family, dict[str, Any]]:
    """Return the family of a `config.json` and our `[model]` section, not yet typed or checked.

    Args:
        config: `config.json`.
        n_tensors: that the folder holds; no more layers and experts are believed before anything loops over them.

    Raises: CheckpointError: with everything that this model does and ours cannot.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        rule = f"is not a family that can be read: {', '.join(FAMILIES)}"
        raise CheckpointError(Problem(f"model_type = {config.get('model_type')}", rule, "convert another model"))
    try:
        return family, _section(family, {**family.defaults, **config}, n_tensors)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        # Every family reads keys of its own, and a file may say anything.
        rule = f"has a value of the wrong kind: {type(error).__name__}: {error}"[:200]
        raise CheckpointError(Problem("config.json", rule, "correct it, or download it again")) from None


def _section(family: Family, config: Mapping[str, Any], n_tensors: int) -> dict[str, Any]:
    """Return our `[model]` section; arguments and errors as for `read_config`, but for values of wrong kinds."""

    def theirs(key: str) -> str:
        return family.names.get(key, key)

    activations = {their: our for our, their in family.activations.items()}
    act = config.get(theirs("hidden_act"), next(iter(activations)))
    rules: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        (theirs("hidden_act"), act, tuple(activations)),
        ("quantization_config", config.get("quantization_config"), (None,)),
        ("pretraining_tp", config.get("pretraining_tp", 1), (None, 1)),
    )
    if problems := [
        Problem(f"{key} = {value}", f"must be {' or '.join(str(a) for a in allowed)}", "convert another model")
        for key, value, allowed in rules
        if value not in allowed
    ]:
        raise CheckpointError(problems)
    numbers = {
        "n_layers": theirs("num_hidden_layers"),
        "hidden": theirs("hidden_size"),
        "n_heads": theirs("num_attention_heads"),
        "vocab_size": "vocab_size",
        "max_seq_length": theirs("max_position_embeddings"),
        "norm_eps": theirs("rms_norm_eps"),
        "ffn_hidden": theirs("intermediate_size"),
    }
    wrong = [key for key in numbers.values() if not isinstance(config.get(key), int | float)]
    if wrong := [key for key in wrong if config.get(key) is not None or key not in family.defaults]:
        raise CheckpointError([Problem(key, "must be given, as a number", "correct config.json") for key in wrong])
    if config[numbers["n_layers"]] > n_tensors:
        value, rule = f"{numbers['n_layers']} = {config[numbers['n_layers']]}", f"is more than a folder of {n_tensors}"
        raise CheckpointError(Problem(value, f"{rule} tensors can have", "download it again"))
    model = {ours: config[key] for ours, key in numbers.items()}
    model |= {
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "activation": activations[act],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
        **{key: value for key, value in family.features.items() if value is not ...},
    }
    positions = family.rope(config) if model.get("position", "rope") == "rope" else {}
    section = model | positions | family.read(config)
    n_experts = (section.get("moe") or {}).get("num_experts", 0)
    if n_experts > n_tensors:
        rule = f"is more than a folder of {n_tensors} tensors can have"
        raise CheckpointError(Problem(f"num_experts = {n_experts}", rule, "download it again"))
    check_sizes(section)
    return section
