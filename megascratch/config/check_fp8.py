"""Rules of fp8: which sides its products have, and what its recipe goes with."""

from collections.abc import Iterator

from megascratch.config.schema import Config
from megascratch.errors import Problem

# Of every product's sides, by `train.fp8_recipe`: how many numbers are multiplied at a time, or share a scale.
_SIDES = {"tensorwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}
_REMEDY = "change it, or use another recipe or bf16"


def fp8(config: Config, _: int | None) -> Iterator[Problem]:
    """Tensor cores take fp8 products of 16 numbers at a time, along every side; scales may be of more."""
    if config.train.dtype != "fp8":
        return
    model, parallel, recipe = config.model, config.parallel, config.train.fp8_recipe
    side = _SIDES[recipe]
    head_dim = model.head_dim or model.hidden // model.n_heads
    heads = (model.n_heads, model.n_heads + 2 * (model.n_kv_heads or model.n_heads))
    tokens = config.train.micro_batch * config.data.seq_length
    sizes: dict[str, float] = {
        f"model.hidden = {model.hidden}": model.hidden,
        f"model.ffn_hidden / tp = {model.ffn_hidden / parallel.tp:g}": model.ffn_hidden / parallel.tp,
        **{f"{n} heads × head_dim {head_dim} / tp {parallel.tp}": n * head_dim / parallel.tp for n in heads},
        f"micro_batch × seq_length / cp = {tokens / parallel.cp:g} tokens": tokens / parallel.cp,
    }
    if (mla := model.mla) is not None:
        per_head = (mla.qk_head_dim + mla.qk_pos_emb_head_dim, mla.qk_head_dim + mla.v_head_dim, mla.v_head_dim)
        sizes = {name: size for name, size in sizes.items() if "head_dim" not in name}
        sizes |= {f"{model.n_heads} heads × {d} / tp {parallel.tp}": model.n_heads * d / parallel.tp for d in per_head}
        sizes |= {
            f"model.mla.{key} = {getattr(mla, key)}": getattr(mla, key) or side
            for key in ("q_lora_rank", "kv_lora_rank")
        }
    if model.moe is not None and (f := model.moe.shared_expert_ffn_hidden) is not None:
        sizes[f"model.moe.shared_expert_ffn_hidden / tp = {f / parallel.tp:g}"] = f / parallel.tp
    if config.lora is not None:
        sizes[f"lora.rank = {config.lora.rank}"] = config.lora.rank
    for name, size in sizes.items():
        if size % side:
            yield Problem(name, f"must divide by {side} for train.dtype = fp8 and {recipe} scales", _REMEDY)


def fp8_recipe(config: Config, _: int | None) -> Iterator[Problem]:
    """Keys of fp8 say something of it, and nothing else."""
    train = config.train
    given = {
        f"train.fp8_recipe = {train.fp8_recipe}": (train.fp8_recipe != "tensorwise", "says how"),
        "train.fp8_weight_cache = false": (not train.fp8_weight_cache, "says how often"),
    }
    for key, (is_given, says) in given.items():
        if is_given and train.dtype != "fp8":
            rule = f"{says} train.dtype = fp8 scales; it is {train.dtype}"
            yield Problem(key, rule, "set train.dtype = fp8, or leave it out")


def fp8_param_gather(config: Config, _: int | None) -> Iterator[Problem]:
    """What travels in fp8 must be what is multiplied, by a scale that ranks can agree on before they have all of it."""
    if not config.parallel.fp8_param_gather:
        return
    key, train = "parallel.fp8_param_gather = true", config.train
    if train.dtype != "fp8":
        yield Problem(key, f"needs train.dtype = fp8; it is {train.dtype}", "set train.dtype, or leave it out")
    elif train.fp8_recipe != "tensorwise":
        rule = f"needs tensorwise scales; train.fp8_recipe = {train.fp8_recipe}"
        yield Problem(key, rule, "use tensorwise, or leave it out")
    if config.parallel.zero == 0:
        yield Problem(
            key, "needs parallel.zero > 0: without it no weight travels", "set parallel.zero, or leave it out"
        )
