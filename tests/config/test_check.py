"""Every rule between keys and sections: its message with value, rule and remedy, and the case beside it that holds."""

import pytest

from megascratch.config import check as check_module
from megascratch.config import load_config
from megascratch.errors import ConfigError

# 4 layers, hidden 256, 8 heads, 4 kv heads, ffn_hidden 704.
TINY = "model.preset=tiny"
MLA = "model.mla={kv_lora_rank=8,qk_head_dim=8,qk_pos_emb_head_dim=4,v_head_dim=8} model.n_kv_heads=8"
MOE = "model.moe={num_experts=8,ffn_hidden=16}"
ROLLOUT = "rollout.prompts=4 rollout.samples=2 rollout.scores=[{kind='number'}]"


@pytest.mark.parametrize(
    ("rule", "overrides", "world_size", "message"),
    [
        (
            "_heads",
            "model.hidden=250",
            None,
            r"model\.hidden = 250 +must divide by model\.n_heads = 8 unless model\.head_dim is given"
            r" +use 248 or 256, or set model\.head_dim",
        ),
        ("_heads", "model.n_kv_heads=3", None, r"n_kv_heads = 3 +must divide model\.n_heads = 8 +use 1, 2, 4 or 8"),
        ("_heads", "model.head_dim=33", None, r"model\.head_dim = 33 +must be even for rotary positions +use 34"),
        (
            "_heads",
            "model.rope_scaling.type=linear model.rope_scaling.factor=2 model.position=learned",
            None,
            r"rope_scaling\.type = linear +needs model\.position = rope, not learned +remove \[model\.rope_scaling\]",
        ),
        (
            "_heads",
            "model.rope_scaling.type=linear model.rope_scaling.factor=2 model.rope_scaling.long_factor=[1.0]",
            None,
            r"rope_scaling\.long_factor = 1 numbers +must be 0 with type = linear",
        ),
        (
            "model_features",
            "model.qk_norm_across_heads=true",
            None,
            r"qk_norm_across_heads = true +needs model\.qk_norm = true +set it, or leave qk_norm_across_heads out",
        ),
        (
            "model_features",
            "model.window_attn_skip_freq=2",
            None,
            r"skip_freq = 2 +needs model\.sliding_window +set it",
        ),
        ("model_features", "model.rope_local_theta=9", None, r"rope_local_theta = 9.0 +needs model\.sliding_window"),
        (
            "model_features",
            "model.norm_zero_centered=true model.norm=layernorm",
            None,
            r"norm_zero_centered = true +needs model\.norm = rmsnorm",
        ),
        ("_tensor_parallel", "parallel.tp=3", None, r"tp = 3 +must divide model\.n_heads = 8 +use 1, 2, 4 or 8"),
        (
            "_tensor_parallel",
            "parallel.tp=8",
            None,
            r"tp = 8 +must divide model\.n_kv_heads = 4: a key/value head lies on one rank +use 1, 2 or 4",
        ),
        (
            "_tensor_parallel",
            "parallel.tp=4 model.ffn_hidden=702",
            None,
            r"tp = 4 +must divide model\.ffn_hidden = 702 +use an ffn_hidden of 700 or 704",
        ),
        (
            "_tensor_parallel",
            "parallel.tp=2 data.seq_length=1023",
            None,
            r"seq_length = 1023 +must divide by parallel\.tp = 2 under sequence parallelism +use 1022 or 1024",
        ),
        (
            "_pipeline",
            "parallel.pp=4 parallel.vp=2",
            None,
            r"pp = 4, vp = 2 +make 8 stages of 4 layers: every stage needs one +use pp × vp ≤ 4",
        ),
        ("_pipeline", "parallel.vp=2", None, r"vp = 2 +needs parallel\.pp > 1 +set vp = 1 or pp = 2 or more"),
        (
            "_pipeline",
            "parallel.pp=2 parallel.vp=2 parallel.schedule=gpipe",
            None,
            r"schedule = gpipe +runs 1 stage a rank, not vp = 2 +use interleaved, or vp = 1",
        ),
        (
            "_pipeline",
            "parallel.pp=2 parallel.schedule=interleaved",
            None,
            r"schedule = interleaved +needs parallel\.vp > 1 +set vp = 2, or use 1f1b",
        ),
        (
            "_context_parallel",
            "parallel.cp=3",
            None,
            r"seq_length = 1024 +must divide by 6: two chunks for each of parallel\.cp = 3 .*use 1020 or 1026",
        ),
        (
            "_context_parallel",
            "parallel.cp=4 parallel.tp=2 parallel.cp_algorithm=ulysses train.global_batch=8",
            None,
            r"cp = 4 +times tp 2 must divide model\.n_kv_heads = 4: ulysses .*use cp_algorithm = ring",
        ),
        (
            "_context_parallel",
            "parallel.cp=2 model.dropout=0.1",
            None,
            r"dropout = 0\.1 +does not go with parallel\.cp = 2",
        ),
        (
            "_zero",
            "parallel.zero=1 parallel.dp=4 parallel.zero_ranks=3",
            None,
            r"zero_ranks = 3 +must divide dp × cp = 4 +use 1, 2 or 4, or leave it out",
        ),
        (
            "_zero",
            "parallel.dp=4 parallel.zero=1 parallel.zero_ranks=2 parallel.ep=2 model.moe.num_experts=4"
            " model.moe.ffn_hidden=16",
            None,
            r"zero_ranks = 2 +does not go with parallel\.ep = 2",
        ),
        ("_zero", "parallel.dp=2 parallel.zero_ranks=2", None, r"zero_ranks = 2 +needs parallel\.zero > 0"),
        (
            "_data",
            "data.reset_attention_mask=true",
            None,
            r"reset_attention_mask = true +needs data\.reset_position_ids",
        ),
        (
            "_pipeline",
            "parallel.pp=2 parallel.schedule=zb-v",
            None,
            r"schedule = zb-v +runs 2 stages a rank, not vp = 1 +set vp = 2",
        ),
        ("_pipeline", "parallel.pp=3 parallel.schedule=dualpipe", None, r"pp = 3 +must be even for dualpipe +use 4"),
        (
            "_pipeline",
            "parallel.pp=2 parallel.schedule=gpipe parallel.schedule_file=a.txt",
            None,
            r"schedule = gpipe +goes without schedule_file +leave one of them out",
        ),
        (
            "_pipeline",
            "parallel.pp=2 parallel.layers_per_stage=[3,2]",
            None,
            r"layers_per_stage = \[3, 2\] +must be 2 numbers with the sum 4, only the first and last .* +use balanced",
        ),
        ("_heads", f"{MLA} model.position=none", None, r"position = none +must be rope with model.mla +set position"),
        (
            "_heads",
            f"{MLA} model.qk_norm=true",
            None,
            r"qk_norm = true +must be false with model.mla +leave qk_norm out",
        ),
        ("_heads", f"{MLA} model.head_dim=64", None, r"head_dim = 64 +must be 12 with model.mla +leave head_dim out"),
        ("_heads", f"{MLA} model.mla.qk_pos_emb_head_dim=3", None, r"qk_pos_emb_head_dim = 3 +must be even .* +use 4"),
        ("_heads", f"{MLA} model.mla.v_head_dim=13", None, r"v_head_dim = 13 +must not exceed .* = 12 +use 12 or less"),
        ("experts", "parallel.ep=2 parallel.dp=2", None, r"ep = 2 +needs experts: model.moe +set ep = 1"),
        (
            "experts",
            f"{MOE} parallel.ep=3 parallel.dp=3 train.global_batch=9",
            None,
            r"ep = 3 +must divide .*experts = 8",
        ),
        ("experts", f"{MOE} parallel.ep=4 parallel.dp=2", None, r"ep = 4 +must divide dp = 2: experts .* +use 1 or 2"),
        ("experts", f"{MOE} parallel.ep=4", 2, r"ep = 4 +must divide dp = 2"),
        ("experts", "model.moe={num_experts=8,ffn_hidden=9} parallel.tp=2", None, r"tp = 2 +must divide .*hidden = 9"),
        ("experts", f"{MOE} model.moe.router_topk=9", None, r"router_topk = 9 +must not exceed .*num_experts = 8"),
        ("experts", f"{MOE} model.moe.router_num_groups=4", None, r"router_num_groups +goes with router_group_topk"),
        (
            "experts",
            f"{MOE} model.moe.router_num_groups=3 model.moe.router_group_topk=1",
            None,
            r"router_num_groups = 3 +must divide num_experts = 8, and be at least router_group_topk = 1",
        ),
        (
            "experts",
            f"{MOE} model.moe.router_num_groups=4 model.moe.router_group_topk=2 model.moe.router_topk=3",
            None,
            r"router_topk = 3 +must be a multiple of router_group_topk = 2, within its 4 experts",
        ),
        (
            "experts",
            f"{MOE} model.moe.aux_loss_coeff=0.1",
            None,
            r"aux_loss_coeff = 0.1 +needs router_load_balancing_",
        ),
        ("experts", f"{MOE} model.moe.shared_expert_gate=true", None, r"shared_expert_gate = true +needs shared_exp"),
        ("experts", f"{MOE} model.moe.first_k_dense=4", None, r"first_k_dense = 4 +leaves none of 4 layers"),
        ("experts", f"{MOE} model.bias=true", None, r"model.bias = true +experts have no biases"),
        (
            "fp8",
            f"{MLA} train.dtype=fp8 data.seq_length=1024",
            None,
            r"kv_lora_rank = 8 +must divide by 16 for train.dtype = fp8 and tensorwise",
        ),
        ("_recompute", "parallel.recompute=block", None, r"recompute = block +needs parallel.recompute_layers"),
        ("_recompute", "parallel.recompute=auto", None, r"recompute = auto +needs parallel.memory_budget_gib"),
        ("_recompute", "parallel.recompute_layers=2", None, r"recompute_layers = 2 +goes with recompute = block, not"),
        (
            "_recompute",
            "parallel.recompute=full parallel.recompute_modules=['core_attn']",
            None,
            r"recompute_modules = \['core_attn'\] +goes with recompute = selective, not full +set recompute",
        ),
        (
            "_world",
            "parallel.tp=2 parallel.pp=2",
            6,
            r"world size = 6 +must divide by tp 2 × pp 2 × cp 1 = 4 +start 4 or 8 ranks",
        ),
        (
            "_world",
            "parallel.tp=2 parallel.dp=2",
            8,
            r"world size = 8 +must be tp 2 × pp 1 × cp 1 × dp 2 = 4 +start 4 ranks, or leave parallel\.dp out",
        ),
        (
            "batch",
            "parallel.dp=5 train.micro_batch=4 train.global_batch=48",
            None,
            r"global_batch = 48 +must divide by micro_batch 4 × dp 5 +use 40 or 60",
        ),
        (
            "batch",
            "train.micro_batch=3 train.global_batch=32 parallel.tp=2",
            8,
            r"global_batch = 32 +must divide by micro_batch 3 × dp 4 +use 24 or 36",
        ),
        (
            "batch",
            "parallel.pp=2 parallel.schedule=dualpipe train.global_batch=7",
            None,
            r"global_batch = 7 +gives 7 microbatches, half of which go each way in dualpipe +use 6 or 8",
        ),
        (
            "batch",
            "parallel.pp=2 parallel.vp=2 parallel.schedule=dualpipe-v train.micro_batch=2 train.global_batch=6",
            None,
            r"global_batch = 6 +gives 3 microbatches, and dualpipe-v needs 4: twice pp +use 8 or more, or zb-v",
        ),
        (
            "batch",
            "train.global_batch=8 train.rampup_batch_size=[2,4,100]",
            None,
            r"rampup_batch_size = \[2, 4, 100\] +must reach train\.global_batch = 8 from 2 in steps of 4",
        ),
        (
            "batch",
            "train.global_batch=8 train.rampup_batch_size=[2,3,100] parallel.dp=2",
            None,
            r"increment must divide by micro_batch × dp = 2 +use 2 or 4",
        ),
        (
            "batch",
            "train.global_batch=8 train.rampup_batch_size=[2,2,100] train.cuda_graph=true",
            None,
            r"rampup_batch_size = .* +does not go with train\.cuda_graph",
        ),
        (
            "batch",
            "train.global_batch=8 train.rampup_batch_size=[2,2,100] parallel.pp=2 parallel.schedule=dualpipe",
            None,
            r"rampup_batch_size\[0\] = 2 +gives 2 microbatches, and dualpipe needs 4",
        ),
        (
            "deterministic_dp",
            "parallel.deterministic_dp=true parallel.dp=6 train.global_batch=12",
            None,
            r"dp = 6 +must be a power of two with parallel\.deterministic_dp +use 4 or 8",
        ),
        (
            "deterministic_dp",
            "parallel.deterministic_dp=true parallel.dp=2 parallel.zero=1",
            None,
            r"zero = 1 +does not go with parallel\.deterministic_dp +its runs divide the norm",
        ),
        (
            "deterministic_dp",
            "parallel.deterministic_dp=true parallel.pp=2 parallel.schedule=zb-h1",
            None,
            r"schedule = zb-h1 +does not go with parallel\.deterministic_dp +use 1f1b, gpipe or interleaved",
        ),
        (
            "_offload",
            "parallel.dp=2 parallel.zero=2 parallel.offload_parameters=true",
            None,
            r"offload_parameters = true +needs parallel\.zero = 3, not 2: .* +set zero = 3, or leave it out",
        ),
        (
            "_offload",
            "parallel.offload_optimizer=true optim.name=muon",
            None,
            r"offload_optimizer = true +does not go with optim\.name = muon.* +use adamw",
        ),
        (
            "_lengths",
            "data.seq_length=4096",
            None,
            r"seq_length = 4096 +must not exceed model\.max_seq_length = 2048 +shorten the sequence",
        ),
        (
            "_data",
            'data.paths=["a","b"] data.weights=[1]',
            None,
            r"data\.weights has 1 entries +must have one for each of the 2 data\.paths +give one weight a path",
        ),
        ("_data", "data.split=1,2,3,4", None, r"data\.split = '1,2,3,4' +must be one to three weights.* +for example"),
        ("_data", "data.split=a,b", None, r"data\.split = 'a,b' +must be one to three weights"),
        ("_data", "data.split=0,0,0", None, r"data\.split = '0,0,0' +must be one to three weights"),
        ("_data", "data.split=1,-1,1", None, r"data\.split = '1,-1,1' +must be one to three weights"),
        ("_data", "data.split=1,nan,1", None, r"data\.split = '1,nan,1' +must be one to three weights"),
        ("_data", "data.split=1e3,1", None, r"data\.split = '1e3,1' +must be one to three weights"),
        ("_data", "data.split=1,,1", None, r"data\.split = '1,,1' +must be one to three weights"),
        (
            "fp8",
            "train.dtype=fp8 model.ffn_hidden=712",
            None,
            r"ffn_hidden / tp = 712 +must divide by 16 .* or bf16",
        ),
        (
            "fp8",
            "train.dtype=fp8 train.fp8_recipe=blockwise model.ffn_hidden=704",
            None,
            r"ffn_hidden / tp = 704 +must divide by 128 for train.dtype = fp8 and blockwise scales",
        ),
        ("fp8", "train.dtype=fp8 lora.rank=24", None, r"lora.rank = 24 +must divide by 16 for train.dtype = fp8"),
        (
            "fp8_recipe",
            "train.fp8_recipe=delayed",
            None,
            r"fp8_recipe = delayed +says how train.dtype = fp8 scales; it is bf16 +set train.dtype = fp8",
        ),
        (
            "fp8_param_gather",
            "parallel.fp8_param_gather=true parallel.dp=2 parallel.zero=1",
            None,
            r"fp8_param_gather = true +needs train.dtype = fp8; it is bf16 +set train.dtype",
        ),
        (
            "fp8_param_gather",
            "parallel.fp8_param_gather=true train.dtype=fp8",
            None,
            r"fp8_param_gather = true +needs parallel.zero > 0: without it no weight travels",
        ),
        (
            "fp8_param_gather",
            "parallel.fp8_param_gather=true parallel.dp=2 parallel.zero=1 train.dtype=fp8 train.fp8_recipe=delayed",
            None,
            r"fp8_param_gather = true +needs tensorwise scales; train.fp8_recipe = delayed +use tensorwise",
        ),
        (
            "fp8_recipe",
            "train.fp8_weight_cache=false",
            None,
            r"fp8_weight_cache = false +says how often train.dtype = fp8 scales; it is bf16 +set train.dtype = fp8",
        ),
        (
            "fp8",
            "train.dtype=fp8 data.seq_length=1000",
            None,
            r"= 1000 tokens +must divide by 16 for train.dtype = fp8 and tensorwise",
        ),
        (
            "fp8",
            "train.dtype=fp8 model.head_dim=2 parallel.tp=2",
            None,
            r"8 heads × head_dim 2 / tp 2 +must divide by 16",
        ),
        (
            "_tp_comm_overlap",
            "parallel.tp=2 parallel.tp_comm_overlap=true parallel.sequence_parallel=false",
            None,
            r"sequence_parallel = false +does not go with parallel\.tp_comm_overlap .* switch it on",
        ),
        (
            "_tp_comm_overlap",
            "parallel.tp=2 parallel.tp_comm_overlap=true train.dtype=fp8",
            None,
            r"dtype = fp8 +does not go with parallel\.tp_comm_overlap +use bf16",
        ),
        *(
            ("compiled", f"train.compile=true {given}", None, rf"{given.replace('=', ' = ')} +does not go with train")
            for given in ("parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "parallel.zero=3", "train.dtype=fp8")
        ),
        ("compiled", "train.compile=true model.dropout=0.1", None, r"dropout = 0.1 +does not go .* leave one of them"),
        *(
            (
                "cuda_graph",
                f"train.cuda_graph=true {given}",
                None,
                rf"{given.replace('=', ' = ')} +does not go with .*:",
            )
            for given in ("parallel.pp=2", "parallel.zero=3", "parallel.offload_optimizer=true")
        ),
        ("scalar_head", "model.head=scalar model.mtp_num_layers=1", None, r"mtp_num_layers = 1 +predicts tokens"),
        (
            "preferences",
            "dpo.loss=hinge dpo.label_smoothing=0.1",
            None,
            r"label_smoothing = 0\.1 +has no effect on dpo\.loss = hinge +use cdpo, robust, exo, simpo",
        ),
        ("preferences", "dpo.loss=exo", None, r"dpo\.loss = exo +needs dpo\.label_smoothing above 0"),
        ("adapters", "lora.base=nf4 train.dtype=fp8", None, r"dtype = fp8 +multiplies in 8 bits by .* nf4 holds in 4"),
        ("preferences", "dpo.cross_entropy=token", None, r"cross_entropy = token +says how .*= sigmoid has none"),
        ("preferences", "dpo.reference=base", None, r"dpo\.reference = base +is this model without its adapters"),
        (
            "master_weights",
            "optim.master_weights=false train.dtype=fp16",
            None,
            r"dtype = fp16 +does not go with optim.master_weights = false: its range is too small .* use bf16",
        ),
        ("master_weights", "optim.master_weights=false optim.name=muon", None, r"name = muon .* use adamw, or keep"),
        (
            "master_remainders",
            "optim.master_remainders=true train.dtype=fp32",
            None,
            r"dtype = fp32 +does not go with optim\.master_remainders +use bf16",
        ),
        (
            "master_remainders",
            "optim.master_remainders=true train.dtype=bf16 optim.name=muon",
            None,
            r"name = muon +does not go with optim\.master_remainders +use adamw",
        ),
        (
            "master_remainders",
            "optim.master_remainders=true train.dtype=bf16 optim.master_weights=false",
            None,
            r"master_weights = false +does not go with optim\.master_remainders",
        ),
        (
            "master_remainders",
            "optim.master_remainders=true train.dtype=bf16 parallel.offload_optimizer=true",
            None,
            r"offload_optimizer = true +does not go with optim\.master_remainders",
        ),
        (
            "narrow_gradients",
            "optim.main_grads_dtype=bf16 train.dtype=fp32",
            None,
            r"optim\.main_grads_dtype = bf16 +does not go with train\.dtype = fp32 +use bf16",
        ),
        (
            "narrow_averages",
            "optim.exp_avg_dtype=bf16 train.dtype=fp64",
            None,
            r"optim\.exp_avg_dtype = bf16 +does not go with train\.dtype = fp64 +leave it out",
        ),
        (
            "narrow_averages",
            "optim.exp_avg_sq_dtype=bf16 optim.beta2=0.999",
            None,
            r"optim\.beta2 = 0\.999 +is too near 1 for an average in bf16.* or optim\.exp_avg_sq_dtype = fp32",
        ),
        (
            "narrow_averages",
            "optim.master_weights=false optim.beta1=0.998 train.dtype=bf16",
            None,
            r"optim\.beta1 = 0\.998 .*use at most 0\.996, or optim\.exp_avg_dtype = fp32",
        ),
        (
            "_steps",
            "optim.lr=1e-4 optim.min_lr=1e-3",
            None,
            r"min_lr = 0\.001 +must not exceed optim\.lr = 0\.0001 +lower optim\.min_lr",
        ),
        (
            "_steps",
            "optim.warmup_steps=11 train.steps=10",
            None,
            r"warmup_steps = 11 +must not exceed train\.steps = 10 +shorten the warm-up",
        ),
        (
            "_local_copies",
            "checkpoint.local_every=5",
            None,
            r"local_every = 5 +needs checkpoint\.local_dir, on the node +for example /dev/shm/",
        ),
        ("_local_copies", "checkpoint.local_dir=/x", None, r"local_dir = /x +needs checkpoint\.local_every +set it"),
        ("_local_copies", "checkpoint.local_replicate=true", None, r"replicate = true +needs checkpoint\.local_every:"),
        ("_recycling", "checkpoint.recycle=true", None, r"recycle = true +needs checkpoint\.keep, .* set keep = 2"),
        (
            "_recycling",
            "checkpoint.recycle=true checkpoint.keep=2 checkpoint.dir=s3://bucket/run",
            None,
            r"recycle = true +needs a path: nothing is renamed behind a URL",
        ),
        ("rollouts", f"{ROLLOUT} train.global_batch=5", None, r"prompts × samples = 8 +must divide by .* = 5: a step"),
        ("rollouts", f"{ROLLOUT} rollout.epochs=3", None, r"steps = 1000 +must divide by 3, the steps of a rollout"),
        ("rollouts", f"{ROLLOUT} rollout.max_tokens=2000", None, r"max_tokens = 2000 +must leave room for a prompt"),
        ("rollouts", f"{ROLLOUT} model.dropout=0.1", None, r"dropout = 0\.1 +must be 0 with rollouts"),
        (
            "rollouts",
            f"{ROLLOUT} chat.packing=true train.cuda_graph=true",
            None,
            r"cuda_graph = true +is made for .*one",
        ),
        ("rollouts", "rollout.prompts=8", None, r"rollout\.scores +names no reward +for example"),
        (
            "rollouts",
            "rollout.prompts=8 rollout.scores=[{kind='regex'}]",
            None,
            r"scores\[0\]\.kind = regex +needs rollout\.scores\[0\]\.pattern +set pattern",
        ),
        (
            "rollouts",
            "rollout.prompts=8 rollout.scores=[{kind='number',function='a:b'}]",
            None,
            r"scores\[0\]\.function +goes with kind = function, not number",
        ),
    ],
)
def test_broken_rule(rule: str, overrides: str, world_size: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [TINY, *overrides.split()], world_size=world_size)
    assert len(caught.value.problems) == 1, "the other rules hold"


def test_every_rule_is_tested() -> None:
    marks = test_broken_rule.pytestmark  # type: ignore[attr-defined]
    tested = {case[0] for mark in marks for case in mark.args[1]}
    assert tested == {rule.__name__ for rule in check_module.RULES}


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ("model.hidden=250 model.head_dim=32", None),
        ("model.position=learned model.head_dim=33", None),
        ("parallel.tp=4", None),
        ("parallel.tp=2 parallel.sequence_parallel=false data.seq_length=1023", None),
        ("parallel.pp=4", None),
        ("parallel.pp=2 parallel.vp=2", None),
        ("parallel.tp=2 parallel.pp=2", 8),
        ("parallel.dp=5 train.micro_batch=4 train.global_batch=60", None),
        ("data.seq_length=2048", None),
        ("data.split=99,1", None),
        ("data.split=1", None),
        ("data.split=.9,0.1", None),
        ("optim.warmup_steps=10 train.steps=10", None),
    ],
)
def test_rule_that_holds(overrides: str, world_size: int | None) -> None:
    load_config(None, [TINY, *overrides.split()], world_size=world_size)
