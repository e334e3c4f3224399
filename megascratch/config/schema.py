"""What a recipe may say: typed, frozen sections.

One class a section, one line a key. A key's rule that concerns itself alone stands here as a type; a rule between keys
or sections stands in `check.py`. Nothing here imports torch: a recipe is checked before anything heavy is loaded.

Units are in the names: `_steps`, `_tokens`, `_bytes`, `_s`. `None` means "follows from the rest", and `resolve` in
`load.py` puts the value in.
"""

from typing import Annotated, Literal

from pydantic import Field

from megascratch.config.preferences import ChatConfig, DpoConfig, LoraConfig, RewardConfig
from megascratch.config.rollouts import GrpoConfig, PpoConfig, RolloutConfig
from megascratch.config.section import Count, Fraction, Positive, Section, Whole

ScheduleName = Literal[
    "gpipe",
    "1f1b",
    "interleaved",
    "zb-h1",
    "zb-h2",
    "zb-v",
    "v-half",
    "v-min",
    "dualpipe-v",
    "dualpipe",
]
RecomputeModule = Literal["core_attn", "layernorm", "mlp_act", "mla_up_proj"]
DType = Literal["fp64", "fp32", "bf16", "fp16", "fp8"]  # fp8: bf16 whose linear layers multiply in 8 bits
# How they scale; all but the first through transformer-engine.
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` divides the low ones
    and blends between `low_freq_factor` and `high_freq_factor` (Llama 3.1); `yarn` ramps between `beta_slow` and
    `beta_fast` rotations and scales attention (Peng et al. 2023, arXiv:2309.00071); `longrope` divides each by a factor
    of its own, of the long ones where `max_seq_length` exceeds `original_seq_length`, and scales attention (Ding et al.
    2024, arXiv:2402.13753).
    """

    type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: Annotated[float, Field(ge=1)]
    original_seq_length: Count = 8192
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    short_factor: tuple[Positive, ...] = ()  # one for each pair of dimensions, as searched for the model
    long_factor: tuple[Positive, ...] = ()


class MLAConfig(Section):
    """Multi-head latent attention, in Megatron's words: queries, keys and values are made from short latent vectors."""

    q_lora_rank: Count | None = None  # size of the queries' latent vector; queries come from x itself when left out
    kv_lora_rank: Count
    qk_head_dim: Count  # of a head's part without positions
    qk_pos_emb_head_dim: Count  # of its part with rotary positions, which the heads' keys share
    v_head_dim: Count


class MoEConfig(Section):
    """Mixture of experts: the feed-forward layer of some layers is many small ones, of which a token uses a few.

    The words are Megatron's, without their `moe_`. Which layers have experts: from `first_k_dense` on, every
    `layer_freq`-th.
    """

    num_experts: Annotated[int, Field(ge=2)]
    router_topk: Count = 2
    ffn_hidden: Count  # of one expert
    first_k_dense: Whole = 0
    layer_freq: Count = 1
    router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    router_norm_topk: bool = True  # whether the chosen experts' scores are divided by their sum
    router_topk_scaling_factor: Positive = 1.0
    router_num_groups: Count | None = None  # of experts; a token chooses experts in router_group_topk of them alone
    router_group_topk: Count | None = None
    # Balance. aux_loss: E · Σ fᵢ Pᵢ over a micro-batch (Switch, GShard); seq_aux_loss: over each sequence, so that no
    # layout changes it. expert_bias: added to scores when choosing, moved by router_bias_update_rate a step.
    router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    aux_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    z_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    router_enable_expert_bias: bool = False
    router_bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3
    # Each sequence may send this much more than an even share to an expert; the tokens beyond skip it. None: no limit.
    expert_capacity_factor: Positive | None = None
    shared_expert_ffn_hidden: Count | None = None  # of the experts that every token uses, together
    shared_expert_gate: bool = False


class ModelConfig(Section):
    """Shape of the decoder. `preset` gives the defaults of every key that is left out."""

    preset: str | None = None
    n_layers: Count
    hidden: Count
    n_heads: Count
    n_kv_heads: Count | None = None  # groups of query heads that share a key and value head; n_heads when left out
    head_dim: Count | None = None  # hidden / n_heads when left out
    ffn_hidden: Count
    vocab_size: Count | None = None  # the tokenizer's when left out
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Positive = 1e-5
    norm_position: Literal["pre", "post", "both"] = "pre"  # of a branch: on its input, its output (OLMo-2), or both
    norm_zero_centered: bool = False  # norms multiply by 1 + weight (Gemma)
    # The *_tanh ones approximate GELU as GPT-2 and Gemma do.
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    position: Literal["rope", "learned", "none"] = "rope"
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: Positive | None = None  # of layers with a window, which are not scaled either; rope_theta if None
    max_seq_length: Count = 8192  # rows of a learned position table; the length that a rotary model is meant for
    tie_embeddings: bool = False
    scale_embeddings: bool = False  # by √hidden (Gemma)
    qk_norm: bool = False
    qk_norm_across_heads: bool = False  # one norm over all heads of a token, instead of one over each (OLMo-2)
    query_pre_attn_scalar: Positive | None = None  # scores are divided by its root; head_dim when left out
    attn_softcap: Positive | None = None  # bounds scores s to c · tanh(s / c) (Gemma 2)
    logit_softcap: Positive | None = None  # the same of logits
    sliding_window: Count | None = None  # how many tokens a token sees, itself included; all before it when left out
    window_attn_skip_freq: Count | None = None  # every n-th layer sees all in spite of the window; None: no layer
    bias: bool = False  # on every linear layer but the head
    qkv_bias: bool = False  # on the QKV projection alone (Qwen 2)
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    mtp_num_layers: Whole = 0  # modules that predict further tokens ahead, in training
    mtp_loss_scaling_factor: Positive = 0.1  # of the mean of their losses
    head: Literal["vocabulary", "scalar"] = "vocabulary"  # scalar: one number a token, for rewards and values
    dropout: Fraction = 0.0
    init_std: Positive = 0.02

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated; resolved models only."""
        assert self.head_dim is not None
        return self.head_dim if self.mla is None else self.mla.qk_pos_emb_head_dim

    @property
    def attended_dims(self) -> int:
        """Multiply-adds of a head for each query and key: as many as numbers of the key and of the value."""
        assert self.head_dim is not None
        return self.head_dim + (self.head_dim if self.mla is None else self.mla.v_head_dim)

    @property
    def embeds_at_end(self) -> bool:
        """Whether the last stage needs the embedding, too: as its head, or for tokens ahead."""
        return (self.tie_embeddings and self.head == "vocabulary") or self.mtp_num_layers > 0

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a token sees in a layer, itself included, or None where it sees all before it."""
        every = self.window_attn_skip_freq
        return None if every is not None and (layer + 1) % every == 0 else self.sliding_window

    def seen_keys(self, seq_length: int, causal: bool = True) -> float:
        """Return how many keys a query meets in the mean over queries and layers; not causal: as if later ones, too."""
        share = 0.5 if causal else 1.0
        windows = [min(self.window_of(i) or seq_length, seq_length) for i in range(self.n_layers)]
        # The first w queries of a window of w see as a causal model of w tokens does.
        return sum(w - (1 - share) * w * w / seq_length for w in windows) / self.n_layers

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer's feed-forward half is a mixture of experts."""
        moe = self.moe
        return moe is not None and layer >= moe.first_k_dense and (layer - moe.first_k_dense) % moe.layer_freq == 0


class ParallelConfig(Section):
    """The layout: how many ranks along each mesh axis, and how each stage is driven."""

    tp: Count = 1
    pp: Count = 1
    cp: Count = 1
    dp: Count | None = None  # world size / (tp · pp · cp) when left out
    ep: Count = 1  # ranks of dp that experts are divided over
    cp_algorithm: Literal["ring", "ulysses", "all_gather"] = "ring"
    vp: Count = 1  # stages a pipeline rank
    schedule: ScheduleName | None = None  # 1f1b, or interleaved when vp > 1
    schedule_file: str | None = None  # text instead of a name: one line a rank, 0F0 1F0 …
    max_in_flight: Count | None = None  # most activations a rank may hold, in stages × micro-batches; checked
    layers_per_stage: list[Whole] | Literal["balanced"] | None = None  # even when left out; balanced weighs the head
    sequence_parallel: bool | None = None  # on when tp > 1; without effect on tp = 1
    # Its collectives go part by part, beside the products: for GPUs of a node. Sums have another order.
    tp_comm_overlap: bool = False
    zero: Literal[0, 1, 2, 3] = 0  # what dp × cp divides: 1 optimizer state, 2 gradients too, 3 weights too
    zero_ranks: Count | None = None  # consecutive ranks that divide it, as those of a node (HSDP); all when left out
    fp8_param_gather: bool = False  # under zero, weights that multiply in fp8 travel as such; losses are the same bits
    # Gradients of consecutive micro-batches are added in one tree: dp = 1, 2, 4, 8 … give the same bits.
    deterministic_dp: bool = False
    # What is computed again in backward instead of kept. selective: the modules below; full: every layer; block: the
    # first recompute_layers of each stage; auto: as little as fits memory_budget_gib. Gradients are the same bits.
    recompute: Literal["none", "selective", "full", "block", "auto"] = "none"
    recompute_modules: list[RecomputeModule] | None = None  # chosen by bytes saved per operation when left out
    recompute_layers: Count | None = None
    offload_activations: bool = False  # keep in host memory what is kept
    offload_optimizer: bool = False  # keep master weights and moments in host memory, where the processor updates them
    offload_parameters: bool = False  # keep in host memory the weights that zero = 3 divides, and update them there
    memory_budget_gib: Positive | None = None  # of each rank's device, for auto


class DataConfig(Section):
    """Which indexed datasets to read, and how samples are cut from them."""

    paths: list[str] = []
    weights: list[Positive] | None = None
    split: Annotated[str, Field(strict=False, coerce_numbers_to_str=True)] = "969,30,1"  # "1" may look like a number
    seq_length: Count = 1024
    tokenizer: str | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False  # no attention across documents; needs reset_position_ids, which marks them
    cache_dir: str | None = None  # beside the data when left out


class TrainConfig(Section):
    """How long, how much at once, and in which precision."""

    steps: Count = 1000
    stop_step: Count | None = None  # save and end after this step, to go on later; schedules still aim at `steps`
    global_batch: Count = 8
    rampup_batch_size: tuple[Count, Count, Count] | None = None  # start, increment, samples: see `batch_at`
    micro_batch: Count = 1
    dtype: DType = "bf16"
    fp8_recipe: Fp8Recipe = "tensorwise"
    fp8_weight_cache: bool = True  # keep quantised weights over a step's micro-batches; else quantise at every use
    seed: Whole = 1234
    attention: Literal["auto", "softmax", "sdpa", "blocked"] = "auto"  # auto: blocked on a CPU, sdpa on CUDA
    compile: bool = False  # torch.compile of the layers around the fused operators; the first step takes seconds more
    cuda_graph: bool = False  # replay whole steps as one CUDA graph; GPUs only
    timeout_s: Count = 600  # a collective that waits longer ends the run
    debug_collectives: bool = False  # before each, its ranks compare where they are; slow, and names who is astray

    def batch_at(self, consumed_samples: int) -> int:
        """Return how many samples the step has that follows `consumed_samples`.

        With a ramp-up the batch grows from `start` to `global_batch` by `increment` at a time, at equal distances over
        the first `samples`. By hand, [2, 2, 12] to 6: 2 2 2 (6 samples seen) 4 4 (14 seen) 6 6 …
        """
        if self.rampup_batch_size is None:
            return self.global_batch
        start, increment, samples = self.rampup_batch_size
        n_increments = (self.global_batch - start) // increment
        return min(self.global_batch, start + increment * (consumed_samples * n_increments // samples))

    def samples_of(self, n_steps: int) -> int:
        """Return how many samples the first steps of a run have together."""
        consumed = 0
        for done in range(n_steps):
            if self.batch_at(consumed) == self.global_batch:
                return consumed + (n_steps - done) * self.global_batch
            consumed += self.batch_at(consumed)
        return consumed


class ParamGroup(Section):
    """Parameters that move in their own way, by patterns over their names (`layers.[0-3].*`)."""

    params: list[str]
    lr_scale: Annotated[float, Field(ge=0)] = 1.0  # times the learning rate
    weight_decay: Annotated[float, Field(ge=0)] | None = None  # optim.weight_decay, or none for vectors, when left out


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: on the matrices of linear layers; AdamW on all the rest
    lr: Positive = 3e-4
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    warmup_steps: Whole = 0
    decay_steps: Count | None = (
        None  # step where min_lr is reached (train.steps when left out); wsd: length of the decay
    )
    # bf16: keep float32 weights beside the model's. Without them updates below 1/256 of a weight are lost.
    master_weights: bool = True
    # bf16: of the float32 weights keep only what rounding took away, 16 bits beside the model's own. Checkpoints have
    # whole float32 weights with either.
    master_remainders: bool = False
    # What sums of gradients and AdamW's averages are kept in. Left out: as precise as the weights that are updated.
    main_grads_dtype: Literal["fp32", "bf16"] | None = None
    exp_avg_dtype: Literal["fp32", "bf16"] | None = None
    exp_avg_sq_dtype: Literal["fp32", "bf16"] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    muon_lr: Positive | None = None  # of matrices, where lr is that of the rest; lr when left out
    muon_momentum: Fraction = 0.95
    # How an orthogonal update grows with the matrix [rows, columns]: Keller Jordan's √max(1, rows/columns), or
    # Moonshot's 0.2 · √max(rows, columns), whose root mean square is that of AdamW, so that its lr and decay serve.
    muon_scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    groups: list[ParamGroup] = []  # the first that fits a parameter counts
    frozen: list[str] = []  # patterns over names of parameters that keep their values
    clip: Annotated[float, Field(ge=0)] = 1.0  # largest global gradient norm; 0 switches clipping off
    loss_scale: Positive = 65536.0  # fp16 only: where dynamic loss scaling starts
    loss_scale_window: Count = 1000  # fp16 only: good steps before the scale doubles
    bucket_numel: Count = 40_000_000  # largest gradient bucket, in elements


class CheckpointConfig(Section):
    """Where checkpoints go, where one is resumed from, and how many are kept."""

    dir: str | None = None  # <log.dir>/checkpoints when left out; a URL that fsspec opens serves too
    load: str | None = None  # a checkpoint, or a directory with `latest`; the run's own newest when left out
    init: str | None = None  # one whose weights a new run begins with, at step 0
    # Steps, or "30 min"; 0 saves at the end and on a signal only.
    every: Whole | Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?min$")] = 0
    keep: Whole = 0  # newest n; 0 keeps all
    keep_every: Whole = 0  # checkpoints of steps that it divides stay too
    # Write over the files of a checkpoint that `keep` no longer wants: twice as fast on a RAM disk. It takes the space
    # of one checkpoint more, and whoever still has the old files open sees them change.
    recycle: bool = False
    asynchronous: bool = False  # write from a copy, while training goes on
    on_failure: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written
    # After SIGTERM or SIGUSR1, the time to finish the step, save and end. Our launcher waits as long before it kills.
    deadline_s: Count = 300
    local_every: Whole = 0  # steps; each rank copies its own state into local_dir, for a quick restart
    local_dir: str | None = None  # on the node: /dev/shm/…, or a local disk
    local_replicate: bool = False  # send each copy to the next node too, for when a node is lost

    @property
    def every_steps(self) -> int:
        """How many steps lie between two checkpoints; 0 where time or nothing decides."""
        return self.every if isinstance(self.every, int) else 0

    @property
    def every_s(self) -> float | None:
        """How many seconds lie between two checkpoints, where time decides."""
        return float(self.every.removesuffix("min")) * 60 if isinstance(self.every, str) else None


class FaultsConfig(Section):
    """What a run does about steps that would harm it, and about ranks that differ or lag."""

    max_skipped: Count = 50  # steps in a row, not finite or spiking, before the run saves and ends; fp16 needs 16
    spike_factor: Annotated[float, Field(gt=1)] | None = None  # times the median loss: a step above it is skipped
    spike_window: Count = 64  # losses that the median is of
    replicas_every: Whole = 0  # steps; ranks compare, bit for bit, what they should hold alike
    stragglers_every: Whole = 0  # steps; ranks compare how long they compute
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5  # times the others' median: a rank above it is named


class LogConfig(Section):
    """The run directory and how often a line is written to the console."""

    dir: str = "runs/default"
    every: Count = 1
    tensorboard: bool = True
    profile: list[Count] = []  # steps that torch's profiler traces, into profile/ (open with Perfetto)
    peak_tflops: Positive | None = None  # of one device, for utilisation; a known GPU's 16-bit peak when left out
    pipeline_step: Whole = 0  # step whose pipeline is timed, action by action, into pipeline_step_<n>.json; 0 for none


class EvalConfig(Section):
    """Validation during training."""

    every: Whole = 0  # steps; 0 evaluates at the end only
    batches: Count = 8  # global batches a validation pass


class Config(Section):
    """A whole recipe."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    rollout: RolloutConfig | None = None  # of ppo and grpo
    ppo: PpoConfig = PpoConfig()
    grpo: GrpoConfig = GrpoConfig()
    chat: ChatConfig | None = None  # of every way of training on conversations
    lora: LoraConfig | None = None
    reward: RewardConfig | None = None
    dpo: DpoConfig | None = None
