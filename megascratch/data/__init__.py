"""Data: from JSONL text to microbatches, in Megatron's formats and with Megatron's sample order.

    corpus → preprocess → indexed (.bin/.idx) → samples → blend → sampler → Microbatch

Nothing is imported here, so that `preprocess` starts without loading torch.
"""
